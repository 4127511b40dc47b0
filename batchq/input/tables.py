"""Parquet and datasets on disk -> rows, by ordinal, a batch at a time."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from batchq import storage
from batchq.errors import RowError
from batchq.input import broken
from batchq.input.formats import BLOCK
from batchq.input.sizes import table_sizes
from batchq.records import InputObject, Range, Row
from batchq.storage import failpoint

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_BYTES = 8 * 1024 * 1024  # of a table, made Python values at a time, unless one row has more
BATCH_ROWS = 1024
DECODED_ROWS = 16  # of Parquet at a time: a row group's footer tells the mean length of a row, not the longest, nor how
# often a value that it stores once is repeated
GATHERED_BYTES = 1024 * 1024  # of what is decoded, made one batch: a batch costs as much as some rows do

# Spark's old timestamps have microseconds. pyarrow makes nanoseconds of them, and of the year 9999 that of 1816.
INT96_UNIT = "us"


class TableRow(Mapping[str, Any]):
    """The columns of one row of a record batch. A column's values are made Python's when one of them is first read, so
    that what nobody reads costs nothing, and a value that Python can't hold costs nobody else anything.

    Reading such a value raises RowError: `invalid_utf8` or `invalid_value`.
    """

    __slots__ = ("_read", "batch", "index")

    def __init__(self, batch: pa.RecordBatch, index: int, read: dict[str, list[Any]]) -> None:
        """`read`: the columns that were read so far, shared by the batch's rows."""
        self.batch, self.index, self._read = batch, index, read

    def __getitem__(self, name: str) -> Any:
        values = self._read.get(name)
        if values is None:
            values = self._read[name] = _python_values(self.batch.column(name))
        value = values[self.index]
        if isinstance(value, RowError):
            raise RowError(value.code, f"column {name}: {value.message}")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.batch.schema.names)

    def __len__(self) -> int:
        return len(self.batch.schema.names)

    def __contains__(self, name: object) -> bool:
        return name in self.batch.schema.names


def table_rows(
    obj: InputObject, format: str, wanted: Range, columns: list[str] | None, beside: Mapping[str, Any]
) -> Iterator[Row]:
    """The rows of a range. A column that the file doesn't have is as `beside` says, or null."""
    for first, batch in table_batches(obj, format, wanted, columns):
        yield from _batch_rows(_completed(batch, columns, beside), f"{obj.name}:", first)


def table_batches(
    obj: InputObject, format: str, wanted: Range, columns: list[str] | None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The range's rows in batches of at most BATCH_ROWS rows and BATCH_BYTES, or of one row; each with its first row's
    ordinal."""
    batches = _parquet_batches(obj, wanted, columns) if format == "parquet" else _arrow_batches(obj)
    for begin, batch in batches:
        if begin >= wanted.stop:
            return
        first, last = max(begin, wanted.start), min(begin + batch.num_rows, wanted.stop)
        if first < last:
            yield from _pieces(batch.slice(first - begin, last - first), first)


def _pieces(batch: pa.RecordBatch, first: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """A batch in halves, and halves of these, until each is small, however its rows' lengths differ."""
    if batch.num_rows > 1 and (batch.num_rows > BATCH_ROWS or batch.nbytes > BATCH_BYTES):
        half = batch.num_rows // 2
        yield from _pieces(batch.slice(0, half), first)
        yield from _pieces(batch.slice(half), first + half)
    else:
        yield first, batch


def _batch_rows(batch: pa.RecordBatch, prefix: str, first: int) -> Iterator[Row]:
    sizes = table_sizes(batch)
    if batch.num_rows == 1 and sizes[0] > broken.MAX_LINE:
        yield broken.row(prefix, first, "row_too_long", broken.TOO_LONG[1])
        return
    read: dict[str, list[Any]] = {}
    for index in range(batch.num_rows):
        yield Row(f"{prefix}{first + index}", first + index, TableRow(batch, index, read), size=sizes[index])


def _completed(batch: pa.RecordBatch, columns: list[str] | None, beside: Mapping[str, Any]) -> pa.RecordBatch:
    import pyarrow as pa

    own = batch.schema.names
    names = list(dict.fromkeys([*own, *beside])) if columns is None else columns
    if names == own:
        return batch
    if not names:
        return batch.select([])
    known, rows = set(own), batch.num_rows
    arrays = [batch.column(name) if name in known else pa.repeat(pa.scalar(beside.get(name)), rows) for name in names]
    return pa.RecordBatch.from_arrays(arrays, names)


def _python_values(column: pa.Array) -> list[Any]:
    """The values, a RowError in the place of one that Python can't hold."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except (ValueError, OverflowError):
        return [_python_value(scalar) for scalar in column]


def _python_value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return RowError(*broken.NOT_UTF8)
    except (ValueError, OverflowError):
        return RowError("invalid_value", "a value that is out of Python's range")


def _parquet_batches(
    obj: InputObject, wanted: Range, columns: list[str] | None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Rows of the row groups that overlap the range; others are not read."""
    import pyarrow.parquet as pq

    with storage.open_read(obj.uri, etag=obj.etag) as file:
        # pre_buffer would hold whole row groups
        parquet = pq.ParquetFile(
            file,
            page_checksum_verification=True,
            buffer_size=BLOCK,
            pre_buffer=False,
            coerce_int96_timestamp_unit=INT96_UNIT,
        )
        own = set(parquet.schema_arrow.names)
        read = None if columns is None else [name for name in columns if name in own]
        begin = 0
        for index in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(index)
            if begin < wanted.stop and begin + group.num_rows > wanted.start:
                at_a_time = BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)
                size = min(max(1, at_a_time), DECODED_ROWS)
                at = begin
                decoded = parquet.iter_batches(size, row_groups=[index], columns=read, use_threads=False)
                for batch in _gathered(decoded):
                    failpoint.reach("read.parquet.batch")
                    if at >= wanted.stop:
                        return
                    yield at, batch
                    at += batch.num_rows
            begin += group.num_rows


def _gathered(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of some GATHERED_BYTES, or of BATCH_ROWS. What was decoded before an error comes before
    it."""
    import pyarrow as pa

    held: list[pa.RecordBatch] = []
    rows = size = 0
    error: Exception | None = None
    ended = False
    while not ended:
        try:
            batch = next(batches, None)
        except Exception as raised:
            error, batch = raised, None
        if batch is not None:
            held.append(batch)
            rows, size = rows + batch.num_rows, size + batch.nbytes
        ended = batch is None
        del batch  # it may be large, and so may the next one
        if held and (ended or rows >= BATCH_ROWS or size >= GATHERED_BYTES):
            whole = held[0] if len(held) == 1 else pa.concat_batches(held)
            held.clear()
            rows = size = 0
            yield whole
            del whole
    if error:
        raise error


def _arrow_batches(obj: InputObject) -> Iterator[tuple[int, pa.RecordBatch]]:
    """A local file is mapped, so that a batch passed over costs nothing, and what was read is let go: a batch may be
    larger than the memory."""
    with storage.open_read(obj.uri, etag=obj.etag) as file:
        mapped = _mapped(obj, file)
        begin = 0
        for whole in _stream(mapped, file):
            for first, batch in _pieces(whole, begin):
                yield first, batch
                if mapped is not None:
                    mapped.madvise(mmap.MADV_DONTNEED)
            begin += whole.num_rows


def arrow_reader(obj: InputObject, file: BinaryIO) -> Any:
    return _stream(_mapped(obj, file), file)


def _mapped(obj: InputObject, file: BinaryIO) -> mmap.mmap | None:
    return None if storage.is_remote(obj.uri) else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _stream(mapped: mmap.mmap | None, file: BinaryIO) -> Any:
    import pyarrow as pa

    return pa.ipc.open_stream(pa.PythonFile(file) if mapped is None else pa.py_buffer(mapped))
