"""What attempts at a shard leave behind before, while and after its rows are asked: numbered, create-only records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchq import storage
from batchq.errors import AlreadyExists, StorageError
from batchq.output import layout
from batchq.records import Shard, restored, sealed, unsealed
from batchq.storage import failpoint

# Fields of a mark's search as they were called before, and as they are now.
RENAMED = {"strikes": "deaths", "convicted": "culprits", "barren": "losses_without_progress", "kept": "saved"}


@dataclass(frozen=True, slots=True)
class Search:
    """What a shard's attempts have shown of rows that may kill engines. Rows go by `Row.position`, in order.

    `deaths` counts, by weight, those since a culprit was found or all suspects were cleared; `suspects` None means any
    unanswered row; `alone` is the group asked with nothing beside it; `saved` how many rows of the shard need not
    be asked again; `losses_without_progress` how many engines in a row added none to these; `lost` how many the shard
    has cost in all.
    """

    deaths: int = 0
    suspects: tuple[int, ...] | None = ()
    alone: tuple[int, ...] = ()
    culprits: tuple[int, ...] = ()
    saved: int = 0
    losses_without_progress: int = 0
    lost: int = 0
    witnessed: bool = False  # an engine died under a living process, which no preemption does


@dataclass(frozen=True, slots=True)
class Mark:
    """One record of an attempt at a shard: it begins, it asks a group alone, or (`over`) its engine is gone.

    `in_flight`: the shard's rows that were in flight when the engine died, noted by the process that survived it.
    """

    attempt: str
    search: Search
    over: bool = False
    in_flight: tuple[int, ...] | None = None


def add(output: str, shard: Shard, mark: Mark, number: int) -> int:
    """Add a mark to the shard's attempts, create-only: before its rows are asked, and when more is learnt of them.

    `number` is the first that may be free; returns the one it got.
    """
    stated = sealed(dataclasses.asdict(mark))  # a byte that flips may still leave JSON, and accuse another row
    failpoint.reach("write.mark_attempt.before_put")
    while True:
        try:
            storage.create(layout.mark(output, shard.index, number), stated, staging=layout.staging(output))
            failpoint.reach("write.mark_attempt.after_put")
            return number
        except AlreadyExists:
            if storage.read(layout.mark(output, shard.index, number)) == stated:
                return number  # ours: the reply was lost
            number += 1


def read(output: str, shard: Shard) -> list[Mark]:
    """The shard's marks, oldest first. Raises StorageError for one that can't be read."""
    folder = layout.attempts(output, shard.index)
    return [_read(uri) for uri in sorted(s.uri for s in storage.list_objects(folder))]


def _read(uri: str) -> Mark:
    try:
        return from_json(storage.read_checked(uri, unsealed))
    except ValueError as error:
        raise StorageError(f"{uri}: is damaged; move it away and run again") from error


def from_json(data: Mapping[str, Any]) -> Mark:
    """A mark, also one of before its fields were renamed. Raises ValueError."""
    search = {RENAMED.get(name, name): value for name, value in data.get("search", {}).items()}
    return restored({**data, "search": search}, Mark)
