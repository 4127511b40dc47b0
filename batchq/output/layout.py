"""Where everything of an output lies: data/ is one clean table for any reader, all else is under meta/.

Functions take the output's normalized URI and return URIs; folders without a final slash.
"""

from __future__ import annotations

import re
import uuid

from batchq import storage
from batchq.records import COMPACT, COMPACTED, PLAN, RUNS, Shard

_PROBE = "meta/probe-"


# ---- data ----


def data(output: str) -> str:
    """The folder of the committed parts, and of nothing else."""
    return storage.join(output, "data")


def part(output: str, shard: Shard, number: int) -> str:
    """data/part-00017.parquet, and data/part-00017-0003.parquet for the fourth part; of a stream, the first too has its
    number."""
    suffix = f"-{number:04d}" if number or shard.range.unit == "stream" else ""
    return storage.join(data(output), f"part-{shard.index:05d}{suffix}.parquet")


def parse_part(uri: str) -> tuple[int, int] | None:
    """(shard, part) of a data object's name; None if it isn't one of ours."""
    matched = re.fullmatch(r"(?:.*/)?part-(\d{5,})(?:-(\d{4,}))?\.parquet", uri)
    return (int(matched[1]), int(matched[2] or 0)) if matched else None


def compacted(output: str, folder: str) -> str:
    """A folder of compacted objects; which one counts, if any, is said by `compact`. See objects.py."""
    return storage.join(output, folder)


def compacted_folders(output: str) -> list[str]:
    """All that are there: the one that counts, and those of compactions that were killed and given up."""
    found = (s.uri[len(output) + 1 :].partition("/")[0] for s in storage.list_objects(output))
    return [compacted(output, name) for name in sorted({n for n in found if n.startswith(COMPACTED)})]


def compacted_object(output: str, folder: str, number: int) -> str:
    return storage.join(compacted(output, folder), f"rows-{number:05d}.parquet")


# ---- one of each ----


def compact(output: str) -> str:
    """The record of the compacted objects that took the parts' place; once it is there."""
    return storage.join(output, COMPACT)


def plan(output: str) -> str:
    return storage.join(output, PLAN)


def manifest(output: str) -> str:
    return storage.join(output, "meta/manifest.json")


def gate(output: str) -> str:
    return storage.join(output, "meta/gate.json")


def report(output: str, kind: str) -> str:
    """`kind`: html, csv or json."""
    return storage.join(output, f"meta/report.{kind}")


# ---- records of drivers and attempts ----


def runs(output: str) -> str:
    return storage.join(output, RUNS)


def run(output: str, id: str) -> str:
    """One invocation's record."""
    return storage.join(runs(output), f"{id}.json")


def lease(output: str) -> str:
    return storage.join(output, "meta/lease")


def attempts(output: str, shard: int) -> str:
    """The folder of one shard's marks."""
    return storage.join(output, f"meta/attempts/{shard:05d}")


def mark(output: str, shard: int, number: int) -> str:
    return storage.join(attempts(output, shard), f"{number:04d}.json")


def partial(output: str) -> str:
    """The folder of all shards' spills."""
    return storage.join(output, "meta/partial")


def spills(output: str, shard: int) -> str:
    """The folder of one shard's spills."""
    return storage.join(partial(output), f"{shard:05d}")


def empties(output: str) -> str:
    return storage.join(output, "meta/empty")


def empty(output: str, shard: int) -> str:
    """Where an empty shard says that it is done: no table, because readers trip over an empty row group."""
    return storage.join(empties(output), f"{shard:05d}.json")


# ---- what comes and goes ----


def staging(output: str) -> str:
    """Where local files are written and synced before they are linked to their names."""
    return storage.join(output, "meta/tmp")


def probe(output: str) -> str:
    """A new name, to try whether the store refuses a second create."""
    return storage.join(output, f"{_PROBE}{uuid.uuid4().hex}")


def is_probe(output: str, uri: str) -> bool:
    return uri.startswith(storage.join(output, _PROBE))


def leftovers(output: str) -> list[str]:
    """Folders that a finished run no longer needs."""
    local = [storage.join(output, name) for name in ("meta/.tmp", "meta/runs/.tmp")]  # storage's own staging
    return [partial(output), storage.join(output, "meta/attempts"), staging(output), *local]
