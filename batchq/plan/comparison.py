"""The user's columns in the output against the same rows of the input, value by value."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pyarrow as pa

from batchq.input.originals import Block
from batchq.output.schema import EXTRA
from batchq.plan.values import in_text_column, plain, same, same_as_text

SHOWN = 10  # changed values that are told one by one, of each shard
LEFT_OUT = {"line_too_long", "row_too_long"}  # failures of rows that no part could hold: their columns are null
HELD = 20_000  # rows whose other side hasn't come yet; those beyond aren't compared


@dataclass
class Comparison:
    """One shard's.

    `columns`: the user's, of the output. `chosen`: whether a column that the input has belongs into the output. With
    `values` false, rows are counted by their ids and no more.
    """

    columns: list[str]
    chosen: Callable[[str], bool]
    values: bool
    rows: int = 0  # compared
    changed: int = 0  # values
    examples: list[str] = field(default_factory=list)
    # Rows whose other side hasn't come: once more in the input than in the output, or, below zero, the other way round.
    missing: Counter[str] = field(default_factory=Counter)
    _inputs: dict[str, Block] = field(default_factory=dict)
    _outputs: dict[str, tuple[str, pa.Table]] = field(default_factory=dict)

    def add(self, block: Block, uri: str, table: pa.Table) -> None:
        """As many rows of the input as of a data object. Those that aren't in step wait for their other side."""
        if table.column("batchq_id").to_pylist() != block.ids:
            self.add_input(block)
            self.add_output(uri, table)
        elif self.values:
            self._compare(block, uri, table)

    def add_input(self, block: Block) -> None:
        self.missing.update(block.ids)
        for index, id in enumerate(block.ids if self.values else ()):
            row = block.cut(index, index + 1)
            if found := self._outputs.pop(id, None):
                self._compare(row, *found)
            elif len(self._inputs) < HELD:
                self._inputs[id] = row

    def add_output(self, uri: str, table: pa.Table) -> None:
        ids = table.column("batchq_id").to_pylist()
        self.missing.subtract(ids)
        for index, id in enumerate(ids if self.values else ()):
            row = table.slice(index, 1)
            if found := self._inputs.pop(id, None):
                self._compare(found, uri, row)
            elif len(self._outputs) < HELD:
                self._outputs[id] = uri, row

    def _compare(self, block: Block, uri: str, table: pa.Table) -> None:
        self.rows += len(block.ids)
        was = cache(lambda name: _plain(block.columns.get(name), len(block.ids)))
        now = cache(lambda name: _plain(table.column(name) if name in table.column_names else None, len(block.ids)))
        beside: dict[int, dict[str, Any]] = {}  # by row: columns that are kept as JSON
        for place in (EXTRA.name, "batchq_raw"):
            for index, text in enumerate(now(place)):
                if index in block.texts:
                    if place == "batchq_raw" and (text != block.texts[index] or now("batchq_error")[index] is None):
                        self._tell(uri, block.ids[index], place)
                elif text is not None:
                    kept = _object(text)
                    beside.setdefault(index, {}).update(kept)
                    if not kept or not all(same_as_text(was(name)[index], kept[name]) for name in kept):
                        self._tell(uri, block.ids[index], place)
        for name in dict.fromkeys([*block.columns, *self.columns]):
            if name in block.columns and not self.chosen(name):
                continue
            if name in table.column_names and _equal(block.columns.get(name), table.column(name)):
                continue
            for index, (one, other) in enumerate(zip(was(name), now(name), strict=True)):
                left_out = other is None and now("batchq_error")[index] in LEFT_OUT
                if not (left_out or same(one, other) or _held(one, other, name, beside.get(index, {}))):
                    self._tell(uri, block.ids[index], name)

    def _tell(self, uri: str, row: str, column: str) -> None:
        self.changed += 1
        if len(self.examples) < SHOWN:
            self.examples.append(f"{uri}: row {row}, column {column}: isn't what the input has")


def _held(one: Any, other: Any, name: str, beside: dict[str, Any]) -> bool:
    """Whether a value is kept though the column doesn't have it: as text there, or in JSON beside an empty column."""
    return name in beside if other is None else isinstance(other, str) and in_text_column(one, other)


def _plain(values: pa.Array | pa.ChunkedArray | list[Any] | None, rows: int) -> list[Any]:
    if values is None:
        return [None] * rows
    return values if isinstance(values, list) else plain(values)


def _equal(before: pa.Array | list[Any] | None, after: pa.ChunkedArray) -> bool:
    """Whether all values are equal, at Arrow's speed or a list's; False isn't the last word."""
    if isinstance(before, pa.Array):
        return before.type == after.type and bool(after.equals(pa.chunked_array([before])))
    if before is None or after.type.num_fields:
        return before is None and after.null_count == len(after)
    now = plain(after)
    return before == now and list(map(type, before)) == list(map(type, now))  # True == 1


def _object(text: str) -> dict[str, Any]:
    """The columns that JSON text holds; none if it is damaged."""
    try:
        kept = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) else {}
