"""How an input object is cut into ranges, one for each shard."""

from __future__ import annotations

from itertools import pairwise

from batchq import storage
from batchq.input.formats import readable, splittable
from batchq.input.lines import TAIL
from batchq.input.tables import arrow_batches, row_groups
from batchq.records import InputObject, Range


def split(obj: InputObject, format: str, *, rows_per_shard: int) -> list[Range]:
    """Cut one object into ranges of about `rows_per_shard` rows, reading no more of it than a footer or a sample.

    Bytes are cut evenly, by the length of the first rows. Row groups stay whole, unless one is twice too large. A
    dataset in an object store is one stream: its rows can't be found without reading it.
    """
    unit = splittable(obj.name, format)
    if unit == "stream" or (format == "dataset" and storage.is_remote(obj.uri)):
        return [Range("stream")]
    if unit == "bytes":
        sample = storage.read(obj.uri, 0, TAIL * 4, etag=obj.etag)
        row_bytes = len(sample) / max(1, sample.count(b"\n"))
        return _even(Range("bytes", 0, obj.size), obj.size / row_bytes / rows_per_shard)
    with readable(obj, format):
        groups = row_groups(obj) if format == "parquet" else [end - begin for begin, end, _ in arrow_batches(obj)]
    ranges: list[Range] = []
    start = stop = 0
    for rows in groups:
        if start < stop and stop - start + rows > rows_per_shard * 1.5:
            ranges.append(Range("rows", start, stop))
            start = stop
        stop += rows
        if rows > 2 * rows_per_shard:
            ranges += _even(Range("rows", start, stop), rows / rows_per_shard)
            start = stop
        elif stop - start >= rows_per_shard:
            ranges.append(Range("rows", start, stop))
            start = stop
    return [*ranges, Range("rows", start, stop)] if start < stop else ranges


def taper(ranges: list[tuple[int, Range]], tail: int) -> list[tuple[int, Range]]:
    """Cut the last `tail` ranges, each with its object's number, in halves, and the last `tail` of those again, so that
    no worker waits long for another at the end. Streams stay whole."""
    for _ in range(2):
        halves = [(number, half) for number, whole in ranges[-tail:] for half in _halves(whole)]
        ranges = [*ranges[:-tail], *halves]
    return ranges


def _halves(whole: Range) -> list[Range]:
    return [whole] if whole.unit == "stream" or whole.stop - whole.start < 2 else _even(whole, 2)


def _even(whole: Range, pieces: float) -> list[Range]:
    count = max(1, round(pieces))
    cuts = [whole.start + (whole.stop - whole.start) * cut // count for cut in range(count + 1)]
    return [Range(whole.unit, begin, end) for begin, end in pairwise(cuts) if begin < end]
