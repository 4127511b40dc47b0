"""The Arrow schema of an input's columns, and which objects can't be read from their beginning."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

from batchq import storage
from batchq.errors import AccessDenied, InputError
from batchq.input.delimited import csv_table
from batchq.input.formats import appearance, opened, readable, require, splittable
from batchq.input.rows import read_rows
from batchq.input.sizes import take
from batchq.input.tables import arrow_reader
from batchq.records import InputObject, Range, Row

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLED_OBJECTS = 8
HEAD_BYTES = 4 * 1024 * 1024  # of the rows that are looked at in an object
OPENED_AT_ONCE = 16  # objects, when each is looked at


def infer_schema(
    objects: list[InputObject], format: str, columns: list[str] | None, sample_rows: int = 1000
) -> pa.Schema:
    """One Arrow schema for the input's columns, all of them or those asked for.

    Parquet and datasets: the first object's own, dictionaries decoded. CSV: strings. Text: one column `text`. JSONL:
    from about `sample_rows` rows at the heads of several objects; a column that is always null, of several types, or
    nested is a string, which holds the JSON text (`as_text`); integers among floats are floats. Raises InputError for
    a column that isn't there, an empty input, or rows that can't be read at all.
    """
    import pyarrow as pa

    if format in ("parquet", "dataset"):
        fields = _file_fields(objects, format)
    elif format == "jsonl":
        sample = _sample(objects, format, sample_rows)
        if sample and all(row.error for row in sample):
            raise _none(objects, format, sample)
        fields = _json_fields(sample)
    else:
        header = ["text"] if format == "text" else _one_header(_spread(objects))
        if not any(_head(each, format, 1) for each in objects):
            raise _empty()
        fields = {name: pa.string() for name in header}
    if columns is not None:
        require(columns, list(fields), "input.columns")
    return pa.schema([(name, fields[name]) for name in columns or fields])


def as_text(value: Any) -> str:
    """What a string column holds of a value: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def unreadable(objects: list[InputObject], format: str) -> dict[str, str]:
    """Objects whose very beginning can't be read, by name: why. Damage further on shows when it is reached."""

    def why(obj: InputObject) -> str:
        try:
            if format in ("parquet", "dataset"):
                _file_fields([obj], format, may_be_empty=True)
            else:
                _head(obj, format, 1)
        except (InputError, AccessDenied) as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(OPENED_AT_ONCE) as threads:
        reasons = zip(objects, threads.map(why, objects), strict=True)
        return {obj.name: reason for obj, reason in reasons if reason}


def _spread(objects: list[InputObject]) -> list[InputObject]:
    """A few objects, from the first to the last."""
    count = min(len(objects), SAMPLED_OBJECTS)
    return [objects[index * (len(objects) - 1) // max(1, count - 1)] for index in range(count)]


def _head(obj: InputObject, format: str, count: int) -> list[Row]:
    return take(read_rows(obj, format, Range(splittable(obj.name, format)), columns=None), count, HEAD_BYTES)[0]


def _sample(objects: list[InputObject], format: str, count: int) -> list[Row]:
    chosen = _spread(objects)
    sample = [row for obj in chosen for row in _head(obj, format, -(-count // len(chosen)))]
    # the few that were looked at may be blank; rows of any object will do
    return sample or next(filter(None, (_head(obj, format, count) for obj in objects)), [])


def _none(objects: list[InputObject], format: str, sample: list[Row]) -> InputError:
    """The error of an input in which no row can be read: what is seen, and what its first file looks like."""
    codes = Counter(row.error[0] for row in sample if row.error).most_common()
    seen = ", ".join(f"{code} {count}" for code, count in codes)
    first = next(obj for obj in objects if sample[0].id.startswith(obj.name))
    other = appearance(first)
    where = f"{first.uri}: none of the first {len(sample)} rows is {format} ({seen})"
    return InputError(f"{where}; it looks like {other}" if other else f"{where}; is input.format right?")


def _json_fields(sample: list[Row]) -> dict[str, pa.DataType]:
    if not sample:
        raise _empty()
    import pyarrow as pa

    fields: dict[str, pa.DataType] = {}
    for row in sample:
        for name, value in row.columns.items():
            fields[name] = _merged(fields.get(name, pa.null()), _type_of(value))
    return {name: pa.string() if _has_null(type) else type for name, type in fields.items()}


def _type_of(value: Any) -> pa.DataType:
    import pyarrow as pa

    if value is None:
        return pa.null()
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        return pa.int64() if -(2**63) <= value < 2**63 else pa.string()
    if isinstance(value, float):
        return pa.float64()
    if not isinstance(value, list) or any(isinstance(each, (list, dict)) for each in value):
        return pa.string()
    inner = pa.null()
    for each in value:
        inner = _merged(inner, _type_of(each))
    mixed = pa.types.is_string(inner) and not all(each is None or isinstance(each, str) for each in value)
    return pa.string() if mixed else pa.list_(inner)


def _merged(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """A type that holds values of both: JSON text where nothing better does."""
    import pyarrow as pa

    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if {one, other} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = _merged(one.value_type, other.value_type)
        if not pa.types.is_string(inner) or {one.value_type, other.value_type} <= {pa.string(), pa.null()}:
            return pa.list_(inner)
    return pa.string()


def _has_null(type: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_null(type) or (pa.types.is_list(type) and pa.types.is_null(type.value_type)))


def _file_fields(objects: list[InputObject], format: str, may_be_empty: bool = False) -> dict[str, pa.DataType]:
    import pyarrow.parquet as pq

    schema = None
    for obj in objects:
        with readable(obj, format), storage.open_read(obj.uri, etag=obj.etag) as file:
            if format == "parquet":
                parquet = pq.ParquetFile(file)
                own, rows = parquet.schema_arrow, parquet.metadata.num_rows
            else:
                reader = arrow_reader(obj, file)
                own, rows = reader.schema, sum(1 for batch in islice(reader, 1) if batch.num_rows)
        if schema is None:
            schema = own
        if rows:
            return {field.name: _plain(field.type) for field in schema}
    if may_be_empty:
        return {}
    raise _empty()


def _plain(type: pa.DataType) -> pa.DataType:
    """The type of the values themselves: dictionaries and run lengths decoded, extensions as they are stored."""
    import pyarrow as pa

    if isinstance(type, pa.BaseExtensionType):
        return _plain(type.storage_type)
    if pa.types.is_dictionary(type) or pa.types.is_run_end_encoded(type):
        return _plain(type.value_type)
    if pa.types.is_list(type) or pa.types.is_large_list(type):
        return pa.list_(_plain(type.value_type))
    if pa.types.is_struct(type):
        return pa.struct([(field.name, _plain(field.type)) for field in type])
    return type


def _one_header(objects: list[InputObject]) -> list[str]:
    first: list[str] = []
    for obj in objects:
        with readable(obj, "csv"), opened(obj) as file:
            header, _ = csv_table(obj, file)
        first = first or header
        if header and sorted(header) != sorted(first):
            raise InputError(f"{obj.name}: has other columns than {objects[0].name}; label them apart")
    return first


def _empty() -> InputError:
    return InputError("the input is empty: not one row in it")
