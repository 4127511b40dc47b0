"""Which objects an output's rows are read from: its parts under data/, or the compacted ones once they are announced.

Whatever of batchq reads an output's rows asks here, so that it takes one set, never both or a part of one. No store
can switch a folder at once. So compacted objects are made under a folder whose name nobody has been told, and then one
create-only record, meta/compact.json, says that they are whole: from that moment they are what is read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import accumulate

from batchq import storage
from batchq.errors import NotFound, StorageError
from batchq.output import layout
from batchq.records import restored, sealed, unsealed


@dataclass(frozen=True, slots=True)
class CompactedObject:
    """One object: its bytes and their digest, and how many rows each of its row groups has."""

    name: str
    size: int
    sha256: str
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Compacted:
    """The set that took the parts' place. `folder`: its name below output.path; `size`: MiB that were asked for."""

    fingerprint: str
    folder: str
    size: int
    objects: tuple[CompactedObject, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """Some row groups of one object, one after the other; None: all of it."""

    uri: str
    groups: tuple[int, ...] | None = None


def announced(output: str) -> Compacted | None:
    """The compacted set, if it is whole. Raises StorageError if its record is damaged."""
    uri = layout.compact(output)
    try:
        return restored(storage.read_json(uri, unsealed), Compacted)
    except NotFound:
        return None
    except ValueError as error:
        raise StorageError(f"{uri}: is damaged; move it away, and `compact` makes it again") from error


def to_json(compacted: Compacted) -> bytes:
    return sealed(dataclasses.asdict(compacted))


def folder(output: str) -> str:
    """The folder that readers are told to open."""
    compacted = announced(output)
    return layout.compacted(output, compacted.folder) if compacted else layout.data(output)


def listed(output: str) -> list[str]:
    """The objects that the output's rows are in, in the order of the rows."""
    if compacted := announced(output):
        where = layout.compacted(output, compacted.folder)
        return [storage.join(where, each.name) for each in compacted.objects]
    return parts(output)


def parts(output: str) -> list[str]:
    """The committed parts under data/, in the order of the rows, whatever took their place."""
    found = {stat.uri: layout.parse_part(stat.uri) for stat in storage.list_objects(layout.data(output))}
    return sorted((uri for uri, place in found.items() if place), key=lambda uri: found[uri] or (0, 0))


def pieces(output: str) -> list[Rows]:
    """What is read at a time, in the order of the rows: a part, or a row group of a compacted object."""
    compacted = announced(output)
    if compacted is None:
        return [Rows(uri) for uri in parts(output)]
    where = layout.compacted(output, compacted.folder)
    return [
        Rows(storage.join(where, each.name), (group,))
        for each in compacted.objects
        for group in range(len(each.groups))
    ]


def holding(obj: CompactedObject, uri: str, first: int, rows: int) -> tuple[Rows, int]:
    """The row groups that hold so many rows from the object's row `first` on, and the place of that row in them."""
    ends = list(accumulate(obj.groups))
    starts = [end - count for end, count in zip(ends, obj.groups, strict=True)]
    groups = tuple(i for i, end in enumerate(ends) if end > first and starts[i] < first + rows)
    return Rows(uri, groups), first - starts[groups[0]] if groups else 0
