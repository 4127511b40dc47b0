"""One range of an input object -> its rows, whatever the format."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from batchq import failpoint
from batchq.read.delimited import csv_rows
from batchq.read.formats import opened, readable
from batchq.read.lines import json_rows, lines_of, numbered, text_rows
from batchq.read.tables import table_rows
from batchq.records import InputObject, Row


def read_rows(
    obj: InputObject,
    format: str,
    unit: str,
    start: int,
    stop: int,
    *,
    columns: list[str] | None,
    skip_until: int = 0,
) -> Iterator[Row]:
    """The rows of one range, in order, beginning with the first whose position is at least `skip_until`.

    A byte range has the rows whose first byte lies in [start, stop), with id name@offset; otherwise the id is
    name:ordinal. Blank lines are no rows. `columns` null reads all; a JSON object's absent ones are None.

    Error codes: invalid_json, not_an_object, invalid_unicode, invalid_utf8, csv_columns, invalid_csv, line_too_long,
    invalid_value (of a table). Raises InputError, naming the object, if it is damaged or lacks a column.
    """
    failpoint.reach("read.rows.before")
    with readable(obj, format):
        if format in ("parquet", "dataset"):
            begin, end = (start, stop) if unit == "rows" else (0, sys.maxsize)
            yield from table_rows(obj, format, max(begin, skip_until), end, columns)
            return
        with opened(obj) as file:
            if format == "csv":
                yield from csv_rows(obj, file, columns, skip_until)
                return
            if unit == "bytes":
                lines, prefix = lines_of(obj, file, max(start, skip_until), stop), f"{obj.name}@"
            else:
                lines, prefix = numbered(lines_of(obj, file, 0, sys.maxsize), skip_until), f"{obj.name}:"
            yield from json_rows(lines, prefix, columns) if format == "jsonl" else text_rows(lines, prefix)
