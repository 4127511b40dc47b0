"""How an input object is cut into ranges, one for each shard."""

from __future__ import annotations

from itertools import pairwise

from batchq import storage
from batchq.input.broken import MAX_LINE
from batchq.input.footers import row_groups
from batchq.input.formats import readable, splittable
from batchq.input.lines import TAIL
from batchq.records import InputObject, Range

TEXT_BYTES = 24 * 1024 * 1024  # of a range: it fits in one part, whatever its rows' lengths
TABLE_BYTES = 256 * 1024 * 1024  # of a range, not compressed; larger, since a cut row group is read again by each range

Place = tuple[int, Range]  # an object's number, and a range of it


def split(obj: InputObject, format: str, *, rows_per_shard: int) -> list[Range]:
    """Cut one object into ranges of about `rows_per_shard` rows, reading no more of it than a footer or a sample.

    Bytes are cut evenly, by the length of the first rows. Row groups stay whole, unless one is twice too large. Where
    rows are long a range has fewer: TEXT_BYTES or TABLE_BYTES, about. A dataset in an object store is one stream: its
    rows can't be found without reading it.
    """
    unit = splittable(obj.name, format)
    if unit == "stream" or (format == "dataset" and storage.is_remote(obj.uri)):
        return [Range("stream")]
    if unit == "bytes":
        return _even(Range("bytes", 0, obj.size), obj.size / min(row_bytes(obj) * rows_per_shard, TEXT_BYTES))
    with readable(obj, format):
        groups = row_groups(obj, format)
    ranges: list[Range] = []
    start = stop = 0
    filled = 0.0  # of the range that begins at `start`: 1 has as many rows, or bytes, as it is to have
    for rows, size in groups:
        share = max(rows / rows_per_shard, size / TABLE_BYTES)
        if start < stop and filled + share > 1.5:
            ranges.append(Range("rows", start, stop))
            start, filled = stop, 0.0
        stop += rows
        filled += share
        if share > 2:
            ranges += _even(Range("rows", start, stop), share)
            start, filled = stop, 0.0
        elif filled >= 1:
            ranges.append(Range("rows", start, stop))
            start, filled = stop, 0.0
    return [*ranges, Range("rows", start, stop)] if start < stop else ranges


def row_bytes(obj: InputObject) -> float:
    """Mean length of the first lines of an object of plain text."""
    for length in (TAIL * 4, MAX_LINE):
        sample = storage.read(obj.uri, 0, length, etag=obj.etag)
        lines = sample.count(b"\n") + (len(sample) == obj.size and not sample.endswith(b"\n"))
        if lines:
            break
    return len(sample) / max(1, lines)


def taper(groups: list[list[Place]], tail: int) -> list[list[Place]]:
    """Cut the last `tail` groups, one for each shard, in halves, and the last `tail` of those again, so that no worker
    waits long for another at the end. Streams stay whole."""
    for _ in range(2):
        groups = [*groups[:-tail], *(half for group in groups[-tail:] for half in _halves(group))]
    return groups


def _halves(group: list[Place]) -> list[list[Place]]:
    if len(group) > 1:
        return [group[: len(group) // 2], group[len(group) // 2 :]]
    ((number, whole),) = group
    if whole.unit == "stream" or whole.stop - whole.start < 2:
        return [group]
    return [[(number, half)] for half in _even(whole, 2)]


def _even(whole: Range, pieces: float) -> list[Range]:
    count = max(1, round(pieces))
    cuts = [whole.start + (whole.stop - whole.start) * cut // count for cut in range(count + 1)]
    return [Range(whole.unit, begin, end) for begin, end in pairwise(cuts) if begin < end]
