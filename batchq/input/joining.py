"""Many small objects: several of them are one shard, since each shard is at least one object of the output."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from batchq.errors import InputError, StorageError
from batchq.input.ranges import TEXT_BYTES, Place
from batchq.input.rows import rows_per_byte
from batchq.records import InputObject

LEAST = 64  # shards that are left, so that many engines share the work evenly; as few objects stay as they are
MOST_PIECES = 1000  # of a shard: each is a request to the store, some 30 ms
SAMPLED = 8  # objects whose first rows tell how long rows are
UNPACKED = 8  # bytes of text in a compressed byte, about


def join_small(
    places: Sequence[Place], objects: Sequence[InputObject], format: str, *, rows_per_shard: int
) -> list[list[Place]]:
    """The places, each an object's number and a range, in groups of neighbours: a group for each shard.

    A group has about `rows_per_shard` rows or TEXT_BYTES of text at most, and fewer where there would be less than
    LEAST of them otherwise.
    """
    alone = [[place] for place in places]
    if len(places) <= LEAST:
        return alone
    rate = _rows_per_byte(objects, format) if any(range.unit != "rows" for _, range in places) else 0.0
    if rate is None:
        return alone

    def share(place: Place) -> float:
        obj, range = objects[place[0]], place[1]
        size = range.stop - range.start if range.unit == "bytes" else obj.size
        rows = range.stop - range.start if range.unit == "rows" else size * rate
        text = size * (1 if range.unit == "bytes" else UNPACKED)
        return max(rows / rows_per_shard, text / TEXT_BYTES)

    shares = [share(place) for place in places]
    most = min(1.0, sum(shares) / LEAST)
    groups: list[list[Place]] = []
    filled = most
    for place, part in zip(places, shares, strict=True):
        if filled + part > most or len(groups[-1]) == MOST_PIECES:
            groups.append([])
            filled = 0.0
        groups[-1].append(place)
        filled += part
    return groups


def _rows_per_byte(objects: Sequence[InputObject], format: str) -> float | None:
    """In the mean of a few; None if none of them can be read: whoever labels them says so."""
    rows = size = 0.0
    for obj in objects[:: max(1, len(objects) // SAMPLED)][:SAMPLED]:
        with contextlib.suppress(InputError, StorageError):
            rows, size = rows + obj.size * rows_per_byte(obj, format), size + obj.size
    return rows / size if size else None
