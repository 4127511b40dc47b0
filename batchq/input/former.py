"""CSV and TSV as they were read before there were dialects, for plans that were stored then: by Python's csv module,
a comma or by its name a tab between fields, UTF-8."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from typing import BinaryIO

from batchq.input import broken
from batchq.input.formats import base
from batchq.input.lines import lines_of
from batchq.records import InputObject

Fields = list[str | None]  # null is what a database's \\N means
Record = tuple[Fields, str, tuple[str, str] | None]  # fields, raw text, error


def former_records(obj: InputObject, file: BinaryIO) -> Iterator[Record]:
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
            values: list[str] | None = next(records, None)
            if ended and raw:  # the reader asks for another line only inside quotes
                problem = problem or ("invalid_csv", "a quote is not closed before the end of the file")
        except csv.Error as error:
            too_long = "field limit" in str(error)
            values, problem = [], broken.TOO_LONG if too_long else ("invalid_csv", "its quotes or line ends are broken")
        if values is None:
            return
        if problem or any(map(str.strip, values)) or len(values) > 1 or "".join(raw).strip():
            yield [*values], "".join(raw).removesuffix("\n").removesuffix("\r"), problem
        raw.clear()
        problem = None
