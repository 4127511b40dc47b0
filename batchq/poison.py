"""Which row kills engines: halving, from what a shard's attempts left behind. Pure.

A row is convicted only when an engine died while that row alone was in flight. Whoever asks rows for a shard that has
lost engines withholds the suspects, lets everything else be answered first, and then asks half of the suspects with
nothing beside them, half of the rest if those were answered, and so on: each death halves the suspects, and a group
that is answered costs no engine. So one such row among n takes at most floor(log2(n)) + 2 engines: one for the first
death, and one more where that was a lost process, which may have been a preemption. If all are answered alone, it was
no row but memory pressure, and concurrency is lowered (for that shard only, where all that was seen is lost processes).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

CODE = "killed_engine"
MESSAGE = "the engine died whenever this row was in flight, at last with no other beside it"
LOST = 1  # what the end of a process counts: it may have been a preemption
DIED = 2  # what the death of an engine under a living process counts
SEARCH = 2  # from here on rows are suspected


@dataclass(frozen=True, slots=True)
class Search:
    """What a shard's attempts have shown. Rows go by `Row.position`, in order.

    `strikes` counts deaths since the last conviction or acquittal; `suspects` None means any unanswered row; `alone` is
    the group asked with nothing beside it; `kept` how many rows of the shard had been kept; `barren` how many engines
    in a row kept no more; `lost` how many engines the shard has cost in all.
    """

    strikes: int = 0
    suspects: tuple[int, ...] | None = ()
    alone: tuple[int, ...] = ()
    convicted: tuple[int, ...] = ()
    kept: int = 0
    barren: int = 0
    lost: int = 0
    witnessed: bool = False  # an engine died under a living process, which no preemption does

    @property
    def searching(self) -> bool:
        return self.strikes >= SEARCH

    def concurrency(self, most: int) -> int:
        """Rows in flight while searching: halved with every death, in case it is memory that kills."""
        return max(1, most >> (self.strikes - 1)) if self.searching else most

    def keeps(self, kept: int) -> Search:
        return self if kept <= self.kept else dataclasses.replace(self, kept=kept, barren=0)

    def asks_alone(self, group: Sequence[int]) -> Search:
        return dataclasses.replace(self, alone=tuple(group))

    def acquits(self) -> Search:
        """All suspects were answered with nothing beside them."""
        return dataclasses.replace(self, strikes=0, suspects=(), alone=(), witnessed=False)

    def died(self, in_flight: Iterable[int] | None = None, strikes: int = LOST) -> Search:
        """After an engine was lost. `in_flight`: the shard's rows that were; None if nobody could tell."""
        accused = self.alone or None if in_flight is None else tuple(sorted(in_flight))
        if accused == ():
            return self  # other shards' rows killed it
        after = dataclasses.replace(
            self,
            alone=(),
            suspects=accused,
            barren=self.barren + 1,
            lost=self.lost + 1,
            witnessed=self.witnessed or in_flight is not None,
        )
        if not self.alone:
            return dataclasses.replace(after, strikes=self.strikes + strikes)
        if accused is not None and len(accused) == 1:  # the next death is suspicious at once
            convicted = (*self.convicted, *accused)
            return dataclasses.replace(after, strikes=SEARCH - 1, suspects=(), convicted=convicted, witnessed=False)
        return dataclasses.replace(after, strikes=self.strikes + 1)


def half(suspects: Sequence[Any]) -> int:
    """How many of the suspects, from their end, are asked alone next. The later ones, because what stands before
    them is then answered first, and an engine that answers nothing at all is told from a row that kills it."""
    return max(1, len(suspects) // 2)


@dataclass(frozen=True, slots=True)
class Mark:
    """One record of an attempt at a shard: it begins, it asks a group alone, or (`over`) its engine is gone.

    `in_flight`: the shard's rows that were in flight when the engine died, noted by the process that survived it.
    """

    attempt: str
    search: Search
    over: bool = False
    in_flight: tuple[int, ...] | None = None


def to_json(mark: Mark) -> dict[str, Any]:
    return dataclasses.asdict(mark)


def from_json(data: dict[str, Any]) -> Mark:
    search = dict(data.get("search") or {})
    for name in ("suspects", "alone", "convicted"):
        if search.get(name) is not None:
            search[name] = tuple(search[name])
    in_flight = data.get("in_flight")
    return Mark(
        data["attempt"],
        Search(**search),
        bool(data.get("over")),
        None if in_flight is None else tuple(in_flight),
    )


def resumed(marks: Sequence[Mark]) -> Search:
    """Where an attempt begins, from the marks before it. An end that nobody saw (a killed driver) accuses no row."""
    return dataclasses.replace(marks[-1].search, alone=()) if marks else Search()


def after_loss(marks: Sequence[Mark], attempt: str) -> Mark | None:
    """The mark to add when `attempt` lost its engine; None if it never asked a row, or its end is noted already."""
    mine = [m for m in marks if m.attempt == attempt]
    if not mine or mine[-1].over:
        return None
    return Mark(attempt, mine[-1].search.died(), over=True)
