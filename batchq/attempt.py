"""One attempt at one shard: its parts in the making, and what of it stands in the store: marks, spills, commits.

What touches the store blocks, and is called in a thread.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from batchq import poison, storage, write
from batchq.batch import Batch, Known
from batchq.config import TaskConfig
from batchq.output import layout
from batchq.poison import Mark, Search
from batchq.records import Answer, Failure, Plan, Receipt, Shard, Usage


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

    def seal(self, last: bool) -> None:
        """No more rows come."""
        self.sealed, self.last = True, last
        self.settle()

    def settle(self) -> None:
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
    standing: list[Receipt]  # parts that are committed already
    marks: int  # that the shard has, ours and earlier ones
    parts: list[Part] = field(default_factory=list)  # open ones
    commits: list[asyncio.Task[Receipt]] = field(default_factory=list)
    committed: int = 0  # rows
    withheld: list[tuple[Part, Batch, int]] = field(default_factory=list)  # suspects, to be asked alone
    kept: asyncio.Event = field(default_factory=asyncio.Event)  # over, one way or another, and nothing to lose

    @classmethod
    def begin(cls, output: str, plan: Plan, task: TaskConfig, shard: Shard, attempt: str) -> Attempt:
        """What is known of the shard from the store; marks the attempt there if there is anything left to do.

        Before the shard's turn: a mark that the engine waited for cost a tenth of the speed.
        """
        marks = [poison.from_json(m) for m in write.read_marks(output, shard)]
        known = write.read_spills(output, shard, plan.fingerprint, task)
        standing = standing_parts(output, shard)
        made = cls(output, plan, task, shard, attempt, poison.resumed(marks), known, standing, len(marks))
        if not made.finished:
            made.mark()
        return made

    @property
    def finished(self) -> bool:
        """Whether all its parts stood before it began."""
        return bool(self.standing) and (self.standing[-1].last or self.shard.range.unit != "stream")

    def keeps(self) -> int:
        """Rows of the shard that need not be asked again once all is spilled."""
        batches = [b for p in self.parts for b in p.batches]
        answered = sum(isinstance(o, Answer) for b in batches for o in b.outcomes) - sum(len(b.copied) for b in batches)
        standing = sum(r.usage.rows for r in self.standing)
        return standing + self.committed + max(answered, len(self.known) - standing)

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
        self.search = self.search.keeps(self.keeps())
        self.note(Mark(self.id, self.search))

    def death(self, strikes: int) -> Mark:
        """That the engine died, and which rows were in flight: the next attempt suspects those and no others."""
        in_flight = tuple(self.in_flight())
        return Mark(self.id, self.search.keeps(self.keeps()).died(in_flight, strikes), True, in_flight)

    def note(self, mark: Mark) -> None:
        self.marks = write.mark_attempt(self.output, self.shard, poison.to_json(mark), self.marks + 1)

    # -- answers -------------------------------------------------------------------------------

    def commit(self, part: Part, quarantined: str) -> Receipt:
        """Publish a part whose every row has its outcome; returns the receipt that stands for it.

        `quarantined`: why the rest of the shard's input can't be read.
        """
        batches = part.batches
        outcomes: list[Any] = [o for b in batches for o in b.outcomes]
        assert all(o is not None for o in outcomes), "a part is written when every row has an outcome"
        golds = [g for b in batches for g in b.golds]
        usage, labels, failures = write.usage_of(outcomes, golds, self.task)
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
            reused=sum(b.reused for b in batches),
            copied=sum(len(b.copied) for b in batches),
            copied_tokens=sum(_tokens(b.outcomes[i]) for b in batches for i in b.copied),
            quarantined=quarantined,
        )
        columns = write.outcome_columns(
            self.task,
            [i for b in batches for i in b.ids],
            [k for b in batches for k in b.keys],
            outcomes,
            [r for b in batches for r in b.raws],
        )
        schema = write.schema_from_text(self.plan.schema)
        for column in schema:
            if column.name not in columns:
                columns[column.name] = pa.chunked_array([b.inputs.column(column.name) for b in batches], column.type)
        table = pa.table([columns[name] for name in schema.names], schema=schema)
        return write.commit(self.output, self.shard, receipt, table)

    def spill(self, parts: list[Part], number: int) -> None:
        """Save the answers that no spill, no commit and no other run holds yet."""
        ids: list[str] = []
        keys: list[str | None] = []
        answers: list[Answer | Failure] = []
        for part in parts:
            for batch in part.batches:
                for i, outcome in enumerate(batch.outcomes):
                    if isinstance(outcome, Answer) and i not in batch.copied and batch.ids[i] not in part.spilled:
                        ids.append(batch.ids[i])
                        keys.append(batch.keys[i])
                        answers.append(outcome)
        if ids:
            columns = write.outcome_columns(self.task, ids, keys, answers, [None] * len(ids))
            write.spill(self.output, self.shard, self.id, number, self.plan.fingerprint, columns)
            for part in parts:
                part.spilled.update(ids)


def standing_parts(output: str, shard: Shard) -> list[Receipt]:
    """Receipts of a shard's parts that are committed already, in order and without a gap."""
    found: list[Receipt] = []
    while True:
        uri = layout.part(output, shard, len(found))
        if not storage.exists(uri):
            return found
        found.append(write.read_receipt(uri))
        if found[-1].last:
            return found


def _tokens(outcome: Answer | Failure | None) -> int:
    return outcome.prompt_tokens + outcome.output_tokens if isinstance(outcome, Answer) else 0
