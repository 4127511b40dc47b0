"""CSV and TSV -> rows, by ordinal: a record may run over several lines, so it can't be found by bytes."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from batchq.errors import InputError
from batchq.input import broken
from batchq.input.formats import base, require
from batchq.input.lines import lines_of
from batchq.records import InputObject, Row

Record = tuple[list[str], str, tuple[str, str] | None]  # fields, raw text, error


def csv_rows(obj: InputObject, file: BinaryIO, columns: list[str] | None, skip_until: int) -> Iterator[Row]:
    records = csv_records(obj, file)
    header = csv_header(obj, records)
    if columns is not None:
        require(columns, header, obj.name)
    prefix = f"{obj.name}:"
    for ordinal, (values, raw, error) in enumerate(records):
        if ordinal < skip_until:
            continue
        if error is None and len(values) != len(header):
            error = "csv_columns", f"{len(values)} fields, but the header has {len(header)}"
        if error is not None:
            yield broken.row(prefix, ordinal, *error, raw)
            continue
        row = dict(zip(header, values, strict=True))
        yield Row(f"{prefix}{ordinal}", ordinal, row if columns is None else {name: row[name] for name in columns})


def csv_header(obj: InputObject, records: Iterator[Record]) -> list[str]:
    header, _, error = next(records, ([], "", None))
    if error is not None:
        raise InputError(f"{obj.uri}: its header can't be read ({error[1]})")
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        raise InputError(f"{obj.uri}: its header names the column {repeated[0]} more than once")
    return header


def csv_records(obj: InputObject, file: BinaryIO) -> Iterator[Record]:
    """Fields, raw text and error of each record that isn't blank, the header first."""
    raw: list[str] = []  # the lines of the record under way
    problem: tuple[str, str] | None = None
    ended = False

    def text() -> Iterator[str]:
        nonlocal problem, ended
        for _, line in lines_of(obj, file, 0, sys.maxsize):
            if line is None:
                problem, line = broken.TOO_LONG, b""
            try:
                decoded = line.decode()
            except UnicodeDecodeError:
                problem, decoded = broken.NOT_UTF8, line.decode(errors="replace")
            raw.append(decoded + "\n")
            yield raw[-1]
        ended = True

    csv.field_size_limit(broken.MAX_LINE)  # the library's own limit, 128 KiB, is short of a long document
    records = csv.reader(text(), delimiter="\t" if base(obj.name)[0].suffix.lower() == ".tsv" else ",")
    while True:
        try:
            values = next(records, None)
            if ended and raw:  # the reader asks for another line only inside quotes
                problem = problem or ("invalid_csv", "a quote is not closed before the end of the file")
        except csv.Error as error:
            too_long = "field limit" in str(error)
            values, problem = [], broken.TOO_LONG if too_long else ("invalid_csv", "its quotes or line ends are broken")
        if values is None:
            return
        if problem or any(map(str.strip, values)) or len(values) > 1 or "".join(raw).strip():
            yield values, "".join(raw).removesuffix("\n").removesuffix("\r"), problem
        raw.clear()
        problem = None
