"""Parquet and datasets on disk -> rows, by ordinal, a batch at a time."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from batchq import storage
from batchq.input import broken
from batchq.input.formats import BLOCK, require
from batchq.input.sizes import table_sizes
from batchq.records import InputObject, Range, Row
from batchq.storage import failpoint

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_BYTES = 8 * 1024 * 1024  # of a table, made Python values at a time, unless one row has more
BATCH_ROWS = 1024
DECODED_ROWS = 16  # of Parquet at a time: a row group's footer tells the mean length of a row, not the longest, nor how
# often a value that it stores once is repeated


def table_rows(obj: InputObject, format: str, wanted: Range, columns: list[str] | None) -> Iterator[Row]:
    for first, batch in table_batches(obj, format, wanted, columns):
        if columns is not None:
            require(columns, batch.schema.names, obj.name)
            batch = batch.select(columns)
        yield from _batch_rows(batch, f"{obj.name}:", first)


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
    names, sizes = batch.schema.names, table_sizes(batch)
    if batch.num_rows == 1 and sizes[0] > broken.MAX_LINE:
        yield broken.row(prefix, first, "row_too_long", broken.TOO_LONG[1])
        return
    try:
        cells = [column.to_pylist() for column in batch.columns]
        values = zip(*cells, strict=True) if cells else ((),) * batch.num_rows
        for ordinal, cell in enumerate(values, first):
            yield Row(f"{prefix}{ordinal}", ordinal, dict(zip(names, cell, strict=True)), size=sizes[ordinal - first])
        return
    except (ValueError, OverflowError):
        pass  # a value that Python can't hold: read row by row, so that its neighbours still come
    for index in range(batch.num_rows):
        ordinal = first + index
        try:
            cell = {name: batch.column(name)[index].as_py() for name in names}
            yield Row(f"{prefix}{ordinal}", ordinal, cell, size=sizes[index])
        except UnicodeDecodeError:
            yield broken.row(prefix, ordinal, *broken.NOT_UTF8)
        except (ValueError, OverflowError):
            yield broken.row(prefix, ordinal, "invalid_value", "a column holds a value that can't be read")


def _parquet_batches(
    obj: InputObject, wanted: Range, columns: list[str] | None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Rows of the row groups that overlap the range; others are not read."""
    import pyarrow.parquet as pq

    with storage.open_read(obj.uri, etag=obj.etag) as file:
        # pre_buffer would hold whole row groups
        parquet = pq.ParquetFile(file, page_checksum_verification=True, buffer_size=BLOCK, pre_buffer=False)
        if columns is not None:
            require(columns, parquet.schema_arrow.names, obj.name)
        begin = 0
        for index in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(index)
            if begin < wanted.stop and begin + group.num_rows > wanted.start:
                at_a_time = BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)
                size = min(max(1, at_a_time), DECODED_ROWS)
                at = begin
                for batch in parquet.iter_batches(size, row_groups=[index], columns=columns, use_threads=False):
                    failpoint.reach("read.parquet.batch")
                    if at >= wanted.stop:
                        return
                    yield at, batch
                    at += batch.num_rows
            begin += group.num_rows


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


def row_groups(obj: InputObject, format: str) -> list[tuple[int, int]]:
    """Rows and bytes, not compressed, of each row group of a Parquet file or each batch of a dataset."""
    import pyarrow.parquet as pq

    with storage.open_read(obj.uri, etag=obj.etag) as file:
        if format == "dataset":
            return [(batch.num_rows, batch.nbytes) for batch in arrow_reader(obj, file)]
        metadata = pq.read_metadata(file)
        groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]
