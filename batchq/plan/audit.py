"""One shard, counted and compared again: its input's rows against those of its data objects, whatever receipts say."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from batchq.config import TaskConfig
from batchq.errors import BatchqError, InputError
from batchq.input.originals import Block, originals
from batchq.output import receipts
from batchq.output.schema import COUNTS, FAILURE, IDENTITY, input_columns, schema_from_text
from batchq.plan.comparison import Comparison
from batchq.records import Plan, Receipt, Shard

OURS = {field.name for field in [*IDENTITY, *COUNTS, *FAILURE]}  # columns without which nothing can be counted


@dataclass
class Finding:
    """What one shard's objects hold."""

    rows: int = 0
    answers: int = 0
    lost: int = 0  # input rows that the output doesn't have
    repeated: int = 0  # rows that the output has again, or that no input row explains
    compared: int = 0  # rows whose columns were compared with the input
    changed: int = 0  # values that aren't the input's
    problems: list[str] = field(default_factory=list)


class Place(Protocol):
    """Where one part of a shard is: in an object of its own, or among others' rows in a compacted one."""

    @property
    def uri(self) -> str:
        """The object."""

    @property
    def place(self) -> tuple[int, int] | None:
        """The shard and the part that should be there."""

    def receipt(self) -> Receipt:
        """Raises StorageError."""

    def read(self, columns: list[str]) -> pa.Table:
        """Its rows. Raises StorageError."""


def audit(
    plan: Plan, task: TaskConfig, shard: Shard, places: Mapping[int, Place], empty: str | None, values: bool
) -> Finding:
    """Count a shard's rows in the input and in its data objects, and compare their columns if `values` are asked for.

    `places`: of its parts; `empty`: the object that says it has no rows. Memory holds one part and a block.
    """
    finding, own = Finding(), []
    chosen = _chosen(plan)
    compared = Comparison(input_columns(schema_from_text(plan.schema), task).names, chosen, values)

    def committed() -> Iterator[tuple[str, pa.Table]]:
        for number in sorted(places):
            table, receipt = _part(places[number], plan, finding)
            if receipt is not None:
                own.append(receipt)
            if table is not None:
                yield places[number].uri, table

    wanted = (lambda name: chosen(name) or name in plan.columns) if values else None
    damage = _pair(originals(plan, shard, wanted), committed(), compared)
    finding.compared, finding.changed = compared.rows, compared.changed
    finding.lost = sum(n for n in compared.missing.values() if n > 0)
    finding.repeated = -sum(n for n in compared.missing.values() if n < 0)
    finding.problems += compared.examples
    if not places and empty:
        own.append(receipts.read(empty))
    if damage and not any(r.quarantined for r in own):
        finding.problems.append(damage)
    numbers, lasts = [r.part for r in own], [r.last for r in own]
    if numbers != list(range(len(numbers))) or lasts[-1:] != [True]:
        finding.problems.append(f"shard {shard.index} isn't committed whole; the same job goes on with it")
    return finding


def _chosen(plan: Plan) -> Callable[[str], bool]:
    """Whether a column of the input was asked for."""
    of_input, of_output, *_ = json.loads(plan.ingredients["columns"])
    asked = of_input if of_output is None else of_output
    return lambda name: asked is None or name in asked


def _pair(blocks: Iterator[Block], objects: Iterator[tuple[str, pa.Table]], compared: Comparison) -> str:
    """Go through input and output side by side; returns why the input can't be read on, if it can't."""
    uri, left = "", None  # a data object, and those of its rows that are to come
    try:
        for block in blocks:
            while block.ids:
                if left is None or not left.num_rows:
                    uri, left = next(objects, ("", None))
                if left is None:
                    compared.add_input(block)
                    break
                rows = min(len(block.ids), left.num_rows)
                compared.add(block.cut(0, rows), uri, left.slice(0, rows))
                block, left = block.cut(rows, len(block.ids)), left.slice(rows)
        damage = ""
    except InputError as error:
        damage = str(error)
    if left is not None:
        compared.add_output(uri, left)
    for uri, table in objects:
        compared.add_output(uri, table)
    return damage


def _part(place: Place, plan: Plan, finding: Finding) -> tuple[pa.Table | None, Receipt | None]:
    """One part's rows, and its receipt if that tells of what is in it."""
    schema, uri = schema_from_text(plan.schema), place.uri
    try:
        receipt = place.receipt()
        table = place.read(schema.names)
    except BatchqError as error:
        finding.problems.append(str(error))
        return None, None
    if strange := [
        f.name for f in schema if f.name not in table.schema.names or table.schema.field(f.name).type != f.type
    ]:
        finding.problems.append(f"{uri}: column {strange[0]} is missing or of another type than was planned")
    if not set(table.schema.names) >= OURS:
        return None, receipt
    errors = table.column("batchq_error").to_pylist()
    tokens = {k: table.column(f"batchq_{k}_tokens").to_pylist() for k in ("prompt", "cached", "output")}
    answered = [count is not None for count in tokens["prompt"]]
    finding.rows += table.num_rows
    finding.answers += sum(answered)
    said = receipt.usage
    counted = dataclasses.replace(  # what the model made of gold and of its answers stands as it is said
        said,
        rows=table.num_rows,
        answers=sum(answered),
        failures=sum(e is not None for e in errors),
        prompt_tokens=sum(n or 0 for n in tokens["prompt"]),
        cached_tokens=sum(n or 0 for n in tokens["cached"]),
        output_tokens=sum(n or 0 for n in tokens["output"]),
    )
    if counted != said or dict(Counter(e for e in errors if e is not None)) != receipt.failures:
        finding.problems.append(f"{uri}: holds other rows than its receipt says")
    if receipt.fingerprint != plan.fingerprint:
        finding.problems.append(f"{uri}: belongs to another run")
    if (receipt.shard, receipt.part) != place.place:
        finding.problems.append(f"{uri}: has a name that isn't its own")
    if any(a == (e is not None) for a, e in zip(answered, errors, strict=True)):
        finding.problems.append(f"{uri}: has a row that is neither an answer nor a failure")
    return table, receipt
