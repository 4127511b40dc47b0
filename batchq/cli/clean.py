"""`batchq clean`: removes what only a resume would have needed of a finished run, and old cached models."""

from __future__ import annotations

import shutil
import time

from batchq import storage
from batchq.config import Config
from batchq.errors import BatchqError
from batchq.machine import local_cache
from batchq.machine.cache import cache_dir
from batchq.output import compaction, delta, layout, objects
from batchq.plan.committed import read_committed
from batchq.plan.stored import load_plan
from batchq.storage import failpoint
from batchq.worker import index

DAY = 86_400.0  # seconds


def clean(config: Config) -> str:
    """Remove what a finished run left under meta/ for a resume that never came, and old cached models.

    Data (the parts too, unless clean.parts), receipts, plan, manifest, report and the records of what was spent stay.
    Raises BatchqError for a run that isn't finished: its spills are answers that were paid for.
    """
    output = storage.normalize(config.output.path)
    plan = load_plan(output)
    if plan is None:
        raise BatchqError(f"{output}: no run has been planned there yet")
    if left := len(read_committed(plan, output).remaining):
        raise BatchqError(f"{output}: {left} shards to go; what would be removed is what a resume goes on from")
    count = size = 0
    current = objects.folder(output)
    unread = [f for f in layout.compacted_folders(output) if f != current]  # of a compaction that was given up
    for folder in [*layout.leftovers(output), *unread]:
        for stat in storage.list_objects(folder):
            count, size = count + 1, size + stat.size
        storage.delete_prefix(folder)
    for stat in storage.list_objects(storage.join(output, "meta")):
        if layout.is_probe(output, stat.uri):
            storage.delete(stat.uri)
            count += 1
    if plan.reuse:
        size += index.remove_unused(0, plan.reuse)
    lines = [f"{output}: removed {count:,} objects, {size / 1e6:,.1f} MB, that the finished run no longer needs"]
    if config.clean.parts:
        lines.append(_clean_parts(output))
    if config.clean.cache_days is not None:
        lines.append(_clean_cache(config.clean.cache_days))
    return "\n".join(lines)


def _clean_parts(output: str) -> str:
    """Remove the parts that were compacted, each once it was compared with the rows that took its place."""
    compacted = objects.announced(output)
    if compacted is None:
        raise BatchqError(f"{output}: clean.parts removes what was compacted, and it isn't; give `compact` first")
    if delta.uses_parts(output):
        raise BatchqError(f"{output}: its Delta table has the parts; the same job with output.table=delta switches it")
    count = 0
    for uri, why in compaction.differences(output, compacted):
        if why:
            raise BatchqError(f"{why}; it stays, and nothing after it was removed")
        failpoint.reach("clean.part.compared")
        storage.delete(uri)
        count += 1
    return f"{layout.data(output)}: removed {count:,} parts, each compared; the rows are in {objects.folder(output)}"


def _clean_cache(days: float) -> str:
    """Remove models, checkpoints, logs and cached results made more than so many days ago; they can be made again."""
    count, size = 0, index.remove_unused(days * DAY)
    for kind in ("models", "checkpoints", "logs/*"):
        for folder in cache_dir().glob(f"{kind}/*/"):
            files = [p.stat() for p in folder.rglob("*") if p.is_file()]
            if all(time.time() - stat.st_mtime > days * DAY for stat in [*files, folder.stat()]):
                count, size = count + 1, size + sum(stat.st_size for stat in files)
                shutil.rmtree(folder)
    for kind in (*local_cache.KINDS, *local_cache.OLD_KINDS, "tokenizers"):
        for path in (cache_dir() / kind).glob("*.json"):
            if time.time() - path.stat().st_mtime > days * DAY:
                count, size = count + 1, size + path.stat().st_size
                path.unlink()
    where = cache_dir()
    what = f"{count} models, checkpoints, logs, tuned settings and other cached results older than {days:g} days"
    return f"{where}: removed {what}, {size / 1e6:,.1f} MB"
