"""How many bytes a row's values take, and rows taken a few at a time: by their number, and by their bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from batchq.records import Row

if TYPE_CHECKING:
    import pyarrow as pa

SCALAR = 8  # bytes that a value counts beside its text


def take(rows: Iterator[Row], most: int, most_bytes: int, each: int = 0) -> tuple[list[Row], int]:
    """The next rows and their bytes: at most so many rows, and none after the one that reaches `most_bytes`.

    `each`: what a row counts beside its values.
    """
    taken: list[Row] = []
    size = 0
    while len(taken) < most and size < most_bytes and (row := next(rows, None)) is not None:
        taken.append(row)
        size += each + row.size
    return taken, size


def text_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def table_sizes(batch: pa.RecordBatch) -> list[int]:
    """Bytes of each row's values: the same of a row, in whichever batch it comes."""
    import numpy as np

    sizes: list[int] = sum(map(_sizes, batch.columns), start=np.zeros(batch.num_rows, np.int64)).tolist()
    return sizes


def _sizes(column: pa.Array) -> Any:
    """Bytes of each value of a column: one number for all of them, or a numpy array."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, types = column.type, pa.types
    if types.is_string(kind) or types.is_binary(kind) or types.is_large_string(kind) or types.is_large_binary(kind):
        width = np.int64 if types.is_large_string(kind) or types.is_large_binary(kind) else np.int32
        offsets = np.frombuffer(column.buffers()[1] or bytes(8), width)  # pc.binary_length takes ten times as long
        return SCALAR + np.diff(offsets[column.offset : column.offset + len(column) + 1].astype(np.int64))
    if isinstance(column, pa.ExtensionArray):
        return _sizes(column.storage)
    if types.is_dictionary(kind):
        values = np.append(_each(column.dictionary), SCALAR)
        return values[pc.fill_null(column.indices, len(column.dictionary))]
    if types.is_struct(kind):
        return sum(map(_sizes, column.flatten()), start=SCALAR)
    if types.is_map(kind):
        sums = np.concatenate([[0], np.cumsum(_each(column.keys) + _each(column.items))])
        return SCALAR + np.diff(sums[column.offsets])
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        sums = np.concatenate([[0], np.cumsum(_each(pc.list_flatten(column)))])
        return SCALAR + np.diff(sums[np.concatenate([[0], np.cumsum(lengths)])])
    if kind in (pa.string_view(), pa.binary_view()):
        lengths = np.frombuffer(column.buffers()[1], np.int32)[::4][column.offset : column.offset + len(column)]
        return SCALAR + lengths.astype(np.int64) * column.is_valid().to_numpy(zero_copy_only=False)
    return SCALAR


def _each(column: pa.Array) -> Any:
    """`_sizes` as a numpy array of all values."""
    import numpy as np

    return np.broadcast_to(_sizes(column), len(column))
