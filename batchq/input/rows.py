"""One range of an input object -> its rows, whatever the format."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from batchq import storage
from batchq.input.delimited import csv_rows
from batchq.input.formats import TABLES, opened, readable, splittable, unpacked
from batchq.input.lines import json_rows, lines_of, numbered, text_rows
from batchq.input.partitions import partition_values
from batchq.input.ranges import row_bytes
from batchq.input.tables import table_rows
from batchq.records import END, OBJECT, InputObject, Plan, Range, Row, Shard
from batchq.storage import failpoint

HEAD = 4 << 20  # bytes of text; their parsing takes a tenth of a second


class _Wanted(NamedTuple):
    """The columns that are read, None for all, and what those hold that an object or a row doesn't have."""

    columns: list[str] | None
    beside: Mapping[str, Any]


def rows_of(plan: Plan, shard: Shard, columns: Sequence[str] | None, skip: int = 0) -> Iterator[Row]:
    """The rows of one shard, as `read_rows`, beginning with the first whose position is at least `skip`, and with the
    columns that its object's folders give."""
    first, within = divmod(skip, OBJECT)
    for number, (object, range) in enumerate(shard.pieces[first:], first):
        obj = plan.objects[object]
        wanted = _Wanted(None if columns is None else list(columns), partition_values(obj.name, plan.partitions))
        rows = _read(obj, plan.format, range, wanted, within if number == first else 0)
        if number == 0:
            yield from rows
        else:
            yield from (dataclasses.replace(row, position=row.position + number * OBJECT) for row in rows)


def read_rows(
    obj: InputObject, format: str, range: Range, *, columns: list[str] | None, skip_until: int = 0
) -> Iterator[Row]:
    """The rows of one range, in order, beginning with the first whose position is at least `skip_until`.

    A byte range has the rows whose first byte lies in [start, stop), with id name@offset; otherwise the id is
    name:ordinal. Blank lines are no rows. `columns` null reads all; one that an object or a row doesn't have is None.

    Error codes: invalid_json, not_an_object, invalid_unicode, invalid_utf8, csv_columns, invalid_csv, line_too_long,
    row_too_long (of a table). Raises InputError, naming the object, if it is damaged, or a CSV that lacks a column.
    """
    return _read(obj, format, range, _Wanted(columns, {}), skip_until)


def _read(obj: InputObject, format: str, range: Range, wanted: _Wanted, skip_until: int) -> Iterator[Row]:
    failpoint.reach("read.rows.before")
    columns, beside = wanted
    with readable(obj, format):
        if format in TABLES:
            yield from table_rows(obj, format, Range("rows", max(range.start, skip_until), range.stop), *wanted)
            return
        with opened(obj) as file:
            for row in _rows_in(obj, file, format, range, None if beside else columns, skip_until):
                if beside and not row.error:
                    whole = {**beside, **row.columns}
                    own = whole if columns is None else {name: whole.get(name) for name in columns}
                    row = dataclasses.replace(row, columns=own)
                yield row


def rows_per_byte(obj: InputObject, format: str) -> float:
    """How many rows the object has for each byte that it takes where it is stored. Of plain text the first lines tell;
    of a CSV or a compressed file nothing but reading, of the first HEAD bytes of its text. Raises InputError as
    `read_rows`."""
    if splittable(obj.name, format) == "bytes":
        return 1 / row_bytes(obj)
    with readable(obj, format), storage.open_read(obj.uri, etag=obj.etag) as file, unpacked(obj, file) as plain:
        head, block = io.BytesIO(), b"-"
        # Decoders read ahead, bzip2's 900 kB of text: of a file that they have read to its end the rest is counted too.
        while block and head.tell() < (4 * HEAD if file.tell() >= obj.size else HEAD):
            block = plain.read(HEAD)
            head.write(block)
        size = file.tell() if block else obj.size
        head.seek(0)
        count = sum(1 for _ in _rows_in(obj, head, format, Range("stream"), None, 0))
    return count / max(1, size)


def _rows_in(
    obj: InputObject,
    file: BinaryIO,
    format: str,
    range: Range,
    columns: list[str] | None,
    skip_until: int,
) -> Iterator[Row]:
    if format == "csv":
        rows = csv_rows(obj, file, columns, skip_until)
    else:
        if range.unit == "bytes":
            lines, prefix = lines_of(obj, file, max(range.start, skip_until), range.stop), f"{obj.name}@"
        else:
            lines, prefix = numbered(lines_of(obj, file, 0, END), skip_until), f"{obj.name}:"
        if format == "jsonl":
            rows = json_rows(lines, prefix, columns)
        elif format == "text":
            rows = text_rows(lines, prefix)
        else:
            raise AssertionError(f"nothing makes rows of {format}")
    if range.unit == "stream" and range.stop != END:
        rows = itertools.takewhile(lambda row: row.position < range.stop, rows)
    yield from rows
