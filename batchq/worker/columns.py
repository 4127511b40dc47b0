"""Rows -> their columns in Arrow, under the plan's schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from batchq import input
from batchq.config import TaskConfig
from batchq.output.schema import EXTRA, input_columns
from batchq.records import Answer, Failure, Row

_TEXT = frozenset({str, type(None)})  # anything else in a column planned as text is written as JSON


class Columns:
    """The input's columns that come along, by the schema that a plan has fixed."""

    def __init__(self, schema: pa.Schema, task: TaskConfig) -> None:
        """`schema`: that of every output object."""
        self.schema = input_columns(schema, task)
        self.extra = EXTRA.name in schema.names  # whether keys that no column has are kept

    def of(self, rows: Sequence[Row]) -> tuple[pa.RecordBatch, list[Answer | Failure | None]]:
        """The rows' columns under the frozen schema; a row whose value won't cast fails, its columns null."""
        outcomes: list[Answer | Failure | None] = [Failure(*row.error) if row.error else None for row in rows]
        arrays: dict[str, pa.Array] = {}
        values: dict[str, list[Any]] = {}
        for column in self.schema:
            name = column.name
            raw = [row.columns.get(name) for row in rows]
            if pa.types.is_string(column.type) and not _TEXT.issuperset(map(type, raw)):
                raw = [value if value is None else input.as_text(value) for value in raw]
            values[name] = raw
            try:
                arrays[name] = pa.array(raw, column.type)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError, ValueError, TypeError):
                for i, value in enumerate(raw):
                    if not _casts(value, column.type):
                        outcomes[i] = Failure("schema", f"column {name}: not {column.type}")
        failed = [isinstance(o, Failure) for o in outcomes]
        for column in self.schema:
            if column.name not in arrays:
                cleared = [None if f else v for v, f in zip(values[column.name], failed, strict=True)]
                arrays[column.name] = pa.array(cleared, column.type)
        if self.extra:
            known = set(self.schema.names)
            extras = [
                None if row.columns.keys() <= known else {k: v for k, v in row.columns.items() if k not in known}
                for row in rows
            ]
            texts = [None if e is None else json.dumps(e, ensure_ascii=False) for e in extras]
            arrays[EXTRA.name] = pa.array(texts, pa.string())
        if not arrays:
            return pa.RecordBatch.from_pylist([{} for _ in rows], schema=pa.schema([])), outcomes
        return pa.RecordBatch.from_pydict(arrays), outcomes


def raw_of(row: Row) -> str | None:
    """A failed row's text, so that nothing is lost: as it was, or its columns as JSON."""
    if row.raw is not None:
        return row.raw
    return json.dumps(row.columns, ensure_ascii=False, default=str) if row.columns else None


def _casts(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([value], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError, ValueError, TypeError):
        return False
    return True
