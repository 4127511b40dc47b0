"""One shard: read -> prompt -> infer -> write, fed continuously. Knows nothing of Ray.

Reading, rendering and tokenising run in threads, a batch ahead of the engine; each row is handed
to the engine as soon as there is a place in flight; a part is written when its last row is
answered. One shard feeds at a time, but the next begins while the last one drains, so the engine
never waits at a shard's end.

When the engine dies, stalls or is told to leave, every answer is spilled before anything is raised,
and what was in flight is noted; poison.py says what the next attempt makes of that.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from batchq import models, poison, read, storage, write
from batchq.account import PhaseClock, computed_tokens
from batchq.config import TaskConfig
from batchq.engine import Engine, EngineSpec
from batchq.errors import BatchqError, EngineError, EngineOutOfMemory, InputError, RowError, Stopped
from batchq.fake_engine import FakeEngine
from batchq.hardware import EnergyMeter
from batchq.poison import Mark, Search
from batchq.records import Answer, Failure, Plan, Receipt, Row, Shard, Usage
from batchq.reuse import Reuse
from batchq.task import Task
from batchq.vllm_engine import VllmEngine, import_ahead

_TEXT = frozenset({str, type(None)})  # anything else in a column planned as text is kept as JSON
BATCH = 256  # rows read, rendered and tokenised at a time
SETTLE_SECONDS = 2.0  # that a dead engine's other requests have to fail in, and its last answers to come
LEFT = "stopped while a shard was under way; its answers so far are kept"
KEEP_SECONDS = 20.0  # that a shard waits, before it raises, for the others to be spilled


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a worker needs, sent to it once. `plan` comes without its shards."""

    plan: Plan
    task: TaskConfig
    engine: EngineSpec
    output: str
    chat_template: dict[str, Any]
    in_flight: int
    spill_seconds: float
    stall_seconds: float
    quarantine: bool = False  # a shard whose input can't be read on ends there, and its receipt says why


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far a worker is; counts everything it answered, committed or not."""

    phase: str
    phases: dict[str, float]
    cpu: dict[str, float]
    rows: int
    tokens: int
    lowered: int = 0  # rows that may be in flight since memory was found short; 0: as many as were asked for
    first: float | None = None  # seconds since the first answer
    computed: int = 0  # tokens that went through the model's layers
    joules: float | None = None  # that its GPUs took since the engine was ready, where that is counted


@dataclass(slots=True)
class Batch:
    """Rows on their way: columns already in Arrow, prompts already tokenised.

    A row is in flight when both its prompt and its outcome are None.
    """

    part: int
    ids: list[str]
    positions: list[int]
    inputs: pa.RecordBatch
    prompts: list[list[int] | None]  # None: asked, failed, or answered by an earlier attempt
    keys: list[str | None]
    outcomes: list[Answer | Failure | None]
    raws: list[str | None]
    golds: list[str | None]
    reused: int = 0
    copied: frozenset[int] = frozenset()  # rows whose answer is another run's


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

    def settle(self) -> None:
        if (self.sealed and not self.pending) or self.error:
            self.done.set()


@dataclass(slots=True, eq=False)
class Attempt:
    """One shard under way on this worker."""

    shard: Shard
    id: str
    search: Search
    known: dict[str, tuple[str | None, Answer]]  # answers that earlier attempts spilled
    standing: list[Receipt]  # parts that are committed already
    parts: list[Part] = field(default_factory=list)  # open ones
    commits: list[asyncio.Task[Receipt]] = field(default_factory=list)
    committed: int = 0  # rows
    withheld: list[tuple[Part, Batch, int]] = field(default_factory=list)  # suspects, to be asked alone
    marks: int = 0  # that the shard has, ours and earlier ones
    kept: asyncio.Event = field(default_factory=asyncio.Event)  # over, one way or another, and nothing to lose

    @property
    def finished(self) -> bool:
        """Whether all its parts stood before it began."""
        return bool(self.standing) and (self.standing[-1].last or self.shard.unit != "stream")

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


def open_engine(spec: EngineSpec) -> Engine:
    """An engine of the kind that is asked for, not started yet."""
    if spec.kind == "fake":
        return FakeEngine(spec)
    if spec.device == "cpu":  # not tried on a GPU, where a forked process must not have touched CUDA
        import_ahead(spec)
    return VllmEngine(spec)


class Worker:
    """One engine and the shards it is given. All methods run on one event loop."""

    def __init__(self, spec: WorkerSpec, clock: PhaseClock | None = None, engine: Engine | None = None) -> None:
        """`clock` runs since this process was given its devices; `engine` may be up already."""
        self.spec = spec
        self.clock = clock or PhaseClock("start")
        self.schema = write.schema_from_text(spec.plan.schema)
        self.columns = write.input_columns(self.schema, spec.task)
        self.extra = write.EXTRA.name in self.schema.names
        self.engine = engine or open_engine(spec.engine)
        self.task: Task
        self.reuse: Reuse | None = None
        plan = spec.plan
        answers = [plan.checkpoint, plan.ingredients["engine"], plan.ingredients["quantization"]]
        self.answerer = models.digest_of(answers)  # what else than the prompt decides an answer
        self.room = asyncio.Event()  # set whenever a row in flight is answered
        self.intake = asyncio.Lock()
        self.threads = ThreadPoolExecutor(4, thread_name_prefix="batchq")
        self.stopping = False
        self.ended: BaseException | None = None  # the engine's death, or that the time to leave is up
        self.in_flight = spec.in_flight
        self.lowered = 0  # what in_flight had to be lowered to, because memory was short
        self.attempts: set[Attempt] = set()
        self._watch: asyncio.Task[None] | None = None
        self._convicted = False  # an earlier engine's death has been explained by a row
        self.cpu: dict[str, float] = dict.fromkeys(("read", "render", "tokenize", "write"), 0.0)
        self.quarantined: dict[int, str] = {}  # shard -> why its input can't be read to its end
        self._under_way = 0
        self._rows = 0
        self._tokens = 0
        self._first: float | None = None  # when the first answer came, on time.monotonic()'s clock
        self._computed = 0
        self._energy: EnergyMeter | None = None

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the tokenizer and the engine. Raises EngineError or ConfigError."""
        self.clock.enter("load")
        tokenizer = await self._thread(
            models.open_tokenizer, self.spec.engine.model, self.spec.engine.trust_remote_code
        )
        self.task = Task(self.spec.task, tokenizer, self.spec.plan.columns, self.spec.chat_template)
        reuse = self.spec.plan.reuse
        index = asyncio.ensure_future(self._thread(Reuse, reuse, self.spec.task)) if reuse else None
        phases = await self.engine.start()
        if index:
            self.reuse = await index
        if self.spec.engine.device == "cuda":
            self._energy = await self._thread(EnergyMeter)
        self.clock.enter("idle")
        self.clock.move("load", "compile", phases.get("compile", 0.0))
        self._watch = asyncio.create_task(self._watch_for_stalls())

    def stop(self, grace: float) -> None:
        """Take no more rows; what is in flight is finished if it is within `grace` seconds, the rest is given up,
        all answers are spilled, and `label` raises Stopped."""
        self.stopping = True
        self.room.set()
        asyncio.get_running_loop().call_later(grace, lambda: self._end(Stopped(LEFT)))

    async def close(self) -> None:
        if self._watch:
            self._watch.cancel()
        await self.engine.close()
        self.threads.shutdown(wait=False)

    def snapshot(self) -> Snapshot:
        return Snapshot(
            self.clock.phase,
            self.clock.seconds(),
            {k: round(v, 3) for k, v in self.cpu.items()},
            self._rows,
            self._tokens,
            self.lowered,
            None if self._first is None else time.monotonic() - self._first,
            self._computed,
            self._energy.joules() if self._energy else None,
        )

    # -- a shard -------------------------------------------------------------------------------

    async def label(self, shard: Shard, attempt: str = "") -> list[Receipt]:
        """Label one shard and commit its parts; returns the receipts that now stand for it.

        Raises EngineError when the engine died or stalled, Stopped after `stop`, InputError or StorageError
        when reading or writing failed for good. Whatever was answered by then has been spilled.
        """
        made = await self._thread(self._begin, shard, attempt or uuid.uuid4().hex)
        standing = made.standing
        if made.finished:
            return standing  # type: ignore[no-any-return]
        self.attempts.add(made)
        spiller = asyncio.create_task(self._spill_regularly(made))
        try:
            async with self.intake:
                await self._feed(made)
            receipts = await asyncio.gather(*made.commits)
        except BaseException:
            for task in made.commits:
                task.cancel()
            await asyncio.gather(*made.commits, return_exceptions=True)
            if isinstance(self.ended, EngineError):
                await self._drain(SETTLE_SECONDS)
            await self._spill_safely(made, time.time_ns())
            if isinstance(self.ended, EngineError) and not self.stopping:  # a signal to all may have ended the engine
                await self._note_death(made)
            made.kept.set()
            if self.ended or self.stopping:  # whoever hears of it may end this process
                waits = [asyncio.ensure_future(other.kept.wait()) for other in self.attempts]
                _, late = await asyncio.wait(waits, timeout=KEEP_SECONDS)
                for task in late:
                    task.cancel()
            raise
        finally:
            made.kept.set()
            self.attempts.discard(made)
            spiller.cancel()
            await asyncio.gather(spiller, return_exceptions=True)
        await self._thread(write.drop_spills, self.spec.output, shard)
        return [*standing, *receipts]

    def _begin(self, shard: Shard, attempt: str) -> Attempt:
        """What is known of the shard from the store; marks the attempt there if there is anything left to do.

        In a thread, and before the shard's turn: a mark that the engine waited for cost a tenth of the speed.
        """
        marks = [poison.from_json(m) for m in write.read_marks(self.spec.output, shard)]
        known = write.read_spills(self.spec.output, shard, self.spec.plan.fingerprint, self.spec.task)
        made = Attempt(shard, attempt, poison.resumed(marks), known, self._standing_parts(shard), marks=len(marks))
        if not made.finished:
            self._write_mark(made)
        return made

    def _write_mark(self, made: Attempt) -> None:
        made.search = made.search.keeps(made.keeps())
        mark = poison.to_json(Mark(made.id, made.search))
        made.marks = write.mark_attempt(self.spec.output, made.shard, mark, made.marks + 1)

    async def _feed(self, made: Attempt) -> None:
        """Hand the shard's rows to the engine, in order, as places in flight come free."""
        self._raise_if_over()
        first = len(made.standing)
        skip = made.standing[-1].next_position if made.standing else 0
        batches = self._batches(made.shard, first, skip, made.known)
        part = Part(first)
        made.parts.append(part)
        ahead = asyncio.ensure_future(self._thread(next, batches, None))
        convicted, suspects = frozenset(made.search.convicted), made.search.suspects
        self._convicted |= bool(convicted)
        careful = bool(convicted) or made.search.searching
        self.in_flight = self.lowered or self.spec.in_flight
        if careful and made.search.searching:
            self.in_flight = made.search.concurrency(min(self.in_flight, self.spec.engine.max_num_seqs))
        while (batch := await ahead) is not None:
            ahead = asyncio.ensure_future(self._thread(next, batches, None))
            if self.ended:
                raise self.ended
            for commit in made.commits:
                if commit.done():
                    commit.result()  # a part that can't be written ends the shard now, not at its end
            if batch.part != part.index:
                await self._search(made)
                self._seal(made, part, False)
                part = Part(batch.part)
                made.parts.append(part)
            part.batches.append(batch)
            for i, prompt in enumerate(batch.prompts):
                if prompt is None:
                    self._rows += 1
                    continue
                if careful:
                    position = batch.positions[i]
                    if position in convicted:
                        batch.outcomes[i], batch.prompts[i] = Failure(poison.CODE, poison.MESSAGE), None
                        self._rows += 1
                        continue
                    if made.search.searching and (suspects is None or position in suspects):
                        made.withheld.append((part, batch, i))
                        part.pending += 1
                        continue
                    if suspects and position > suspects[-1]:
                        await self._search(made)
                        suspects = ()
                while self._under_way >= self.in_flight and not (part.error or self.stopping):
                    self.room.clear()
                    await self.room.wait()
                if part.error:
                    raise part.error
                if self.stopping:
                    ahead.cancel()
                    await self._drain()
                    raise Stopped(LEFT)
                part.pending += 1
                self._hand_over(part, batch, i, prompt)
        await self._search(made)
        self._seal(made, part, True)

    def _raise_if_over(self) -> None:
        if self.ended:
            raise self.ended
        if self.stopping:
            raise Stopped(LEFT)

    def _hand_over(self, part: Part, batch: Batch, i: int, prompt: list[int]) -> None:
        batch.prompts[i] = None  # from here on the row is in flight
        self._enter(+1)
        asyncio.create_task(self._ask(part, batch, i, prompt)).add_done_callback(_never_silent)

    async def _search(self, made: Attempt) -> None:
        """Ask the suspects that were withheld, in groups with nothing else in flight; see poison.py.

        Returns when all were answered: then it was no row that killed the engine.
        """
        if not made.search.searching:
            return
        left, made.withheld = made.withheld, []
        suspected = bool(left)
        while left:
            await self._nothing_in_flight(made)
            group = left[-poison.half(left) :]
            del left[-len(group) :]
            made.search = made.search.asks_alone([batch.positions[i] for _, batch, i in group])
            await self._thread(self._write_mark, made)
            for part, batch, i in group:
                while self._under_way >= self.in_flight and not (part.error or self.stopping):
                    self.room.clear()
                    await self.room.wait()
                prompt = batch.prompts[i]
                if self.stopping or part.error or prompt is None:
                    break
                self._hand_over(part, batch, i, prompt)
        if not suspected:
            self.in_flight = self.lowered or self.spec.in_flight
            return
        await self._nothing_in_flight(made)
        if made.search.witnessed and not self._convicted:
            self.lowered = self.in_flight
        elif self._convicted:
            self.in_flight = self.lowered or self.spec.in_flight
        made.search = made.search.acquits()
        await self._thread(self._write_mark, made)

    async def _nothing_in_flight(self, made: Attempt) -> None:
        """Wait for what is, this shard's and others', and keep it. Raises what ended the engine, or Stopped."""
        while self._under_way and not self.ended:
            self.room.clear()
            await self.room.wait()
        self._raise_if_over()
        await self._spill_safely(made, time.time_ns())

    async def _note_death(self, made: Attempt) -> None:
        """Leave behind which rows were in flight: the next attempt suspects those and no others."""
        in_flight = tuple(made.in_flight())
        strikes = poison.LOST if isinstance(self.ended, EngineOutOfMemory) else poison.DIED
        mark = Mark(made.id, made.search.keeps(made.keeps()).died(in_flight, strikes), True, in_flight)
        try:
            await self._thread(write.mark_attempt, self.spec.output, made.shard, poison.to_json(mark), made.marks + 1)
        except BatchqError as error:  # without it more rows are suspected than need be
            print(f"batchq: shard {made.shard.index}: its mark failed: {error}", file=sys.stderr, flush=True)

    def _seal(self, made: Attempt, part: Part, last: bool) -> None:
        part.sealed, part.last = True, last
        part.settle()
        made.commits.append(asyncio.create_task(self._commit(made, part)))

    async def _ask(self, part: Part, batch: Batch, i: int, prompt: list[int]) -> None:
        try:
            answer = self.task.answer(await self.engine.ask(prompt, self.task.sampling))
            batch.outcomes[i] = answer
            self._first = self._first or time.monotonic()
            self._tokens += answer.prompt_tokens + answer.output_tokens
            self._computed += computed_tokens(answer.prompt_tokens, answer.cached_tokens, answer.output_tokens)
        except RowError as error:
            batch.outcomes[i] = Failure(error.code, error.message)
        except EngineError as error:
            self._end(error)
            part.error = part.error or self.ended
        except BaseException as error:
            part.error = error if isinstance(error, Exception) else EngineError("a request was cancelled")
        finally:
            self._rows += 1
            self._enter(-1)
            self.room.set()
            part.pending -= 1
            part.settle()

    async def _commit(self, made: Attempt, part: Part) -> Receipt:
        await part.done.wait()
        if part.error:
            raise part.error
        receipt: Receipt = await self._thread(self._write, part, made.shard, made.id)
        made.parts.remove(part)
        made.committed += receipt.usage.rows
        return receipt

    def _end(self, error: BaseException) -> None:
        """The engine is of no more use: no shard waits for it any longer."""
        if self.ended:
            return
        self.ended = error
        for made in self.attempts:
            for part in made.parts:
                if part.pending or not part.sealed:
                    part.error = part.error or error
                    part.settle()
        self.room.set()

    async def _watch_for_stalls(self) -> None:
        limit = self.spec.stall_seconds
        seen, since = -1, 0.0
        while not self.ended:
            await asyncio.sleep(min(limit / 4, 10.0))
            now = time.monotonic()
            if self._rows != seen or not self._under_way:
                seen, since = self._rows, now
            elif now - since >= limit:
                self._end(
                    EngineError(f"{self._under_way} rows in flight and no answer for engine.stall_timeout_s={limit:g}")
                )

    async def _drain(self, seconds: float = float("inf")) -> None:
        """Wait for what is in flight, until the end is called; with a limit even then, for a dead engine's others."""
        deadline = time.monotonic() + seconds
        while self._under_way and time.monotonic() < deadline and (seconds < float("inf") or not self.ended):
            await asyncio.sleep(0.02)

    def _enter(self, change: int) -> None:
        """Keep the phase clock: the engine infers while anything is in flight, and idles otherwise."""
        self._under_way += change
        if self._under_way == 1 and change == 1:
            self.clock.enter("infer")
        elif self._under_way == 0:
            self.clock.enter("idle")

    # -- in threads ----------------------------------------------------------------------------

    async def _thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.thread_time()
        try:
            yield
        finally:
            self.cpu[what] += time.thread_time() - began

    def _standing_parts(self, shard: Shard) -> list[Receipt]:
        """Receipts of this shard's parts that are committed already, in order and without a gap."""
        found: list[Receipt] = []
        while True:
            uri = storage.join(self.spec.output, write.part_name(shard, len(found)))
            if not storage.exists(uri):
                return found
            found.append(write.read_receipt(uri))
            if found[-1].last:
                return found

    def _batches(
        self, shard: Shard, part: int, skip: int, known: dict[str, tuple[str | None, Answer]]
    ) -> Iterator[Batch]:
        """The shard's rows in batches; none straddles two parts."""
        rows = self._readable_rows(shard, skip)
        if shard.unit == "stream":
            if shard.stop:
                rows = itertools.takewhile(lambda row: row.position < shard.stop, rows)
            size = self.spec.plan.rows_per_part
            while True:
                room = size
                while room:
                    batch = self._batch(part, rows, min(BATCH, room), known)
                    if batch is None:
                        return
                    yield batch
                    room -= len(batch.ids)
                part += 1
        while (batch := self._batch(part, rows, BATCH, known)) is not None:
            yield batch

    def _readable_rows(self, shard: Shard, skip: int) -> Iterator[Row]:
        """The shard's rows, up to where its input can't be read on; read twice there before it is believed.

        Raises InputError, unless such input is to be quarantined.
        """
        source = self.spec.plan.objects[shard.object]
        # Where unknown keys are kept, all are read.
        columns = None if self.extra else list(self.spec.plan.columns)
        where = (source, self.spec.plan.format, shard.unit, shard.start, shard.stop)
        failed_at = -1
        while True:
            try:
                for row in read.read_rows(*where, columns=columns, skip_until=skip):
                    yield row
                    skip = row.position + 1
                return
            except InputError as error:
                if failed_at != skip:
                    failed_at = skip  # it may have been damaged on its way
                elif self.spec.quarantine:
                    self.quarantined[shard.index] = str(error)
                    return
                else:
                    raise

    def _batch(
        self, part: int, rows: Iterator[Row], size: int, known: dict[str, tuple[str | None, Answer]]
    ) -> Batch | None:
        with self._timed("read"):
            taken = list(itertools.islice(rows, size))
        if not taken:
            return None
        with self._timed("render"):
            inputs, outcomes = self._columns(taken)
            unread = [o for o in outcomes if o is not None]  # their columns can't stand in the table
            messages: list[str] = []
            asked: list[int] = []
            for i, row in enumerate(taken):
                if outcomes[i] is None:
                    try:
                        messages.append(self.task.render(row.columns))
                        asked.append(i)
                    except RowError as error:
                        outcomes[i] = Failure(error.code, error.message)
        prompts: list[list[int] | None] = [None] * len(taken)
        keys: list[str | None] = [None] * len(taken)
        reused = 0
        copied: set[int] = set()
        room = self.spec.engine.max_model_len - self.task.sampling.max_tokens
        with self._timed("tokenize"):
            encoded = self.task.encode(messages) if messages else []
        for i, ids in zip(asked, encoded, strict=True):
            if len(ids) > room:
                outcomes[i] = Failure(
                    "too_long", f"{len(ids)} prompt tokens; engine.max_model_len leaves room for {room}"
                )
                continue
            keys[i] = self.task.key(ids, self.answerer)
            kept = known.get(taken[i].id)
            if kept is not None and kept[0] == keys[i]:
                outcomes[i] = kept[1]
                reused += 1
            else:
                prompts[i] = ids
        if self.reuse:
            with self._timed("read"):
                earlier = self.reuse.find([key for key, ids in zip(keys, prompts, strict=True) if key and ids])
            for i, key in enumerate(keys):
                if prompts[i] and key in earlier:
                    outcomes[i], prompts[i] = earlier[key], None
                    copied.add(i)
        gold = self.spec.task.gold
        return Batch(
            part=part,
            ids=[row.id for row in taken],
            positions=[row.position for row in taken],
            inputs=inputs,
            prompts=prompts,
            keys=keys,
            outcomes=outcomes,
            raws=[_raw(row) if o in unread else None for row, o in zip(taken, outcomes, strict=True)],
            golds=[write.as_gold(row.columns.get(gold)) if gold else None for row in taken],
            reused=reused,
            copied=frozenset(copied),
        )

    def _columns(self, rows: list[Row]) -> tuple[pa.RecordBatch, list[Answer | Failure | None]]:
        """The rows' columns under the frozen schema; where a value won't cast, the row fails, its columns null."""
        outcomes: list[Answer | Failure | None] = [Failure(*row.error) if row.error else None for row in rows]
        arrays: dict[str, pa.Array] = {}
        values: dict[str, list[Any]] = {}
        for column in self.columns:
            name = column.name
            raw = [row.columns.get(name) for row in rows]
            if pa.types.is_string(column.type) and not _TEXT.issuperset(map(type, raw)):
                raw = [value if value is None else read.as_text(value) for value in raw]
            values[name] = raw
            try:
                arrays[name] = pa.array(raw, column.type)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError, ValueError, TypeError):
                for i, value in enumerate(raw):
                    if not _casts(value, column.type):
                        outcomes[i] = Failure("schema", f"column {name}: not {column.type}")
        failed = [isinstance(o, Failure) for o in outcomes]
        for column in self.columns:
            if column.name not in arrays:
                cleared = [None if f else v for v, f in zip(values[column.name], failed, strict=True)]
                arrays[column.name] = pa.array(cleared, column.type)
        if self.extra:
            known = set(self.columns.names)
            extras = [
                None if row.columns.keys() <= known else {k: v for k, v in row.columns.items() if k not in known}
                for row in rows
            ]
            texts = [None if e is None else json.dumps(e, ensure_ascii=False) for e in extras]
            arrays[write.EXTRA.name] = pa.array(texts, pa.string())
        if not arrays:
            return pa.RecordBatch.from_pylist([{} for _ in rows], schema=pa.schema([])), outcomes
        return pa.RecordBatch.from_pydict(arrays), outcomes

    def _write(self, part: Part, shard: Shard, attempt: str) -> Receipt:
        with self._timed("write"):
            task = self.spec.task
            batches = part.batches
            outcomes = [o for b in batches for o in b.outcomes]
            assert all(o is not None for o in outcomes), "a part is written when every row has an outcome"
            usage, labels, failures = write.usage_of(outcomes, [g for b in batches for g in b.golds], task)  # type: ignore[arg-type]
            receipt = Receipt(
                shard=shard.index,
                part=part.index,
                last=part.last,
                attempt=attempt,
                fingerprint=self.spec.plan.fingerprint,
                usage=usage if batches else Usage(),
                labels=labels,
                failures=failures,
                next_position=batches[-1].positions[-1] + 1 if batches else 0,
                reused=sum(b.reused for b in batches),
                copied=sum(len(b.copied) for b in batches),
                copied_tokens=sum(_tokens(b.outcomes[i]) for b in batches for i in b.copied),
                quarantined=self.quarantined.get(shard.index, "") if part.last else "",
            )
            columns = self._outcome_columns(batches)
            for name in [*self.columns.names, *([write.EXTRA.name] if self.extra else [])]:
                columns[name] = pa.chunked_array([b.inputs.column(name) for b in batches], self.schema.field(name).type)
            table = pa.table([columns[name] for name in self.schema.names], schema=self.schema)
            return write.commit(self.spec.output, shard, receipt, table)

    def _outcome_columns(self, batches: list[Batch]) -> dict[str, Any]:
        outcomes: list[Any] = [o for b in batches for o in b.outcomes]
        return write.outcome_columns(
            self.spec.task,
            [i for b in batches for i in b.ids],
            [k for b in batches for k in b.keys],
            outcomes,
            [r for b in batches for r in b.raws],
        )

    async def _spill_regularly(self, made: Attempt) -> None:
        for number in itertools.count(1):
            await asyncio.sleep(self.spec.spill_seconds)
            await self._spill_safely(made, number)

    async def _spill_safely(self, made: Attempt, number: int) -> None:
        try:
            await self._thread(self._spill, made.shard, made.id, list(made.parts), number)
        except BatchqError as error:  # what isn't spilled may have to be asked again; nothing is lost
            print(f"batchq: a spill of shard {made.shard.index} failed: {error}", file=sys.stderr, flush=True)

    def _spill(self, shard: Shard, attempt: str, parts: list[Part], number: int) -> None:
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
            columns = write.outcome_columns(self.spec.task, ids, keys, answers, [None] * len(ids))
            write.spill(self.spec.output, shard, attempt, number, self.spec.plan.fingerprint, columns)
            for part in parts:
                part.spilled.update(ids)


def _never_silent(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.result()


def _tokens(outcome: Answer | Failure | None) -> int:
    return outcome.prompt_tokens + outcome.output_tokens if isinstance(outcome, Answer) else 0


def _casts(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([value], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError, ValueError, TypeError):
        return False
    return True


def _raw(row: Row) -> str | None:
    """A failed row's text, so that nothing is lost: as it stood, or its columns as JSON."""
    if row.raw is not None:
        return row.raw
    return json.dumps(row.columns, ensure_ascii=False, default=str) if row.columns else None
