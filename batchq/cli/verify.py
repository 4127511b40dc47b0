"""`batchq verify`: rows counted again from the input files and the data objects, whatever workers and receipts say.

Reads every input and every data object, page checksums verified; memory holds one part at a time.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest

from batchq import input, storage
from batchq.config import Config
from batchq.errors import BatchqError, InputError, NotFound
from batchq.output import layout, parts, receipts
from batchq.output.schema import schema_from_text
from batchq.plan.inputs import obeyed
from batchq.plan.stored import load_plan
from batchq.records import Plan, Receipt, Shard, Usage

AT_ONCE = 4  # shards; enough to wait for a store while another is parsed
SHOWN = 10  # problems that are told one by one


@dataclass
class Finding:
    """What one shard's objects hold."""

    rows: int = 0
    answers: int = 0
    lost: int = 0  # input rows that the output doesn't have
    repeated: int = 0  # rows that the output has again, or that no input row explains
    problems: list[str] = field(default_factory=list)


def verify(config: Config) -> tuple[bool, str]:
    """Whether the output has every input row exactly once, whole, as the receipts and the manifest say; and in words.

    Raises BatchqError if no run is there, Changed if an input is no longer the one that was planned.
    """
    output = storage.normalize(config.output.path)
    plan = load_plan(output)
    if plan is None:
        raise BatchqError(f"{output}: no run has been planned there yet")
    plan = obeyed(plan, config)
    parts: dict[int, dict[int, str]] = defaultdict(dict)
    problems = []
    for stat in storage.list_objects(layout.data(output)):
        place = layout.parse_part(stat.uri)
        if place is None or place[0] >= len(plan.shards):
            problems.append(f"{stat.uri}: is none of this run's objects; readers take it for data")
        else:
            parts[place[0]][place[1]] = stat.uri
    empty = {s.uri for s in storage.list_objects(layout.empties(output))}

    def one(shard: Shard) -> Finding:
        return _shard(plan, shard, output, parts[shard.index], empty)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        findings = list(threads.map(one, plan.shards))
    problems += [problem for finding in findings for problem in finding.problems]
    rows, answers = sum(f.rows for f in findings), sum(f.answers for f in findings)
    lost, repeated = sum(f.lost for f in findings), sum(f.repeated for f in findings)
    objects = sum(map(len, parts.values()))
    counted = {"rows": rows, "answers": answers, "failures": rows - answers, "parts": objects + len(empty)}
    problems += _manifest(output, counted)
    good = not (problems or lost or repeated)
    words = f"{rows:,} rows = {answers:,} answers + {rows - answers:,} failures in {objects:,} objects"
    lines = [
        f"verified: {words}; each of the input's rows once"
        if good
        else f"NOT as promised: {words}; {lost:,} input rows are missing, {repeated:,} rows are repeated or foreign",
        *(f"  {problem}" for problem in problems[:SHOWN]),
    ]
    if len(problems) > SHOWN:
        lines.append(f"  and {len(problems) - SHOWN} more like these")
    return good, "\n".join(lines)


def _shard(plan: Plan, shard: Shard, output: str, parts: dict[int, str], empty: set[str]) -> Finding:
    """Compare one shard's input rows with the rows of its data objects, in order."""
    finding = Finding()
    own_receipts: list[Receipt] = []

    def committed() -> Iterator[str]:
        for number in sorted(parts):
            ids, receipt = _part(parts[number], plan, finding)
            if receipt is not None:
                own_receipts.append(receipt)
            yield from ids

    ends_early = []  # why the input couldn't be read to its end

    def expected() -> Iterator[str]:
        try:
            for row in input.rows_of(plan, shard, plan.columns[:1]):
                yield row.id
        except InputError as error:
            ends_early.append(str(error))

    missing: Counter[str] = Counter()  # seen in the input and not yet in the output, and the other way round
    for wanted, written in zip_longest(expected(), committed()):
        if wanted != written:
            if wanted is not None:
                missing[wanted] += 1
            if written is not None:
                missing[written] -= 1
    finding.lost = sum(n for n in missing.values() if n > 0)
    finding.repeated = -sum(n for n in missing.values() if n < 0)
    uri = layout.empty(output, shard.index)
    if not parts and uri in empty:
        own_receipts.append(receipts.read(uri))
    if ends_early and not any(r.quarantined for r in own_receipts):
        finding.problems.append(ends_early[0])
    numbers, lasts = [r.part for r in own_receipts], [r.last for r in own_receipts]
    if numbers != list(range(len(numbers))) or lasts[-1:] != [True]:
        finding.problems.append(f"shard {shard.index} isn't committed whole; the same job goes on with it")
    return finding


def _part(uri: str, plan: Plan, finding: Finding) -> tuple[list[str], Receipt | None]:
    """The ids in one data object, and its receipt if that tells of what is in it."""
    schema = schema_from_text(plan.schema)
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
    counted = Usage(
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
    if counted != said or dict(Counter(e for e in errors if e is not None)) != receipt.failures:
        finding.problems.append(f"{uri}: holds other rows than its receipt says")
    if receipt.fingerprint != plan.fingerprint:
        finding.problems.append(f"{uri}: belongs to another run")
    if (receipt.shard, receipt.part) != layout.parse_part(uri):
        finding.problems.append(f"{uri}: has a name that isn't its own")
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
