"""An input's rows as its files have them, for whoever checks what became of them.

On purpose not by the code that reads rows to be labelled: by pyarrow's own arrays, readline, json and csv.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from urllib.parse import unquote

from batchq import storage
from batchq.input import broken
from batchq.input.delimited import csv_table
from batchq.input.formats import TABLES, base, opened, readable
from batchq.input.former import Fields
from batchq.records import Dialect, InputObject, Plan, Range, Shard

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1024  # of a block at most
BYTES = 16 << 20  # of text in a block, about


@dataclass(slots=True)
class Block:
    """Some rows of one object, in order.

    `columns` has what the file has, by name: Arrow arrays, or lists of plain values. `texts` has the rows that can't be
    parsed, by index, and what they are made of as far as it can be decoded; their columns are null.
    """

    ids: list[str]
    columns: dict[str, Any] = field(default_factory=dict)
    texts: dict[int, str | None] = field(default_factory=dict)

    def cut(self, start: int, stop: int) -> Block:
        columns = {name: values[start:stop] for name, values in self.columns.items()}
        return Block(
            self.ids[start:stop], columns, {i - start: text for i, text in self.texts.items() if start <= i < stop}
        )


class Parsed(NamedTuple):
    position: int
    size: int  # bytes, about
    columns: dict[str, Any] | None  # None if it can't be parsed
    text: str | None = None


Lines = Iterator[tuple[int, bytes | None]]  # a line's position and bytes; None if it is too long
Batches = Iterator[tuple[int, int, "pa.RecordBatch | None"]]  # a batch's first ordinal, its rows, and it if it was read


def originals(plan: Plan, shard: Shard, columns: Callable[[str], bool] | None) -> Iterator[Block]:
    """A shard's rows in blocks, with the columns that are asked for: of text all, that costs nothing. None: the ids
    alone, and no more is parsed than it takes to count them.

    Raises InputError, after the rows before it, where the object can't be read on.
    """
    for object, wanted in shard.pieces:
        yield from _of_object(plan, plan.objects[object], wanted, columns)


def _of_object(plan: Plan, obj: InputObject, wanted: Range, columns: Callable[[str], bool] | None) -> Iterator[Block]:
    folders = _folders(plan, obj.name) if columns else {}
    with readable(obj, plan.format):
        if plan.format in TABLES:
            with storage.open_read(obj.uri, etag=obj.etag) as file:
                tables = _parquet(file, wanted, columns) if plan.format == "parquet" else _arrow(obj, file, columns)
                yield from _of_tables(tables, obj.name, wanted, folders)
            return
        with opened(obj) as file:
            if wanted.unit == "bytes":
                lines, prefix = _lines(file, wanted.start), f"{obj.name}@"
            else:
                lines, prefix = ((n, line) for n, (_, line) in enumerate(_lines(file, 0))), f"{obj.name}:"
            if plan.format == "csv":
                rows = _csv(obj, file)
            else:
                rows = (_json if plan.format == "jsonl" else _text)(lines, columns is not None)
            yield from _of_rows(itertools.takewhile(lambda row: row.position < wanted.stop, rows), prefix, folders)


def _folders(plan: Plan, name: str) -> dict[str, Any]:
    """What the object's folders say of the plan's partition columns, key=value/key=value/name."""
    found: dict[str, Any] = dict.fromkeys(plan.partitions)
    for folder in name.split("/")[:-1]:
        key, _, text = folder.partition("=")
        if (key := unquote(key)) in found and text != "__HIVE_DEFAULT_PARTITION__":
            found[key] = int(text) if plan.partitions[key] == "int64" else unquote(text)
    return found


# ---- tables ----


def _of_tables(batches: Batches, name: str, wanted: Range, folders: dict[str, Any]) -> Iterator[Block]:
    for begin, rows, batch in batches:
        if begin >= wanted.stop:
            return
        first, last = max(begin, wanted.start), min(begin + rows, wanted.stop)
        for start in range(first, last, ROWS):
            stop = min(start + ROWS, last)
            columns: dict[str, Any] = {key: [value] * (stop - start) for key, value in folders.items()}
            if batch is not None:
                part = batch.slice(start - begin, stop - start)
                columns.update(zip(part.schema.names, part.columns, strict=True))
            yield Block([f"{name}:{ordinal}" for ordinal in range(start, stop)], columns)


def _parquet(file: BinaryIO, wanted: Range, columns: Callable[[str], bool] | None) -> Batches:
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(
        file,
        page_checksum_verification=True,
        pre_buffer=False,
        buffer_size=1 << 20,
        coerce_int96_timestamp_unit="us",  # nanoseconds don't reach the year 9999
    )
    known = parquet.schema_arrow.names
    names = [name for name in known if columns and columns(name)]
    begin = 0
    for index in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(index)
        end = begin + group.num_rows
        if names and begin < wanted.stop and end > wanted.start:
            at, size = begin, min(ROWS, max(1, BYTES * group.num_rows // max(1, group.total_byte_size)))
            asked = None if names == known else names  # by path: a also takes a column that is called a.b
            for batch in parquet.iter_batches(size, row_groups=[index], columns=asked, use_threads=False):
                yield at, batch.num_rows, batch
                at += batch.num_rows
        else:
            yield begin, group.num_rows, None
        begin = end


def _arrow(obj: InputObject, file: BinaryIO, columns: Callable[[str], bool] | None) -> Batches:
    import pyarrow as pa

    begin = 0
    for batch in pa.ipc.open_stream(file if storage.is_remote(obj.uri) else pa.memory_map(obj.uri)):
        yield begin, batch.num_rows, batch.select(list(filter(columns, batch.schema.names))) if columns else None
        begin += batch.num_rows


# ---- text ----


def _of_rows(rows: Iterator[Parsed], prefix: str, folders: dict[str, Any]) -> Iterator[Block]:
    taken: list[Parsed] = []
    size = 0
    for row in rows:
        taken.append(row._replace(columns={**folders, **row.columns}) if folders and row.columns is not None else row)
        size += row.size
        if len(taken) == ROWS or size > BYTES:
            yield _block(taken, prefix)
            taken, size = [], 0
    if taken:
        yield _block(taken, prefix)


def _block(rows: list[Parsed], prefix: str) -> Block:
    names = dict.fromkeys(name for row in rows for name in row.columns or ())
    return Block(
        [f"{prefix}{row.position}" for row in rows],
        {name: [(row.columns or {}).get(name) for row in rows] for name in names},
        {index: row.text for index, row in enumerate(rows) if row.columns is None},
    )


def _lines(file: BinaryIO, start: int) -> Lines:
    """Lines that aren't blank by the offset of their first byte, from the first that begins at `start` or later."""
    at = start
    if start:
        file.seek(start - 1)
        at = start - 1 + _line(file)[0]
    while (read := _line(file))[0]:
        size, line = read
        if line is not None:
            line = line.removeprefix(b"\xef\xbb\xbf") if at == 0 else line
            line = line.removesuffix(b"\n")
        if line is None or line.strip():
            yield at, line
        at += size


def _line(file: BinaryIO) -> tuple[int, bytes | None]:
    """The next line's length in bytes, its end counted, and the line."""
    line = file.readline(broken.MAX_LINE + 2)
    size = len(line)
    if size < broken.MAX_LINE + 2 or line.endswith(b"\n"):
        return size, line if len(line.removesuffix(b"\n")) <= broken.MAX_LINE else None
    while not line.endswith(b"\n") and (line := file.readline(broken.MAX_LINE)):
        size += len(line)
    return size, None


def _json(lines: Lines, read: bool) -> Iterator[Parsed]:
    for position, line in lines:
        columns: dict[str, Any] | None = None if read else {}
        if read and line is not None:
            try:
                value = json.loads(line.decode())
                if b"\\u" in line:
                    json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair can't be written
                columns = value if isinstance(value, dict) else None
            except (ValueError, RecursionError):
                pass  # a row that can't be parsed
        text = line.decode(errors="replace") if line is not None and columns is None else None
        yield Parsed(position, len(line or b""), columns, text)


def _text(lines: Lines, read: bool) -> Iterator[Parsed]:
    for position, line in lines:
        try:
            columns = None if line is None else {"text": line.removesuffix(b"\r").decode()}
            yield Parsed(position, len(line or b""), columns)
        except UnicodeDecodeError as error:
            yield Parsed(position, len(error.object), None, error.object.decode(errors="replace"))


def _csv(obj: InputObject, file: BinaryIO) -> Iterator[Parsed]:
    """Records by ordinal, the header not counted. Where a record ends in a file that isn't well formed, only the reader
    of such files knows; its fields are read again from its text."""
    names, records = csv_table(obj, file)
    csv.field_size_limit(broken.MAX_LINE)
    for ordinal, (known, text, error) in enumerate(records):
        fields = known if error else _fields(text, obj) or known
        if obj.dialect and not any(fields[len(names) :]):
            fields = fields[: len(names)]  # a spreadsheet ends its lines with delimiters
        whole = error is None and len(fields) == len(names)
        yield Parsed(ordinal, len(text), dict(zip(names, fields, strict=True)) if whole else None, text)


def _fields(text: str, obj: InputObject) -> Fields | None:
    """A record's fields by Python's csv module; None for what it doesn't know: escapes, blanks around quotes."""
    by_name = "\t" if base(obj.name)[0].suffix.lower() == ".tsv" else ","
    dialect = obj.dialect or Dialect(delimiter=by_name)
    if dialect.escape or re.search(rf"(^|{re.escape(dialect.delimiter)}) +{dialect.quote}", text):
        return None
    if not dialect.quote:
        return [*text.split(dialect.delimiter)]
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=dialect.delimiter,
        quotechar=dialect.quote,
        strict=obj.dialect is not None,
    )
    try:
        rows = list(reader)
    except csv.Error:
        return None
    return [*rows[0]] if len(rows) == 1 else None
