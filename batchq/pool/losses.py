"""What follows for a shard when the replica that labelled it is lost: a mark in the store, and words for a person."""

from __future__ import annotations

from collections.abc import Sequence

from batchq.errors import EngineError
from batchq.output import marks
from batchq.output.marks import Mark
from batchq.records import Shard
from batchq.worker import poison
from batchq.worker.spec import WorkerSpec


def note(spec: WorkerSpec, lost: Sequence[tuple[Shard, str]], most: int, why: str) -> list[tuple[Shard, str]]:
    """Note in the store that these attempts at shards lost the engine that they shared; returns what follows for rows
    of which shard, if anything does.

    Raises EngineError when a shard has lost `most` engines in a row without progress, or too many in all. `why`: how
    the engine was lost, and where its log is.
    """
    noted = {attempt: marks.read(spec.output, shard) for shard, attempt in lost}
    # A replica begins its next shard while it still searches one. That one took no part in the death of a group that
    # was asked alone, and would be given up for it: a search takes up to log2(rows) + 2 engines.
    alone = {attempt for attempt, its in noted.items() if poison.asked_alone(its, attempt)}
    followed = []
    for shard, attempt in lost:
        innocent = bool(alone) and attempt not in alone
        if mark := poison.after_loss(noted[attempt], attempt, innocent):
            marks.add(spec.output, shard, mark, len(noted[attempt]) + 1)
        ours = [m for m in [*noted[attempt], *([mark] if mark else [])] if m.attempt == attempt]
        if ours and not innocent and (words := _words(spec, shard, ours, most, why)):
            followed.append((shard, words))
    return followed


def _words(spec: WorkerSpec, shard: Shard, ours: Sequence[Mark], most: int, why: str) -> str:
    """What follows for a shard's rows, from all marks of the attempt that was lost. Raises EngineError as `note`."""
    search, before = ours[-1].search, ours[0].search
    name = named(spec, shard)
    most_in_all = most * (spec.plan.rows_per_part.bit_length() + 2)
    if search.losses_without_progress >= most or search.lost > most_in_all:
        raise EngineError(f"{name} lost its replica {search.lost} times {why}")
    if len(search.culprits) > len(before.culprits):
        object, position = shard.place(search.culprits[-1])
        where = spec.plan.objects[object].uri
        return f"{where}: the row whose batchq_id ends in {position} kills engines; it becomes a failure"
    if poison.searching(search):
        count = "its unanswered rows" if search.suspects is None else f"{len(search.suspects)} rows"
        return f"{name}: {count} may kill engines; half of them are asked apart from the rest"
    return ""


def named(spec: WorkerSpec, shard: Shard) -> str:
    """A shard and its input file, as a person is told of them."""
    more = f" and {len(shard.more):,} more" if shard.more else ""
    return f"shard {shard.index} ({spec.plan.objects[shard.object].name}{more})"
