"""What stands, counted again from the input files and the data objects, whatever workers and receipts say; and tidying.

`verify` reads every input and every data object, page checksums verified; memory holds one part at a time.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest

from batchq import input, models, storage
from batchq.config import Config
from batchq.errors import BatchqError, InputError, NotFound
from batchq.output import layout, parts, receipts
from batchq.output.schema import schema_from_text
from batchq.plan.committed import read_committed
from batchq.plan.stored import load_plan
from batchq.records import Plan, Receipt, Shard, Usage

AT_ONCE = 4  # shards; enough to wait for a store while another is parsed
SHOWN = 10  # findings that are told one by one
DAY = 86_400.0  # seconds


@dataclass
class Finding:
    """What one shard's objects hold."""

    rows: int = 0
    answers: int = 0
    lost: int = 0  # input rows that stand nowhere
    repeated: int = 0  # rows that stand again, or that no input row explains
    problems: list[str] = field(default_factory=list)


def verify(config: Config) -> tuple[bool, str]:
    """Whether every input row stands exactly once, whole, as the receipts and the manifest say; and that in words.

    Raises BatchqError if no run is there, Changed if an input is no longer the one that was planned.
    """
    output = storage.normalize(config.output.path)
    fixed = load_plan(output)
    if fixed is None:
        raise BatchqError(f"{output}: no run has been planned there yet")
    parts: dict[int, dict[int, str]] = defaultdict(dict)
    problems = []
    for found in storage.list_objects(layout.data(output)):
        place = layout.parse_part(found.uri)
        if place is None or place[0] >= len(fixed.shards):
            problems.append(f"{found.uri}: is none of this run's objects; readers take it for data")
        else:
            parts[place[0]][place[1]] = found.uri
    empty = {s.uri for s in storage.list_objects(layout.empties(output))}

    def one(shard: Shard) -> Finding:
        return _shard(fixed, shard, output, parts[shard.index], empty)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        findings = list(threads.map(one, fixed.shards))
    problems += [problem for finding in findings for problem in finding.problems]
    rows, answers = sum(f.rows for f in findings), sum(f.answers for f in findings)
    lost, repeated = sum(f.lost for f in findings), sum(f.repeated for f in findings)
    objects = sum(map(len, parts.values()))
    counted = {"rows": rows, "answers": answers, "failures": rows - answers, "parts": objects + len(empty)}
    problems += _manifest(output, counted)
    good = not (problems or lost or repeated)
    words = f"{rows:,} rows = {answers:,} answers + {rows - answers:,} failures in {objects:,} objects"
    lines = [
        f"verified: {words}; each of the input's rows stands once"
        if good
        else f"NOT as promised: {words}; "
        f"{lost:,} input rows stand nowhere, {repeated:,} rows stand again or are foreign",
        *(f"  {problem}" for problem in problems[:SHOWN]),
    ]
    if len(problems) > SHOWN:
        lines.append(f"  and {len(problems) - SHOWN} more like these")
    return good, "\n".join(lines)


def _shard(fixed: Plan, shard: Shard, output: str, parts: dict[int, str], empty: set[str]) -> Finding:
    """Compare one shard's input rows with what stands for them, in order."""
    finding = Finding()
    found: list[Receipt] = []

    def standing() -> Iterator[str]:
        for number in sorted(parts):
            ids, receipt = _part(parts[number], fixed, finding)
            if receipt is not None:
                found.append(receipt)
            yield from ids

    ends_early = []  # why the input couldn't be read to its end

    def expected() -> Iterator[str]:
        try:
            for row in input.rows_of(fixed, shard, fixed.columns[:1]):
                yield row.id
        except InputError as error:
            ends_early.append(str(error))

    missing: Counter[str] = Counter()  # seen in the input and not yet in the output, and the other way round
    for wanted, there in zip_longest(expected(), standing()):
        if wanted != there:
            if wanted is not None:
                missing[wanted] += 1
            if there is not None:
                missing[there] -= 1
    finding.lost = sum(n for n in missing.values() if n > 0)
    finding.repeated = -sum(n for n in missing.values() if n < 0)
    uri = layout.empty(output, shard.index)
    if not parts and uri in empty:
        found.append(receipts.read(uri))
    if ends_early and not any(r.quarantined for r in found):
        finding.problems.append(ends_early[0])
    if [r.part for r in found] != list(range(len(found))) or [r.last for r in found][-1:] != [True]:
        finding.problems.append(f"shard {shard.index} isn't committed whole; the same job goes on with it")
    return finding


def _part(uri: str, fixed: Plan, finding: Finding) -> tuple[list[str], Receipt | None]:
    """The ids in one data object, and its receipt if that tells of what is in it."""
    schema = schema_from_text(fixed.schema)
    try:
        receipt = receipts.read(uri)
        table = parts.read(uri, schema.names)
    except BatchqError as error:
        finding.problems.append(str(error))
        return [], None
    ids: list[str] = table.column("batchq_id").to_pylist()
    errors = table.column("batchq_error").to_pylist()
    tokens = {k: table.column(f"batchq_{k}_tokens").to_pylist() for k in ("prompt", "cached", "output")}
    answered = [count is not None for count in tokens["prompt"]]
    finding.rows += len(ids)
    finding.answers += sum(answered)
    said = receipt.usage
    found = Usage(
        rows=len(ids),
        answers=sum(answered),
        failures=sum(e is not None for e in errors),
        prompt_tokens=sum(n or 0 for n in tokens["prompt"]),
        cached_tokens=sum(n or 0 for n in tokens["cached"]),
        output_tokens=sum(n or 0 for n in tokens["output"]),
        correct=said.correct,
        gold=said.gold,
        mass=said.mass,
    )
    if found != said or dict(Counter(e for e in errors if e is not None)) != receipt.failures:
        finding.problems.append(f"{uri}: holds other rows than its receipt says")
    if receipt.fingerprint != fixed.fingerprint:
        finding.problems.append(f"{uri}: belongs to another run")
    if (receipt.shard, receipt.part) != layout.parse_part(uri):
        finding.problems.append(f"{uri}: stands under a name that isn't its own")
    if any(a == (e is not None) for a, e in zip(answered, errors, strict=True)):
        finding.problems.append(f"{uri}: has a row that is neither an answer nor a failure")
    return ids, receipt


def _manifest(output: str, counted: dict[str, int]) -> list[str]:
    uri = layout.manifest(output)
    try:
        said = json.loads(storage.read(uri))
    except NotFound:
        return [f"{uri}: isn't there; the run hasn't completed"]
    except ValueError:
        return [f"{uri}: damaged; `report` writes it anew"]
    return [f"{uri}: says {said.get(k)} {k}; there are {n}" for k, n in counted.items() if said.get(k) != n]


def clean(config: Config) -> str:
    """Remove what a finished run left under meta/ for attempts that might have come after, and old cached models.

    Data, receipts, plan, manifest, report and the records of what was spent stay. Raises BatchqError for a run that
    isn't finished: its spills are answers that were paid for.
    """
    output = storage.normalize(config.output.path)
    fixed = load_plan(output)
    if fixed is None:
        raise BatchqError(f"{output}: no run has been planned there yet")
    if left := len(read_committed(fixed, output).remaining):
        raise BatchqError(f"{output}: {left} shards to go; what would be removed is what a resume goes on from")
    count = size = 0
    for folder in layout.leftovers(output):
        for found in storage.list_objects(folder):
            count, size = count + 1, size + found.size
        storage.delete_prefix(folder)
    for found in storage.list_objects(storage.join(output, "meta")):
        if layout.is_probe(output, found.uri):
            storage.delete(found.uri)
            count += 1
    lines = [f"{output}: removed {count:,} objects, {size / 1e6:,.1f} MB, that the finished run no longer needs"]
    if config.clean.cache_days is not None:
        lines.append(_clean_cache(config.clean.cache_days))
    return "\n".join(lines)


def _clean_cache(days: float) -> str:
    """Remove models, checkpoints and findings made more than so many days ago; they can be made again."""
    count = size = 0
    for kind in ("models", "checkpoints"):
        for folder in (models.cache_dir() / kind).glob("*/"):
            files = [p.stat() for p in folder.rglob("*") if p.is_file()]
            if all(time.time() - stat.st_mtime > days * DAY for stat in [*files, folder.stat()]):
                count, size = count + 1, size + sum(stat.st_size for stat in files)
                shutil.rmtree(folder)
    for kind in ("tune", "reached", "gate"):
        for path in (models.cache_dir() / kind).glob("*.json"):
            if time.time() - path.stat().st_mtime > days * DAY:
                count, size = count + 1, size + path.stat().st_size
                path.unlink()
    where = models.cache_dir()
    what = f"{count} models, checkpoints, tuned settings and other findings older than {days:g} days"
    return f"{where}: removed {what}, {size / 1e6:,.1f} MB"
