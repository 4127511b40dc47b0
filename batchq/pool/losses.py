"""What follows for a shard when the replica that labelled it is lost: a mark in the store, and words for a person."""

from __future__ import annotations

from batchq.errors import EngineError
from batchq.output import marks
from batchq.records import Shard
from batchq.worker import poison
from batchq.worker.spec import WorkerSpec


def note(spec: WorkerSpec, shard: Shard, attempt: str, most: int, why: str) -> str:
    """Note in the store that this attempt lost its engine; returns what follows for rows, if anything does.

    Raises EngineError when the shard has lost `most` engines in a row without progress, or too many in all. `why`: how
    the engine was lost, and where its log is.
    """
    noted = marks.read(spec.output, shard)
    if mark := poison.after_loss(noted, attempt):
        marks.add(spec.output, shard, mark, len(noted) + 1)
    ours = [m for m in [*noted, *([mark] if mark else [])] if m.attempt == attempt]
    if not ours:
        return ""  # none of its rows had been asked
    search, before = ours[-1].search, ours[0].search
    name = named(spec, shard)
    most_in_all = most * (spec.plan.rows_per_part.bit_length() + 2)
    if search.losses_without_progress >= most or search.lost > most_in_all:
        raise EngineError(f"{named(spec, shard)} lost its replica {search.lost} times {why}")
    if len(search.culprits) > len(before.culprits):
        object, position = shard.place(search.culprits[-1])
        return f"{spec.plan.objects[object].name}: the row at {position} kills engines; it becomes a failure"
    if poison.searching(search):
        count = "its unanswered rows" if search.suspects is None else f"{len(search.suspects)} rows"
        return f"{name}: {count} may kill engines; half of them are asked apart from the rest"
    return ""


def named(spec: WorkerSpec, shard: Shard) -> str:
    """A shard and its input file, as a person is told of them."""
    more = f" and {len(shard.more):,} more" if shard.more else ""
    return f"shard {shard.index} ({spec.plan.objects[shard.object].name}{more})"
