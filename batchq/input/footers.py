"""What the files of a table say of themselves: their columns, and how many rows their row groups have.

Each footer is read once, by OPENED_AT_ONCE threads, and what is wanted of it is remembered. 100,000 files with one row
group each take 40 MB, since files with the same columns share one schema.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from batchq import storage
from batchq.errors import InputError
from batchq.input.formats import readable, require
from batchq.input.tables import INT96_UNIT, arrow_reader
from batchq.input.types import column_type
from batchq.records import InputObject

OPENED_AT_ONCE = 16  # objects, when each is looked at
EXACT = 2**53  # whole numbers up to this one are all floats


class Footer(NamedTuple):
    """A Parquet file's columns, and the rows and bytes, not compressed, of its row groups."""

    schema: pa.Schema
    groups: tuple[tuple[int, int], ...]


@functools.lru_cache(maxsize=1 << 17)
def footer(obj: InputObject) -> Footer:
    with storage.open_read(obj.uri, etag=obj.etag) as file:
        parquet = pq.ParquetFile(file, coerce_int96_timestamp_unit=INT96_UNIT)
        groups = (parquet.metadata.row_group(index) for index in range(parquet.num_row_groups))
        sizes = tuple((group.num_rows, group.total_byte_size) for group in groups)
        return Footer(_shared(parquet.schema_arrow.remove_metadata().serialize().to_pybytes()), sizes)


def row_groups(obj: InputObject, format: str) -> Sequence[tuple[int, int]]:
    """Rows and bytes, not compressed, of each row group of a Parquet file or each batch of a dataset."""
    if format == "parquet":
        return footer(obj).groups
    with storage.open_read(obj.uri, etag=obj.etag) as file:
        return [(batch.num_rows, batch.nbytes) for batch in arrow_reader(obj, file)]


@functools.lru_cache(maxsize=1024)
def _shared(serialized: bytes) -> pa.Schema:
    """The schema itself: one object for all files that have it."""
    return pa.ipc.read_schema(pa.py_buffer(serialized))


def table_head(obj: InputObject, format: str) -> tuple[pa.Schema, bool]:
    """A table's columns, and whether it has rows. Raises InputError if it can't be read or names a column twice."""
    with readable(obj, format):
        if format == "parquet":
            schema, rows = footer(obj).schema, any(rows for rows, _ in footer(obj).groups)
        else:
            with storage.open_read(obj.uri, etag=obj.etag) as file:
                reader = arrow_reader(obj, file)
                schema = _shared(reader.schema.remove_metadata().serialize().to_pybytes())
                rows = any(batch.num_rows for batch in islice(reader, 1))
    if repeated := [name for name, count in Counter(schema.names).items() if count > 1]:
        raise InputError(f"{obj.uri}: has more than one column {repeated[0]}")
    return schema, rows


def table_fields(objects: list[InputObject], format: str, required: Iterable[str]) -> dict[str, pa.Field]:
    """The columns of all files that have rows, each with the type that holds the values of all.

    Raises InputError as `table_head`, for a file that lacks a required column which another has, or without any rows.
    """
    distinct: dict[int, tuple[pa.Schema, str]] = {}  # with the name of a file that has it
    with ThreadPoolExecutor(OPENED_AT_ONCE) as threads:
        heads = threads.map(functools.partial(table_head, format=format), objects)
        for obj, (schema, rows) in zip(objects, heads, strict=True):
            if rows:
                distinct.setdefault(id(schema), (schema, obj.name))
    if not distinct:
        raise InputError("the input is empty: not one row in it")
    fields: dict[str, list[pa.Field]] = {}
    for schema, _ in distinct.values():
        for field in schema:
            fields.setdefault(field.name, []).append(field)
    for schema, name in distinct.values():
        require([each for each in required if each in fields], schema.names, name)
    made = {name: _united(name, those) for name, those in fields.items()}
    mixed = {name for name, field in made.items() if _may_round([f.type for f in fields[name]], field.type)}
    for name in _beyond_floats(objects, mixed) if format == "parquet" and mixed else ():
        made[name] = pa.field(name, pa.string())
    return made


def _united(name: str, fields: list[pa.Field]) -> pa.Field:
    # An extension that isn't known here is its stored type, and is named in the field's metadata.
    known = [{k: v for k, v in (f.metadata or {}).items() if k.startswith(b"ARROW:extension")} for f in fields]
    metadata = known[0] if all(each == known[0] for each in known) else {}
    return pa.field(name, column_type(field.type for field in fields), metadata=metadata or None)


def _may_round(types: list[pa.DataType], whole: pa.DataType) -> bool:
    return bool(pa.types.is_float64(whole) and any(t in (pa.int64(), pa.uint64()) for t in types))


def _beyond_floats(objects: list[InputObject], names: set[str]) -> set[str]:
    """Those columns in which a whole number is too large for a float, by the footers' statistics. Only where there are
    both: the footers are read again."""

    def beyond(obj: InputObject) -> set[str]:
        with readable(obj, "parquet"), storage.open_read(obj.uri, etag=obj.etag) as file:
            metadata = pq.read_metadata(file)
        found = set()
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema in names and column.physical_type == "INT64":
                    limits = column.statistics if column.is_stats_set else None
                    if limits is not None and limits.has_min_max and max(-limits.min, limits.max) > EXACT:
                        found.add(column.path_in_schema)
        return found

    with ThreadPoolExecutor(OPENED_AT_ONCE) as threads:
        return {name for some in threads.map(beyond, objects) for name in some}
