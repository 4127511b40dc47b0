"""One attempt at one shard: its parts in the making, and what of it is in the store: marks, spills, commits.

What touches the store blocks, and is called in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from batchq.config import TaskConfig
from batchq.output import marks, parts, receipts, spills
from batchq.output.marks import Mark, Search
from batchq.output.schema import schema_from_text
from batchq.records import Answer, Failure, Plan, Receipt, Shard, Usage
from batchq.worker import poison
from batchq.worker.batch import Batch, Known

# Bytes of rows in parts that aren't written yet: one that fills beside one that drains.
MOST_HELD = 2 * parts.PART_BYTES


@dataclass(slots=True, eq=False)
class Part:
    """An output object in the making; it is written once it is sealed and every row has its outcome."""

    index: int
    batches: list[Batch] = field(default_factory=list)
    pending: int = 0
    sealed: bool = False
    last: bool = False
    spilled: set[str] = field(default_factory=set)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None

    @property
    def size(self) -> int:
        """Bytes that its rows take, about."""
        return sum(batch.size for batch in self.batches)

    def seal(self, last: bool) -> None:
        """No more rows come."""
        self.sealed, self.last = True, last
        self.close_if_over()

    def close_if_over(self) -> None:
        if (self.sealed and not self.pending) or self.error:
            self.done.set()


@dataclass(slots=True, eq=False)
class Attempt:
    """One shard under way on this worker."""

    output: str
    plan: Plan
    task: TaskConfig
    shard: Shard
    id: str
    search: Search
    known: Known
    receipts: list[Receipt]  # of parts that were committed before it began
    marked: int  # marks that the shard has, ours and earlier ones
    parts: list[Part] = field(default_factory=list)  # open ones
    commits: list[asyncio.Task[Receipt]] = field(default_factory=list)
    committed: int = 0  # rows that this attempt committed
    withheld: list[tuple[Part, Batch, int]] = field(default_factory=list)  # suspects, to be asked alone
    saved: asyncio.Event = field(
        default_factory=asyncio.Event
    )  # set once the attempt is over and its answers are saved

    @classmethod
    def begin(cls, output: str, plan: Plan, task: TaskConfig, shard: Shard, attempt: str) -> Attempt:
        """What is known of the shard from the store; marks the attempt there if there is anything left to do.

        Before the shard's turn: a mark that the engine waited for cost a tenth of the speed.
        """
        earlier = marks.read(output, shard)
        committed = receipts.read_shard(output, shard)
        next_position = committed[-1].next_position if committed else 0
        start = 0 if shard.more else next_position  # ids tell of positions in an object
        known = spills.read(output, shard, plan.fingerprint, task, start)
        made = cls(output, plan, task, shard, attempt, poison.resumed(earlier), known, committed, len(earlier))
        if not made.finished:
            made.mark()
        return made

    @property
    def finished(self) -> bool:
        """Whether all its parts were committed before it began."""
        return bool(self.receipts) and self.receipts[-1].last

    def saved_rows(self) -> int:
        """Rows of the shard that need not be asked again once all is spilled."""
        batches = [b for p in self.parts for b in p.batches]
        answered = sum(isinstance(o, Answer) for b in batches for o in b.outcomes) - sum(
            len(b.from_reuse) for b in batches
        )
        before = sum(r.usage.rows for r in self.receipts)
        return before + self.committed + max(answered, len(self.known) - self.committed)

    def in_flight(self) -> list[int]:
        return [
            b.positions[i]
            for p in self.parts
            for b in p.batches
            for i, outcome in enumerate(b.outcomes)
            if outcome is None and b.prompts[i] is None
        ]

    # -- marks ---------------------------------------------------------------------------------

    def mark(self) -> None:
        """Note in the store how far the attempt and its search are."""
        self.search = poison.progressed(self.search, self.saved_rows())
        self.note(Mark(self.id, self.search))

    def death(self, weight: int) -> Mark:
        """The mark of an engine's death, with the rows that were in flight: the next attempt suspects no others."""
        in_flight = tuple(self.in_flight())
        search = poison.progressed(self.search, self.saved_rows())
        return Mark(self.id, poison.died(search, in_flight, weight), True, in_flight)

    def note(self, mark: Mark) -> None:
        self.marked = marks.add(self.output, self.shard, mark, self.marked + 1)

    # -- answers -------------------------------------------------------------------------------

    def commit(self, part: Part, quarantined: str) -> Receipt:
        """Publish a part whose every row has its outcome; returns its receipt, which may be another attempt's.

        `quarantined`: why the rest of the shard's input can't be read.
        """
        batches = part.batches
        outcomes: list[Any] = [o for b in batches for o in b.outcomes]
        assert all(o is not None for o in outcomes), "a part is written when every row has an outcome"
        golds = [g for b in batches for g in b.golds]
        usage, labels, failures = parts.usage_of(outcomes, golds, self.task)
        receipt = Receipt(
            shard=self.shard.index,
            part=part.index,
            last=part.last,
            attempt=self.id,
            fingerprint=self.plan.fingerprint,
            usage=usage if batches else Usage(),
            labels=labels,
            failures=failures,
            next_position=batches[-1].positions[-1] + 1 if batches else 0,
            from_spill=sum(b.from_spill for b in batches),
            from_reuse=sum(len(b.from_reuse) for b in batches),
            from_reuse_tokens=sum(_tokens(b.outcomes[i]) for b in batches for i in b.from_reuse),
            quarantined=quarantined,
        )
        columns = parts.outcome_columns(
            self.task,
            [i for b in batches for i in b.ids],
            [k for b in batches for k in b.keys],
            outcomes,
            [r for b in batches for r in b.raws],
        )
        schema = schema_from_text(self.plan.schema)
        for column in schema:
            if column.name not in columns:
                columns[column.name] = pa.chunked_array([b.inputs.column(column.name) for b in batches], column.type)
        table = pa.table([columns[name] for name in schema.names], schema=schema)
        return parts.commit(self.output, self.shard, receipt, table)

    def spill(self, open_parts: list[Part], number: int) -> None:
        """Save the answers that no spill, no commit and no other run holds yet."""
        ids: list[str] = []
        keys: list[str | None] = []
        answers: list[Answer | Failure] = []
        for part in open_parts:
            for batch in part.batches:
                for i, outcome in enumerate(batch.outcomes):
                    if isinstance(outcome, Answer) and i not in batch.from_reuse and batch.ids[i] not in part.spilled:
                        ids.append(batch.ids[i])
                        keys.append(batch.keys[i])
                        answers.append(outcome)
        if ids:
            columns = parts.outcome_columns(self.task, ids, keys, answers, [None] * len(ids))
            spills.save(self.output, self.shard, self.id, number, self.plan.fingerprint, columns)
            for part in open_parts:
                part.spilled.update(ids)


async def room(attempts: Iterable[Attempt]) -> None:
    """Wait while parts take more memory than MOST_HELD, for one that is full to be written. Rows that need no engine
    would fill the memory otherwise, as fast as they are read."""
    while sum(part.size for made in attempts for part in made.parts) > MOST_HELD:
        writing = [commit for made in attempts for commit in made.commits if not commit.done()]
        if not writing:
            return
        await asyncio.wait(writing, return_when=asyncio.FIRST_COMPLETED)


def _tokens(outcome: Answer | Failure | None) -> int:
    return outcome.prompt_tokens + outcome.output_tokens if isinstance(outcome, Answer) else 0
