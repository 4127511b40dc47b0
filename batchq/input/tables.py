"""Parquet and datasets on disk -> rows, by ordinal, a batch at a time."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from batchq import storage
from batchq.input import broken
from batchq.input.formats import BLOCK, require
from batchq.records import InputObject, Range, Row
from batchq.storage import failpoint

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_BYTES = 16 * 1024 * 1024  # of a table, decoded at a time
BATCH_ROWS = 1024


def table_rows(obj: InputObject, format: str, wanted: Range, columns: list[str] | None) -> Iterator[Row]:
    batches = _parquet_batches(obj, wanted, columns) if format == "parquet" else arrow_batches(obj)
    for begin, end, batch in batches:
        if begin >= wanted.stop:
            return
        last = min(end, wanted.stop)
        for first in range(max(begin, wanted.start), last, BATCH_ROWS):
            part = batch.slice(first - begin, min(BATCH_ROWS, last - first))
            if columns is not None:
                require(columns, part.schema.names, obj.name)
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
        pass  # a value that Python can't hold: read row by row, so that its neighbours still come
    for index in range(batch.num_rows):
        ordinal = first + index
        try:
            yield Row(f"{prefix}{ordinal}", ordinal, {name: batch.column(name)[index].as_py() for name in names})
        except UnicodeDecodeError:
            yield broken.row(prefix, ordinal, *broken.NOT_UTF8)
        except (ValueError, OverflowError):
            yield broken.row(prefix, ordinal, "invalid_value", "a column holds a value that can't be read")


def _parquet_batches(
    obj: InputObject, wanted: Range, columns: list[str] | None
) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    """Ordinals and rows of the row groups that overlap the range; others are not read."""
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
                size = min(max(1, at_a_time), BATCH_ROWS)
                at = begin
                for batch in parquet.iter_batches(size, row_groups=[index], columns=columns, use_threads=False):
                    failpoint.reach("read.parquet.batch")
                    if at >= wanted.stop:
                        return
                    yield at, at + batch.num_rows, batch
                    at += batch.num_rows
            begin += group.num_rows


def arrow_batches(obj: InputObject) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    """Ordinals and rows of each batch. A local file is mapped, so that a batch passed over costs nothing."""
    with storage.open_read(obj.uri, etag=obj.etag) as file:
        begin = 0
        for batch in arrow_reader(obj, file):
            yield begin, begin + batch.num_rows, batch
            begin += batch.num_rows


def arrow_reader(obj: InputObject, file: BinaryIO) -> Any:
    import pyarrow as pa

    local = not storage.is_remote(obj.uri)
    source = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if local else pa.PythonFile(file)
    return pa.ipc.open_stream(source)


def row_groups(obj: InputObject) -> list[int]:
    import pyarrow.parquet as pq

    with storage.open_read(obj.uri, etag=obj.etag) as file:
        metadata = pq.read_metadata(file)
        return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
