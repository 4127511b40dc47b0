"""An input object's bytes -> rows: JSONL, CSV, Parquet, text lines, a dataset on disk; gz, zst and bz2 of the first two
and of text.

A row that can't be parsed is a Row with an error, and its neighbours are read as ever. An object that can't be read on
raises InputError after the rows before the damage. Memory stays flat: a block, a batch or a line, whatever the size.
"""

from __future__ import annotations

import csv
import json
import mmap
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from batchq import failpoint, storage
from batchq.config import InputConfig, InputFormat
from batchq.errors import InputError, NotFound
from batchq.records import InputObject, Row

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
    ".arrow": "dataset",
}
COMPRESSIONS = (".gz", ".zst", ".bz2")
DATASET_FILES = {"state.json", "dataset_info.json", "dataset_dict.json"}  # what save_to_disk writes beside the rows

MAX_LINE = 64 * 1024 * 1024  # bytes; a longer line becomes an error row, so that one can't fill the memory
BLOCK = 4 * 1024 * 1024  # bytes read at a time: one request to a store
TAIL = 64 * 1024  # bytes read at a time beyond a range's end, to finish its last line
BATCH_BYTES = 16 * 1024 * 1024  # of a table, decoded at a time
BATCH_ROWS = 1024
SAMPLED_OBJECTS = 8
OPENED_AT_ONCE = 16  # objects, when each is looked at

_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Range = tuple[str, int, int]  # unit, start, stop; as in records.Shard


# ---- what there is ----


def format_of(name: str, configured: InputFormat) -> str:
    """The base format of an object: as configured, or by its name. Raises InputError naming the choices."""
    path, compressed = _base(name)
    if configured is not InputFormat.auto:
        format = str(configured.value)
    elif path.suffix.lower() in FORMATS:
        format = FORMATS[path.suffix.lower()]
    else:
        choices = ", ".join(each.value for each in InputFormat if each is not InputFormat.auto)
        raise InputError(
            f"{name}: can't tell its format by its name; set input.format to one of {choices}, "
            "or leave it out with a pattern such as folder/*.jsonl"
        )
    if compressed and format in ("parquet", "dataset"):
        raise InputError(f"{name}: a {format} file compressed as a whole can't be read; decompress it")
    return format


def splittable(name: str, format: str) -> str:
    """The unit that shards of an object are counted in: "rows", "bytes", or "stream" (one worker takes the whole)."""
    if format in ("parquet", "dataset"):
        return "rows"
    return "stream" if format == "csv" or _base(name)[1] else "bytes"


def list_input(config: InputConfig) -> list[InputObject]:
    """The input's objects, sorted by name: a file, a folder, a pattern, or several separated by commas.

    Names are relative to what was asked for. Of a dataset on disk only its current data files count; files of no bytes
    don't. Raises InputError if nothing is there, if a format can't be told, or if there are several.
    """
    found: dict[str, storage.Stat] = {}
    roots = []
    for entry in filter(None, (part.strip() for part in config.path.split(","))):
        try:
            matched = _data_files(storage.glob(entry), config.format)
        except NotFound:
            raise InputError(f"input.path={entry}: no file, folder or object of that name") from None
        if not matched:
            raise InputError(f"input.path={entry}: nothing there matches")
        roots.append(storage.root_of(entry, matched))
        found.update((each.uri, each) for each in matched)
    root = _common_root(roots)
    objects = [InputObject(each.uri, each.uri[len(root) :], each.size, each.etag) for each in found.values()]
    formats = {format_of(each.name, config.format): each.name for each in objects}
    if len(formats) > 1:
        examples = ", ".join(f"{format} ({name})" for format, name in sorted(formats.items()))
        raise InputError(f"input.path={config.path}: one format at a time, but there are {examples}; narrow the path")
    objects = [each for each in objects if each.size or not formats.keys().isdisjoint({"parquet", "dataset"})]
    if not objects:
        raise InputError(f"input.path={config.path}: the input is empty")
    return sorted(objects, key=lambda each: each.name)


def _base(name: str) -> tuple[PurePosixPath, str]:
    """The name without its compression's ending, and that ending."""
    path = PurePosixPath(name)
    compression = path.suffix.lower()
    return (path.with_suffix(""), compression) if compression in COMPRESSIONS else (path, "")


def _data_files(matched: list[storage.Stat], format: InputFormat) -> list[storage.Stat]:
    """Leave out what lies beside the rows of a dataset on disk: its description, caches, and files of older saves."""
    folders = {each.uri.rpartition("/")[0] for each in matched if each.uri.endswith(".arrow")}
    if format is not InputFormat.dataset and (format is not InputFormat.auto or not folders):
        return matched
    saved = {}  # folder -> the data files of its last save
    for each in matched:
        folder, _, name = each.uri.rpartition("/")
        if name == "state.json" and folder in folders:
            state = json.loads(storage.read(each.uri, etag=each.etag))
            saved[folder] = {file["filename"] for file in state["_data_files"]}

    def is_data(each: storage.Stat) -> bool:
        folder, _, name = each.uri.rpartition("/")
        if name.endswith(".arrow"):
            return name in saved[folder] if folder in saved else not name.startswith("cache-")
        return format is InputFormat.auto and name not in DATASET_FILES

    return [each for each in matched if is_data(each)]


def _common_root(roots: list[str]) -> str:
    """What all names leave off: the folder that the roots share, with its slash; nothing if they share no store."""
    shared = os.path.commonprefix([root.split("/") for root in roots])  # noqa: RUF071 - of lists, so by component
    is_bucket = len(shared) > 2 or (shared and "://" not in roots[0])
    return "/".join(shared) + "/" if is_bucket else ""


# ---- cutting it up ----


def split(obj: InputObject, format: str, *, rows_per_shard: int) -> list[Range]:
    """Cut one object into ranges of about `rows_per_shard` rows, reading no more of it than a footer or a sample.

    Bytes are cut evenly, by the length of the first rows. Row groups stay whole, unless one is twice too large. A
    dataset in an object store is one stream: its rows can't be found without reading it.
    """
    unit = splittable(obj.name, format)
    if unit == "stream" or (format == "dataset" and storage.is_remote(obj.uri)):
        return [("stream", 0, 0)]
    if unit == "bytes":
        sample = storage.read(obj.uri, 0, TAIL * 4, etag=obj.etag)
        row_bytes = len(sample) / max(1, sample.count(b"\n"))
        return [("bytes", *each) for each in _even(0, obj.size, obj.size / row_bytes / rows_per_shard)]
    with _readable(obj, format):
        groups = _row_groups(obj) if format == "parquet" else [end - begin for begin, end, _ in _arrow_batches(obj)]
    ranges: list[Range] = []
    start = stop = 0
    for rows in groups:
        if start < stop and stop - start + rows > rows_per_shard * 1.5:
            ranges.append(("rows", start, stop))
            start = stop
        stop += rows
        if rows > 2 * rows_per_shard:
            ranges += [("rows", *each) for each in _even(start, stop, rows / rows_per_shard)]
            start = stop
        elif stop - start >= rows_per_shard:
            ranges.append(("rows", start, stop))
            start = stop
    return [*ranges, ("rows", start, stop)] if start < stop else ranges


def taper(ranges: list[tuple[int, str, int, int]], tail: int) -> list[tuple[int, str, int, int]]:
    """Cut the last `tail` ranges (object, unit, start, stop) in halves, and the last `tail` of those again, so that no
    worker waits long for another at the end. Streams stay whole."""
    for _ in range(2):
        ranges = [
            *ranges[:-tail],
            *(
                (obj, unit, *half)
                for obj, unit, start, stop in ranges[-tail:]
                for half in ([(start, stop)] if unit == "stream" or stop - start < 2 else _even(start, stop, 2))
            ),
        ]
    return ranges


def _even(start: int, stop: int, pieces: float) -> list[tuple[int, int]]:
    count = max(1, round(pieces))
    cuts = [start + (stop - start) * cut // count for cut in range(count + 1)]
    return [(begin, end) for begin, end in pairwise(cuts) if begin < end]


# ---- rows ----


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
    with _readable(obj, format):
        if format in ("parquet", "dataset"):
            begin, end = (start, stop) if unit == "rows" else (0, sys.maxsize)
            yield from _table_rows(obj, format, max(begin, skip_until), end, columns)
            return
        with _opened(obj) as file:
            if format == "csv":
                yield from _csv_rows(obj, file, columns, skip_until)
                return
            if unit == "bytes":
                lines, prefix = _lines(obj, file, max(start, skip_until), stop), f"{obj.name}@"
            else:
                lines, prefix = _numbered(_lines(obj, file, 0, sys.maxsize), skip_until), f"{obj.name}:"
            yield from _json_rows(lines, prefix, columns) if format == "jsonl" else _text_rows(lines, prefix)


def as_text(value: Any) -> str:
    """What a string column holds of a value: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


Lines = Iterator[tuple[int, bytes | None]]  # a line's position, and its bytes without the newline; None if too long


def _lines(obj: InputObject, file: BinaryIO, start: int, stop: int) -> Lines:
    """The lines whose first byte lies in [start, stop), by the offset of that byte."""
    if start >= stop:
        return
    at = max(0, start - 1)  # a line begins at start only if the byte before it ends one
    if at:
        file.seek(at)
    another_ranges = start > 0  # the first line belongs to the range before
    reached, held = at, 0  # the end of what was read, and the bytes of an unfinished line before it
    pieces: list[bytes] = []  # of that line, as long as it isn't too long
    while block := file.read(min(BLOCK, max(stop - reached, TAIL))):
        failpoint.reach("read.lines.block")
        reached += len(block)
        if start == 0 and reached == len(block):
            _refuse_other_files(obj, block)
            if block.startswith(_BOM):
                block, held = block[len(_BOM) :], len(_BOM)
        *lines, last = block.split(b"\n")
        line: bytes | None
        for line in lines:
            length = len(line)
            if held:
                length += held
                line = b"".join((*pieces, line)) if length <= MAX_LINE else None
                pieces.clear()
                held = 0
            if another_ranges:
                another_ranges = False
            else:
                yield at, line
            at += length + 1
            if at >= stop:
                return
        held += len(last)
        pieces.append(last)
        if held > MAX_LINE:
            pieces.clear()
    if held and not another_ranges:
        yield at, b"".join(pieces) if held <= MAX_LINE else None


def _numbered(lines: Lines, skip_until: int) -> Lines:
    """Lines by ordinal, blank ones not counted, from `skip_until` on."""
    ordinal = 0
    for _, line in lines:
        if line is None or line.strip():
            if ordinal >= skip_until:
                yield ordinal, line
            ordinal += 1


def _json_rows(lines: Lines, prefix: str, columns: list[str] | None) -> Iterator[Row]:
    loads = json.loads
    for position, line in lines:
        if line is None:
            yield _too_long(prefix, position)
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError:
            yield _not_utf8(prefix, position, line)
            continue
        try:
            value = loads(text)
        except (ValueError, RecursionError) as error:
            if line.strip():
                yield _broken(prefix, position, "invalid_json", _json_message(error), text)
            continue
        if not isinstance(value, dict):
            yield _broken(prefix, position, "not_an_object", "a row must be a JSON object", text)
        elif "\\u" in text and _SURROGATE.search(text) and not _encodable(value):
            yield _broken(prefix, position, "invalid_unicode", "a string holds half of a surrogate pair", text)
        else:
            wanted = value if columns is None else {name: value.get(name) for name in columns}
            yield Row(f"{prefix}{position}", position, wanted)


def _text_rows(lines: Lines, prefix: str) -> Iterator[Row]:
    for position, line in lines:
        if line is None:
            yield _too_long(prefix, position)
        elif line.strip():
            try:
                yield Row(f"{prefix}{position}", position, {"text": line.removesuffix(b"\r").decode()})
            except UnicodeDecodeError:
                yield _not_utf8(prefix, position, line)


def _csv_rows(obj: InputObject, file: BinaryIO, columns: list[str] | None, skip_until: int) -> Iterator[Row]:
    records = _csv_records(obj, file)
    header = _csv_header(obj, records)
    if columns is not None:
        _require(columns, header, obj.name)
    prefix = f"{obj.name}:"
    for ordinal, (values, raw, error) in enumerate(records):
        if ordinal < skip_until:
            continue
        if error is None and len(values) != len(header):
            error = "csv_columns", f"{len(values)} fields, but the header has {len(header)}"
        if error is not None:
            yield _broken(prefix, ordinal, *error, raw)
            continue
        row = dict(zip(header, values, strict=True))
        yield Row(f"{prefix}{ordinal}", ordinal, row if columns is None else {name: row[name] for name in columns})


def _csv_header(obj: InputObject, records: Iterator[tuple[list[str], str, tuple[str, str] | None]]) -> list[str]:
    header, _, error = next(records, ([], "", None))
    if error is not None:
        raise InputError(f"{obj.uri}: its header can't be read ({error[1]})")
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        raise InputError(f"{obj.uri}: its header names the column {repeated[0]} more than once")
    return header


def _csv_records(obj: InputObject, file: BinaryIO) -> Iterator[tuple[list[str], str, tuple[str, str] | None]]:
    """Fields, raw text and error of each record that isn't blank, the header first."""
    raw: list[str] = []  # the lines of the record under way
    problem: tuple[str, str] | None = None
    ended = False

    def text() -> Iterator[str]:
        nonlocal problem, ended
        for _, line in _lines(obj, file, 0, sys.maxsize):
            if line is None:
                problem, line = _TOO_LONG, b""
            try:
                decoded = line.decode()
            except UnicodeDecodeError:
                problem, decoded = _NOT_UTF8, line.decode(errors="replace")
            raw.append(decoded + "\n")
            yield raw[-1]
        ended = True

    csv.field_size_limit(MAX_LINE)  # the library's own limit, 128 KiB, is short of a long document
    records = csv.reader(text(), delimiter="\t" if _base(obj.name)[0].suffix.lower() == ".tsv" else ",")
    while True:
        try:
            values = next(records, None)
            if ended and raw:  # the reader asks for another line only inside quotes
                problem = problem or ("invalid_csv", "a quote is not closed before the end of the file")
        except csv.Error as error:
            too_long = "field limit" in str(error)
            values, problem = [], _TOO_LONG if too_long else ("invalid_csv", "its quotes or line ends are broken")
        if values is None:
            return
        if problem or any(map(str.strip, values)) or len(values) > 1 or "".join(raw).strip():
            yield values, "".join(raw).removesuffix("\n").removesuffix("\r"), problem
        raw.clear()
        problem = None


def _table_rows(obj: InputObject, format: str, start: int, stop: int, columns: list[str] | None) -> Iterator[Row]:
    batches = _parquet_batches(obj, start, stop, columns) if format == "parquet" else _arrow_batches(obj)
    for begin, end, batch in batches:
        if begin >= stop:
            return
        for first in range(max(begin, start), min(end, stop), BATCH_ROWS):
            part = batch.slice(first - begin, min(BATCH_ROWS, min(end, stop) - first))
            if columns is not None:
                _require(columns, part.schema.names, obj.name)
                part = part.select(columns)
            yield from _batch_rows(part, f"{obj.name}:", first)


def _batch_rows(batch: pa.RecordBatch, prefix: str, first: int) -> Iterator[Row]:
    names = batch.schema.names
    try:
        cells = [column.to_pylist() for column in batch.columns]
        values = zip(*cells, strict=True) if cells else ((),) * batch.num_rows
        for ordinal, row in enumerate(values, first):
            yield Row(f"{prefix}{ordinal}", ordinal, dict(zip(names, row, strict=True)))
        return
    except (ValueError, OverflowError):
        pass  # a value that Python can't hold; find the row, and keep its neighbours
    for index in range(batch.num_rows):
        ordinal = first + index
        try:
            yield Row(f"{prefix}{ordinal}", ordinal, {name: batch.column(name)[index].as_py() for name in names})
        except UnicodeDecodeError:
            yield _broken(prefix, ordinal, *_NOT_UTF8)
        except (ValueError, OverflowError):
            yield _broken(prefix, ordinal, "invalid_value", "a column holds a value that can't be read")


def _parquet_batches(
    obj: InputObject, start: int, stop: int, columns: list[str] | None
) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    """Ordinals and rows of the row groups that overlap [start, stop); others are not read."""
    import pyarrow.parquet as pq

    with storage.open_read(obj.uri, etag=obj.etag) as file:
        # pre_buffer would hold whole row groups
        parquet = pq.ParquetFile(file, page_checksum_verification=True, buffer_size=BLOCK, pre_buffer=False)
        if columns is not None:
            _require(columns, parquet.schema_arrow.names, obj.name)
        begin = 0
        for index in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(index)
            if begin < stop and begin + group.num_rows > start:
                at_a_time = BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)
                size = min(max(1, at_a_time), BATCH_ROWS)
                at = begin
                for batch in parquet.iter_batches(size, row_groups=[index], columns=columns, use_threads=False):
                    failpoint.reach("read.parquet.batch")
                    if at >= stop:
                        return
                    yield at, at + batch.num_rows, batch
                    at += batch.num_rows
            begin += group.num_rows


def _arrow_batches(obj: InputObject) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    """Ordinals and rows of each batch. A local file is mapped, so that a batch passed over costs nothing."""
    with storage.open_read(obj.uri, etag=obj.etag) as file:
        begin = 0
        for batch in _arrow_reader(obj, file):
            yield begin, begin + batch.num_rows, batch
            begin += batch.num_rows


def _arrow_reader(obj: InputObject, file: BinaryIO) -> Any:
    import pyarrow as pa

    local = not storage.is_remote(obj.uri)
    source = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if local else pa.PythonFile(file)
    return pa.ipc.open_stream(source)


def _row_groups(obj: InputObject) -> list[int]:
    import pyarrow.parquet as pq

    with storage.open_read(obj.uri, etag=obj.etag) as file:
        metadata = pq.read_metadata(file)
        return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]


# ---- rows that can't be read, and files ----

_TOO_LONG = ("line_too_long", f"longer than {MAX_LINE // 1024**2} MiB")
_NOT_UTF8 = ("invalid_utf8", "not valid UTF-8")


def _broken(prefix: str, position: int, code: str, message: str, raw: str | None = None) -> Row:
    return Row(f"{prefix}{position}", position, {}, (code, message), raw)


def _too_long(prefix: str, position: int) -> Row:
    return _broken(prefix, position, *_TOO_LONG)


def _not_utf8(prefix: str, position: int, line: bytes) -> Row:
    return _broken(prefix, position, *_NOT_UTF8, line.decode(errors="replace"))


def _json_message(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    return "nested too deep" if isinstance(error, RecursionError) else "a number with too many digits"


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_other_files(obj: InputObject, head: bytes) -> None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{obj.uri}: is in UTF-16; convert it to UTF-8")
    if _base(obj.name)[0].suffix.lower() == ".json" and head.lstrip(_BOM + b" \t\r\n").startswith(b"["):
        raise InputError(f"{obj.uri}: is one JSON array; make it one object a line (jq -c '.[]')")


@contextmanager
def _opened(obj: InputObject) -> Iterator[BinaryIO]:
    """The object's bytes, decompressed as its name says."""
    with storage.open_read(obj.uri, etag=obj.etag) as file:
        compression = _base(obj.name)[1]
        if not compression:
            yield file
            return
        from smart_open.compression import compression_wrapper

        with compression_wrapper(file, "rb", compression) as decompressed:
            yield cast(BinaryIO, decompressed)


@contextmanager
def _readable(obj: InputObject, format: str) -> Iterator[None]:
    """Name the object in what decoders raise; their own words may quote it."""
    try:
        yield
    except EOFError as error:
        raise InputError(f"{obj.uri}: is cut short") from error
    except (OSError, zlib.error, ValueError, NotImplementedError) as error:
        raise InputError(f"{obj.uri}: is damaged, or not {format}{_base(obj.name)[1]}") from error
    except Exception as error:
        if type(error).__name__ == "ZstdError":  # its module is another in each version of Python
            raise InputError(f"{obj.uri}: is damaged, or not {format}.zst") from error
        raise


# ---- schema ----


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
        fields = _json_fields(_sample(objects, format, sample_rows), format)
    else:
        header = ["text"] if format == "text" else _one_header(_spread(objects))
        if not any(_head(each, format, 1) for each in objects):
            raise _empty()
        fields = {name: pa.string() for name in header}
    if columns is not None:
        _require(columns, list(fields), "input.columns")
    return pa.schema([(name, fields[name]) for name in columns or fields])


def unreadable(objects: list[InputObject], format: str) -> dict[str, str]:
    """Objects whose very beginning can't be read, by name: why. Damage further on shows when it is reached."""

    def why(obj: InputObject) -> str:
        try:
            if format in ("parquet", "dataset"):
                _file_fields([obj], format, may_be_empty=True)
            else:
                _head(obj, format, 1)
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(OPENED_AT_ONCE) as threads:
        found = zip(objects, threads.map(why, objects), strict=True)
        return {obj.name: reason for obj, reason in found if reason}


def _spread(objects: list[InputObject]) -> list[InputObject]:
    """A few objects, from the first to the last."""
    count = min(len(objects), SAMPLED_OBJECTS)
    return [objects[index * (len(objects) - 1) // max(1, count - 1)] for index in range(count)]


def _head(obj: InputObject, format: str, count: int) -> list[Row]:
    return list(islice(read_rows(obj, format, splittable(obj.name, format), 0, sys.maxsize, columns=None), count))


def _sample(objects: list[InputObject], format: str, count: int) -> list[Row]:
    chosen = _spread(objects)
    sample = [row for obj in chosen for row in _head(obj, format, -(-count // len(chosen)))]
    # the few that were looked at may be blank; rows of any object will do
    return sample or next(filter(None, (_head(obj, format, count) for obj in objects)), [])


def _json_fields(sample: list[Row], format: str) -> dict[str, pa.DataType]:
    if not sample:
        raise _empty()
    if all(row.error for row in sample):
        codes = Counter(row.error[0] for row in sample if row.error).most_common()
        seen = ", ".join(f"{code} {count}" for code, count in codes)
        raise InputError(f"none of the first {len(sample)} rows is {format} ({seen}); is input.format right?")
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
        with _readable(obj, format), storage.open_read(obj.uri, etag=obj.etag) as file:
            if format == "parquet":
                parquet = pq.ParquetFile(file)
                own, rows = parquet.schema_arrow, parquet.metadata.num_rows
            else:
                reader = _arrow_reader(obj, file)
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
        with _readable(obj, "csv"), _opened(obj) as file:
            header = _csv_header(obj, _csv_records(obj, file))
        first = first or header
        if header and sorted(header) != sorted(first):
            raise InputError(f"{obj.name}: has other columns than {objects[0].name}; label them apart")
    return first


def _require(wanted: Iterable[str], there: list[str], where: str) -> None:
    if missing := [name for name in wanted if name not in there]:
        known = ", ".join(there[:30]) + (", ..." if len(there) > 30 else "")
        raise InputError(f"{where}: no column {missing[0]} in the input; there are {known}")


def _empty() -> InputError:
    return InputError("the input is empty: not one row in it")
