"""Rows -> their columns in Arrow, under the plan's schema. No value changes on its way: what a column can't hold as it
is goes to batchq_extra, under the column's name, and is null in the column.

Tables stay Arrow's from the file to the output; of text, Python's values become Arrow's here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchq import input
from batchq.config import TaskConfig
from batchq.input.types import is_binary, stored, united
from batchq.output.schema import EXTRA, input_columns, schema_from_text
from batchq.records import Answer, Failure, Plan, Row

_TEXT = frozenset({str, type(None)})  # anything else in a column planned as text is written as JSON
_NATIVE = {pa.bool_(): bool, pa.int64(): int, pa.float64(): float, pa.string(): str}
_MISFIT = (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError)

Converted = tuple[pa.Array, dict[int, Any]]  # null where a value doesn't fit; those values, by position


class Columns:
    """The input's columns that come along, by the schema that a plan has fixed."""

    def __init__(self, plan: Plan, task: TaskConfig) -> None:
        schema = schema_from_text(plan.schema)
        self.schema = input_columns(schema, task)
        self.extra = EXTRA.name in schema.names  # not in every plan of version 0.1.0
        self.unknown = self.extra and plan.unknown  # whether keys that no column has are kept

    def of(self, rows: Sequence[Row]) -> tuple[pa.RecordBatch, list[Answer | Failure | None]]:
        """The rows' columns under the frozen schema, and a failure for each row that couldn't be read."""
        outcomes: list[Answer | Failure | None] = [Failure(*row.error) if row.error else None for row in rows]
        arrays: dict[str, pa.Array] = {}
        beside: dict[int, dict[str, Any]] = {}  # by row: what goes to batchq_extra
        for column in self.schema:
            arrays[column.name], misfits = _column(rows, column)
            for i, value in misfits.items():
                beside.setdefault(i, {})[column.name] = value
        if not self.extra:
            for i, misfit in beside.items():
                outcomes[i] = Failure(
                    "schema", f"column {(name := next(iter(misfit)))}: not {self.schema.field(name).type}"
                )
        if self.unknown:
            known = set(self.schema.names)
            for i, row in enumerate(rows):
                if not row.columns.keys() <= known:
                    more = {name: value for name, value in row.columns.items() if name not in known}
                    beside.setdefault(i, {}).update(more)
        if self.extra:
            texts = [input.to_json(beside[i]) if i in beside else None for i in range(len(rows))]
            arrays[EXTRA.name] = pa.array(texts, pa.string())
        if not arrays:
            return pa.RecordBatch.from_pylist([{} for _ in rows], schema=pa.schema([])), outcomes
        return pa.RecordBatch.from_pydict(arrays), outcomes


def raw_of(row: Row) -> str | None:
    """A failed row's text, so that nothing is lost: as it was, or its columns as JSON."""
    if row.raw is not None:
        return row.raw
    if isinstance(row.columns, input.TableRow):
        batch, index = row.columns.batch, row.columns.index
        return input.to_json({name: _kept(batch.column(name)[index]) for name in batch.schema.names})
    return input.to_json(row.columns) if row.columns else None


def _column(rows: Sequence[Row], column: pa.Field) -> Converted:
    name = column.name  # which pyarrow makes anew each time
    if not isinstance(rows[0].columns, input.TableRow):
        return _of_python([row.columns.get(name) for row in rows], column.type)
    arrays: list[pa.Array] = []
    misfits: dict[int, Any] = {}
    start = 0
    for array in _pieces(rows, name):
        fitting, others = _of_arrow(array, column.type)
        arrays.append(fitting)
        misfits.update({start + i: value for i, value in others.items()})
        start += len(array)
    return arrays[0] if len(arrays) == 1 else pa.concat_arrays(arrays), misfits


def _pieces(rows: Sequence[Row], name: str) -> Iterator[pa.Array]:
    """The rows' values of one column, a piece of each batch that they were read in; they are neighbours there."""
    tables = (row.columns for row in rows if isinstance(row.columns, input.TableRow))
    for _, group in itertools.groupby(tables, key=lambda row: id(row.batch)):
        first, *others = group
        yield first.batch.column(name).slice(first.index, 1 + len(others))


# ---- tables ----


def _of_arrow(array: pa.Array, kind: pa.DataType) -> Converted:
    if pa.types.is_run_end_encoded(array.type):
        array = pc.run_end_decode(array)
    try:
        return _cast(array, kind), {}
    except _MISFIT:
        pass
    pieces: list[pa.Array] = []
    misfits: dict[int, Any] = {}
    for i in range(len(array)):
        try:
            pieces.append(_cast(array.slice(i, 1), kind))
        except _MISFIT:
            pieces.append(pa.nulls(1, kind))
            misfits[i] = _kept(array[i])
    return pa.concat_arrays(pieces), misfits


def _cast(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The same values in another type. Raises what is in _MISFIT if one of them isn't valid, or doesn't fit."""
    array.validate(full=True)
    if array.type == kind:
        return array
    if isinstance(array.type, pa.BaseExtensionType) and array.type.storage_type == kind:
        return array.storage  # as plans of version 0.1.0 had it
    plain = stored(array.type)
    if pa.types.is_string(kind) and not pa.types.is_string(plain):
        return array.cast(pa.binary()).cast(kind) if is_binary(plain) else pa.array(map(_text, array), kind)
    if united(plain, kind) != kind and array.null_count < len(array):
        raise pa.ArrowInvalid("has values that the column can't hold")
    return pc.cast(array, kind)


def _text(scalar: pa.Scalar) -> str | None:
    return input.as_text(_kept(scalar)) if scalar.is_valid else None


def _kept(scalar: pa.Scalar) -> Any:
    """The value as JSON can hold it: also one that is out of Python's range, or text that is no UTF-8."""
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.DictionaryScalar):
        return _kept(scalar.value)
    if pa.types.is_run_end_encoded(scalar.type):
        return _kept(pa.scalar(scalar.as_py(), scalar.type.value_type))
    if isinstance(scalar, pa.MapScalar):
        return [[_kept(each) for each in pair.values()] for pair in scalar.values]
    if isinstance(scalar, pa.StructScalar):
        return {name: _kept(each) for name, each in scalar.items()}
    if pa.types.is_nested(scalar.type) and not pa.types.is_union(scalar.type):
        return [_kept(each) for each in scalar.values]
    try:
        return (
            _written(scalar) if scalar.type == pa.time64("ns") else scalar.as_py()
        )  # Python's time ends with microseconds
    except UnicodeDecodeError:
        return scalar.cast(pa.binary()).as_py()
    except (ValueError, OverflowError):
        return _written(scalar)


def _written(scalar: pa.Scalar) -> str:
    """A day, moment or length of time as Arrow writes it; counted, where that has no form for it either: of a moment in
    a time zone it writes a wrong one then."""
    kind = scalar.type
    if pa.types.is_duration(kind):
        return f"{scalar.value} {kind.unit}"
    moment = pa.types.is_timestamp(kind)
    text: str = (scalar.cast(pa.timestamp(kind.unit)) if moment else scalar).cast(pa.string()).as_py()
    if text.startswith("<"):
        unit = kind.unit if moment else "ms" if pa.types.is_date64(kind) else "days"
        return f"{scalar.value} {unit} since 1970-01-01"
    return f"{text}Z" if moment and kind.tz else text


# ---- text ----


def _of_python(raw: list[Any], kind: pa.DataType) -> Converted:
    if pa.types.is_string(kind):
        if not _TEXT.issuperset(map(type, raw)):
            raw = [value if value is None else input.as_text(value) for value in raw]
        return pa.array(raw, kind), {}
    if _is_native(raw, kind):
        try:
            return pa.array(raw, kind), {}
        except OverflowError:
            pass  # an integer beyond 64 bits
    values: list[Any] = []
    misfits: dict[int, Any] = {}
    for i, value in enumerate(raw):
        try:
            values.append(_exact(value, kind))
        except (ValueError, OverflowError):
            values.append(None)
            misfits[i] = value
    return pa.array(values, kind), misfits


def _is_native(values: list[Any], kind: pa.DataType) -> bool:
    """Whether these are the Python values of that very type, which pyarrow converts or refuses, and never changes."""
    kinds = set(map(type, values)) - {type(None)}
    if pa.types.is_list(kind):
        return kinds <= {list} and _is_native(
            list(itertools.chain.from_iterable(filter(None, values))), kind.value_type
        )
    return kinds <= {_NATIVE.get(kind)}


def _exact(value: Any, kind: pa.DataType) -> Any:
    """The value in the type's own Python type. Raises ValueError or OverflowError if that would change it."""
    if value is None or type(value) is _NATIVE.get(kind):
        pass
    elif pa.types.is_list(kind) and type(value) is list:
        return [_exact(each, kind.value_type) for each in value]
    elif kind == pa.float64() and type(value) is int and int(float(value)) == value:
        return float(value)
    elif kind == pa.int64() and type(value) is float and int(value) == value and str(value) != "-0.0":
        value = int(value)
    else:
        raise ValueError("not of the column's type")
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise OverflowError("more than 64 bits")
    return value
