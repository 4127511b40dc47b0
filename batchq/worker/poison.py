"""Which row kills engines: bisection, from what a shard's attempts left behind. Pure.

A row is a culprit only when an engine died while that row alone was in flight. Whoever asks rows for a shard that has
lost engines withholds the suspects, lets everything else be answered first, and then asks half of the suspects with
nothing beside them, half of the rest if those were answered, and so on: each death halves the suspects, and a group
that is answered costs no engine. So one such row among n takes at most floor(log2(n)) + 2 engines: one for the first
death, and one more where that was a lost process, which may have been a preemption. If all are answered alone, no
row was to blame but memory pressure, and concurrency is lowered: for that shard only, if all deaths seen were lost
processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from batchq.output.marks import Mark, Search

CODE = "killed_engine"
MESSAGE = "the engine died whenever this row was in flight, at last with no other beside it"
LOST = 1  # what the end of a process counts: it may have been a preemption
DIED = 2  # what the death of an engine under a living process counts
SUSPICIOUS = 2  # from this weight of deaths on rows are suspected


def searching(search: Search) -> bool:
    return search.deaths >= SUSPICIOUS


def concurrency(search: Search, most: int) -> int:
    """Rows in flight while searching: halved with every death, in case it is memory that kills."""
    return max(1, most >> (search.deaths - 1)) if searching(search) else most


def progressed(search: Search, saved: int) -> Search:
    """`saved` rows of the shard need not be asked again."""
    return search if saved <= search.saved else dataclasses.replace(search, saved=saved, losses_without_progress=0)


def ask_alone(search: Search, group: Sequence[int]) -> Search:
    return dataclasses.replace(search, alone=tuple(group))


def clear(search: Search) -> Search:
    """All suspects were answered with nothing beside them."""
    return dataclasses.replace(search, deaths=0, suspects=(), alone=(), witnessed=False)


def died(search: Search, in_flight: Iterable[int] | None = None, weight: int = LOST) -> Search:
    """After an engine was lost. `in_flight`: the shard's rows that were; None if nobody could tell."""
    accused = search.alone or None if in_flight is None else tuple(sorted(in_flight))
    if accused == ():
        return search  # other shards' rows killed it
    after = dataclasses.replace(
        search,
        alone=(),
        suspects=accused,
        losses_without_progress=search.losses_without_progress + 1,
        lost=search.lost + 1,
        witnessed=search.witnessed or in_flight is not None,
    )
    if not search.alone:
        return dataclasses.replace(after, deaths=search.deaths + weight)
    if accused is not None and len(accused) == 1:  # the next death is suspicious at once
        culprits = (*search.culprits, *accused)
        return dataclasses.replace(after, deaths=SUSPICIOUS - 1, suspects=(), culprits=culprits, witnessed=False)
    return dataclasses.replace(after, deaths=search.deaths + 1)


def half(suspects: Sequence[Any]) -> int:
    """How many of the suspects, from their end, are asked alone next. They are the later ones, so that those before
    them are answered first: that tells a row that kills engines from an engine that answers nothing at all."""
    return max(1, len(suspects) // 2)


def resumed(marks: Sequence[Mark]) -> Search:
    """Where an attempt begins, from the marks before it. An end that nobody saw (a killed driver) accuses no row."""
    return dataclasses.replace(marks[-1].search, alone=()) if marks else Search()


def asked_alone(marks: Sequence[Mark], attempt: str) -> bool:
    """Whether the last that is known of `attempt` is that it asked a group with nothing beside it."""
    mine = [m for m in marks if m.attempt == attempt]
    return bool(mine) and not mine[-1].over and bool(mine[-1].search.alone)


def after_loss(marks: Sequence[Mark], attempt: str, innocent: bool = False) -> Mark | None:
    """The mark to add when `attempt` lost its engine; None if it never asked a row, or its end is noted already.
    `innocent`: another shard's rows were asked alone, so none of its own were in flight."""
    mine = [m for m in marks if m.attempt == attempt]
    if not mine or mine[-1].over:
        return None
    search = mine[-1].search
    return Mark(attempt, search if innocent else died(search), over=True)
