"""`batchq verify`: rows counted again and the user's columns compared, from the input files and the data objects alone,
whatever workers and receipts say.

Reads every input and every data object, page checksums verified; memory holds a few parts at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from batchq import storage
from batchq.config import Config, TableFormat
from batchq.errors import BatchqError, NotFound
from batchq.output import delta, layout
from batchq.output.schema import input_columns, schema_from_text
from batchq.plan import places
from batchq.plan.audit import Finding, audit
from batchq.plan.inputs import obeyed
from batchq.plan.stored import load_plan
from batchq.records import Plan, Shard
from batchq.report import facts

AT_ONCE = 4  # shards; enough to wait for a store while another is parsed
SHOWN = 10  # problems that are told one by one
COMPARED = 10_000_000  # rows; of more, a share of the shards is compared unless all is asked for


def verify(config: Config, full: bool = False) -> tuple[bool, str]:
    """Whether the output has every input row exactly once, whole and with its columns as they were, as the receipts and
    the manifest say; and in words. `full`: compare every row, however many.

    Raises BatchqError if no run is there, Changed if an input is no longer the one that was planned.
    """
    output = storage.normalize(config.output.path)
    plan = load_plan(output)
    if plan is None:
        raise BatchqError(f"{output}: no run has been planned there yet")
    plan = obeyed(plan, config)
    placed, problems, objects = places.find(output, plan)
    if config.output.table is TableFormat.delta:
        problems += delta.problems(output, plan)
    empty = {s.uri for s in storage.list_objects(layout.empties(output))}
    manifest, missing = _manifest(output)
    every = 1 if full else -(-int(manifest.get("rows", 0)) // COMPARED) or 1

    def one(shard: Shard) -> Finding:
        uri = layout.empty(output, shard.index)
        return audit(
            plan,
            config.task,
            shard,
            placed.get(shard.index, {}),
            uri if uri in empty else None,
            not shard.index % every,
        )

    with ThreadPoolExecutor(AT_ONCE) as threads:
        findings = list(threads.map(one, plan.shards))
    problems += [problem for finding in findings for problem in finding.problems]
    rows, answers = sum(f.rows for f in findings), sum(f.answers for f in findings)
    lost, repeated = sum(f.lost for f in findings), sum(f.repeated for f in findings)
    parts = sum(map(len, placed.values()))
    counted = {"rows": rows, "answers": answers, "failures": rows - answers, "parts": parts + len(empty)}
    problems += missing or [
        f"{layout.manifest(output)}: says {manifest.get(k)} {k}; there are {n}"
        for k, n in counted.items()
        if manifest.get(k) != n
    ]
    changed = sum(f.changed for f in findings)
    good = not (problems or lost or repeated or changed)
    words = f"{rows:,} rows = {answers:,} answers + {rows - answers:,} failures in {facts.counted(objects, 'object')}"
    lines = [
        f"verified: {words}; each of the input's rows once"
        if good
        else f"NOT as promised: {words}; {lost:,} input rows are missing, {repeated:,} rows are repeated or foreign, "
        f"{changed:,} values are not the input's",
        f"  {_compared(plan, config, findings, every)}",
        *(f"  {problem}" for problem in problems[:SHOWN]),
    ]
    if len(problems) > SHOWN:
        lines.append(f"  and {len(problems) - SHOWN} more like these")
    return good, "\n".join(lines)


def _compared(plan: Plan, config: Config, findings: Sequence[Finding], every: int) -> str:
    rows, columns = sum(f.compared for f in findings), len(input_columns(schema_from_text(plan.schema), config.task))
    of = f"of {columns} {'column' if columns == 1 else 'columns'}"
    if every == 1:
        return f"compared with the input, value by value: all {rows:,} rows {of}"
    return (
        f"compared with the input, value by value: {rows:,} rows {of}, a sample: one shard of {every}; --full takes all"
    )


def _manifest(output: str) -> tuple[dict[str, Any], list[str]]:
    """What the manifest says, or what is wrong with it."""
    uri = layout.manifest(output)
    try:
        return json.loads(storage.read(uri)), []
    except NotFound:
        return {}, [f"{uri}: isn't there; the run hasn't completed"]
    except ValueError:
        return {}, [f"{uri}: damaged; `report` writes it anew"]
