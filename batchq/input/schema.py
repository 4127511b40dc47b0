"""The Arrow schema of an input's columns, and which objects can't be read from their beginning."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pyarrow as pa

from batchq.errors import AccessDenied, InputError
from batchq.input.delimited import csv_table
from batchq.input.footers import EXACT, OPENED_AT_ONCE, table_fields, table_head
from batchq.input.formats import BLOCK, TABLES, appearance, opened, readable, require, splittable
from batchq.input.lines import TAIL
from batchq.input.partitions import partition_types
from batchq.input.rows import read_rows
from batchq.input.sizes import take
from batchq.input.types import column_type
from batchq.records import InputObject, Range, Row

HEAD_BYTES = 4 * 1024 * 1024  # of the rows that are looked at in one place
SAMPLED = 256  # places in the corpus, each a file's beginning or somewhere in it
SAMPLED_AT_ONCE = 4  # of them; each may have a row of 64 MiB


def infer_schema(
    objects: list[InputObject],
    format: str,
    columns: list[str] | None,
    required: Iterable[str] = (),
    sample_rows: int = 1000,
    partitions: Mapping[str, str] | None = None,
) -> pa.Schema:
    """One Arrow schema for the input's columns, all of them or those asked for; `types` has the rule that unites them.

    Parquet: of all files, by their footers. Datasets: of all files, by their beginnings. CSV: strings. Text: one column
    `text`. JSONL: of about `sample_rows` rows at SAMPLED places; a column that is always null, or holds objects or
    lists of lists, is a string, which holds the JSON text (`as_text`). Last, what folders named key=value say, with the
    types of `partitions`, if these are known.

    Raises InputError for a column that isn't there, a table without a `required` one, an empty input, or rows that
    can't be read at all.
    """
    if partitions is None:
        partitions = partition_types(each.name for each in objects)
    if format in TABLES:
        fields = table_fields(objects, format, set(required) - partitions.keys())
    elif format == "jsonl":
        sample = _sample(objects, format, sample_rows)
        if sample and all(row.error for row in sample):
            raise _none(objects, format, sample)
        fields = _json_fields(sample)
    elif format in ("csv", "text"):
        header = ["text"] if format == "text" else _one_header(objects)
        if not any(_head(each, format, 1) for each in objects):
            raise _empty()
        fields = {name: pa.field(name, pa.string()) for name in header}
    else:
        raise AssertionError(f"nothing says what columns {format} has")
    for name, type in partitions.items():
        own = [fields[name].type] if name in fields else []
        fields[name] = pa.field(name, column_type([*own, pa.type_for_alias(type)]))
    if columns is not None:
        require(columns, list(fields), "input.columns")
    return pa.schema([fields[name] for name in columns or fields])


def as_text(value: Any) -> str:
    """What a string column holds of a value: a string as it is, what JSON has as JSON, the rest in its usual form: a
    date as 2026-01-31, bytes in base64."""
    if isinstance(value, str):
        return value
    return to_json(value) if isinstance(value, bool | int | float | list | tuple | dict) else _plain(value)


def to_json(value: Any) -> str:
    """JSON text; in it too, what JSON hasn't is in its usual form."""
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def unreadable(objects: list[InputObject], format: str, required: Iterable[str] = ()) -> dict[str, str]:
    """Objects that can't be read from their very beginning, or are tables that lack a `required` column which others
    have, by name: why. Damage further on shows when it is reached."""

    def look(obj: InputObject) -> list[str] | str:
        try:
            if format in TABLES:
                schema, rows = table_head(obj, format)
                return list(schema.names) if rows else []
            _head(obj, format, 1)
        except (InputError, AccessDenied) as error:
            return str(error)
        return []

    with ThreadPoolExecutor(OPENED_AT_ONCE) as threads:
        found = dict(zip([obj.name for obj in objects], threads.map(look, objects), strict=True))
    known = {name for columns in found.values() if isinstance(columns, list) for name in columns}
    wanted, reasons = known.intersection(required), {}
    for name, columns in found.items():
        try:
            if columns and isinstance(columns, list):
                require(wanted, columns, name)
        except InputError as error:
            columns = str(error)
        if isinstance(columns, str):
            reasons[name] = columns
    return reasons


def _spread(objects: list[InputObject]) -> list[InputObject]:
    """Objects from the first to the last, SAMPLED at most."""
    count = min(len(objects), SAMPLED)
    return [objects[index * (len(objects) - 1) // max(1, count - 1)] for index in range(count)]


def _head(obj: InputObject, format: str, count: int) -> list[Row]:
    return take(read_rows(obj, format, Range(splittable(obj.name, format)), columns=None), count, HEAD_BYTES)[0]


def _sample(objects: list[InputObject], format: str, count: int) -> list[Row]:
    """Rows all over the corpus, each value's type in its place: what is a number in a file's first rows may be none in
    its last."""
    chosen = _spread(objects)
    places = [place for obj in chosen for place in _places(obj, format, SAMPLED // len(chosen))]
    each = max(4, -(-count // len(places)))
    window = max(
        TAIL, 4 * BLOCK // len(places)
    )  # bytes, so that 16 MiB are read in all, and a row's rest at each place

    def typed(rows: Iterable[Row]) -> list[Row]:
        return [Row(r.id, r.position, {k: _type_of(v) for k, v in r.columns.items()}, r.error) for r in rows]

    def look(place: tuple[InputObject, Range]) -> list[Row]:
        obj, range = place
        if range.unit == "bytes":
            range = Range("bytes", range.start, min(range.stop, range.start + window))
        return typed(take(read_rows(obj, format, range, columns=None), each, HEAD_BYTES)[0])

    with ThreadPoolExecutor(SAMPLED_AT_ONCE) as threads:
        sample = [row for some in threads.map(look, places) for row in some]
    # the few that were looked at may be blank; rows of any object will do
    return sample or next(filter(None, (typed(_head(obj, format, count)) for obj in objects)), [])


def _places(obj: InputObject, format: str, most: int) -> list[tuple[InputObject, Range]]:
    """Ranges to take the first rows of: one for each BLOCK of an object that can be entered anywhere."""
    unit = splittable(obj.name, format)
    if unit != "bytes":
        return [(obj, Range(unit))]
    count = max(1, min(most, obj.size // BLOCK))
    cuts = [obj.size * cut // count for cut in range(count + 1)]
    return [(obj, Range("bytes", start, stop)) for start, stop in pairwise(cuts)]


def _none(objects: list[InputObject], format: str, sample: list[Row]) -> InputError:
    """The error of an input in which no row can be read: what is seen, and what its first file looks like."""
    codes = Counter(row.error[0] for row in sample if row.error).most_common()
    seen = ", ".join(f"{code} {count}" for code, count in codes)
    first = next(obj for obj in objects if sample[0].id.startswith(obj.name))
    other = appearance(first)
    where = f"{first.uri}: none of the first {len(sample)} rows is {format} ({seen})"
    return InputError(f"{where}; it looks like {other}" if other else f"{where}; is input.format right?")


def _json_fields(sample: list[Row]) -> dict[str, pa.Field]:
    if not sample:
        raise _empty()
    types: dict[str, dict[pa.DataType, None]] = {}
    for row in sample:
        for name, type in row.columns.items():
            types.setdefault(name, {})[type] = None
    return {name: pa.field(name, _json_type(column_type(those))) for name, those in types.items()}


def _json_type(type: pa.DataType) -> pa.DataType:
    if pa.types.is_list(type):
        inner = _json_type(type.value_type)
        return pa.string() if pa.types.is_null(type.value_type) else pa.list_(inner)
    if pa.types.is_null(type):
        return pa.string()  # nothing is known of what will come
    return pa.int64() if pa.types.is_decimal(type) else type


def _type_of(value: Any) -> pa.DataType:
    """JSON's values, objects and lists of lists as their text."""
    if value is None:
        return pa.null()
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        beyond_floats = pa.decimal128(19, 0) if -(2**63) <= value < 2**63 else pa.string()
        return pa.int64() if -EXACT <= value <= EXACT else beyond_floats
    if isinstance(value, float):
        return pa.float64()
    if not isinstance(value, list) or any(isinstance(each, (list, dict)) for each in value):
        return pa.string()
    inner = column_type(dict.fromkeys(map(_type_of, value)))
    mixed = pa.types.is_string(inner) and not all(each is None or isinstance(each, str) for each in value)
    return pa.string() if mixed else pa.list_(inner)


def _one_header(objects: list[InputObject]) -> list[str]:
    first: list[str] = []
    with ThreadPoolExecutor(OPENED_AT_ONCE) as threads:
        for obj, header in zip(objects, threads.map(_header, objects), strict=True):
            first = first or header
            if header and sorted(header) != sorted(first):
                raise InputError(f"{obj.name}: has other columns than {objects[0].name}; label them apart")
    return first


def _header(obj: InputObject) -> list[str]:
    with readable(obj, "csv"), opened(obj) as file:
        return csv_table(obj, file)[0]


def _empty() -> InputError:
    return InputError("the input is empty: not one row in it")
