"""One engine and the shards it is given: batches -> engine -> parts, fed continuously. Knows nothing of Ray.

Batches are made and parts are written in threads, a batch ahead of the engine; each row is handed
to the engine as soon as there is a place in flight; a part is written when its last row is
answered. One shard feeds at a time, but the next begins while the last one drains, so the engine
never waits at a shard's end.

When the engine dies, stalls or is told to leave, every answer is spilled before anything is raised,
and what was in flight is noted; poison.py says what the next attempt makes of that.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from batchq import models, poison, write
from batchq.account import PhaseClock, computed_tokens, recalled_tokens, timed
from batchq.attempt import Attempt, Part
from batchq.batch import Batch, Batches
from batchq.config import TaskConfig
from batchq.engine.fake import FakeEngine
from batchq.engine.protocol import Engine, EngineSpec, Prompt
from batchq.engine.vllm import VllmEngine
from batchq.engine.vllm_process import import_ahead
from batchq.errors import BatchqError, EngineError, EngineOutOfMemory, RowError, Stopped
from batchq.hardware import EnergyMeter
from batchq.records import Failure, Plan, Receipt, Shard
from batchq.reuse import Reuse
from batchq.task.task import Task

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
    generated: int = 0  # output tokens
    recalled: int = 0  # tokens whose keys and values were read for them
    failed: int = 0  # of the rows


def open_engine(spec: EngineSpec) -> Engine:
    """An engine of the kind that is asked for, not started yet."""
    if spec.kind == "fake":
        return FakeEngine(spec)
    import_ahead(spec)
    return VllmEngine(spec)


class Worker:
    """One engine and the shards it is given. All methods run on one event loop."""

    def __init__(self, spec: WorkerSpec, clock: PhaseClock | None = None, engine: Engine | None = None) -> None:
        """`clock` runs since this process was given its devices; `engine` may be up already."""
        self.spec = spec
        self.clock = clock or PhaseClock("start")
        self.engine = engine or open_engine(spec.engine)
        self.task: Task
        self.batches: Batches
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
        self._under_way = 0
        self._rows = 0
        self._failed = 0
        self._tokens = 0
        self._first: float | None = None  # when the first answer came, on time.monotonic()'s clock
        self._computed = 0
        self._generated = 0
        self._recalled = 0
        self._energy: EnergyMeter | None = None

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the tokenizer and the engine. Raises EngineError or ConfigError."""
        self.clock.enter("load")
        spec, plan = self.spec, self.spec.plan
        tokenizer = await self._thread(models.open_tokenizer, spec.engine.model, spec.engine.trust_remote_code)
        self.task = Task(spec.task, tokenizer, plan.columns, spec.chat_template)
        index = asyncio.ensure_future(self._thread(Reuse, plan.reuse, spec.task)) if plan.reuse else None
        phases = await self.engine.start()
        reuse = await index if index else None
        self.batches = Batches(plan, self.task, spec.engine.max_model_len, reuse, spec.quarantine, self.cpu)
        if spec.engine.device == "cuda":
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
            self._generated,
            self._recalled,
            self._failed,
        )

    async def _thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)

    # -- a shard -------------------------------------------------------------------------------

    async def label(self, shard: Shard, attempt: str = "") -> list[Receipt]:
        """Label one shard and commit its parts; returns the receipts that now stand for it.

        Raises EngineError when the engine died or stalled, Stopped after `stop`, InputError or StorageError
        when reading or writing failed for good. Whatever was answered by then has been spilled.
        """
        spec = self.spec
        made: Attempt = await self._thread(
            Attempt.begin, spec.output, spec.plan, spec.task, shard, attempt or uuid.uuid4().hex
        )
        if made.finished:
            return made.standing
        self.attempts.add(made)
        spiller = asyncio.create_task(self._spill_regularly(made))
        try:
            async with self.intake:
                await self._feed(made)
            receipts = await asyncio.gather(*made.commits)
        except BaseException:
            for commit in made.commits:
                commit.cancel()
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
        await self._thread(write.drop_spills, spec.output, shard)
        return [*made.standing, *receipts]

    async def _feed(self, made: Attempt) -> None:
        """Hand the shard's rows to the engine, in order, as places in flight come free."""
        self._raise_if_over()
        first = len(made.standing)
        skip = made.standing[-1].next_position if made.standing else 0
        batches = self.batches.of(made.shard, first, skip, made.known)
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
                    self._failed += isinstance(batch.outcomes[i], Failure)
                    continue
                if careful:
                    position = batch.positions[i]
                    if position in convicted:
                        batch.outcomes[i], batch.prompts[i] = Failure(poison.CODE, poison.MESSAGE), None
                        self._rows += 1
                        self._failed += 1
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

    def _hand_over(self, part: Part, batch: Batch, i: int, prompt: Prompt) -> None:
        batch.prompts[i] = None  # from here on the row is in flight
        self._enter(+1)
        asyncio.create_task(self._ask(part, batch, i, prompt)).add_done_callback(_never_silent)

    async def _ask(self, part: Part, batch: Batch, i: int, prompt: Prompt) -> None:
        try:
            answer = self.task.answer(await self.engine.ask(prompt, self.task.sampling))
            batch.outcomes[i] = answer
            self._first = self._first or time.monotonic()
            prompted, cached, output = answer.prompt_tokens, answer.cached_tokens, answer.output_tokens
            self._tokens += prompted + output
            self._computed += computed_tokens(prompted, cached, output)
            self._generated += output
            self._recalled += recalled_tokens(prompted, cached, output)
        except RowError as error:
            batch.outcomes[i] = Failure(error.code, error.message)
            self._failed += 1
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

    def _enter(self, change: int) -> None:
        """Keep the phase clock: the engine infers while anything is in flight, and idles otherwise."""
        self._under_way += change
        if self._under_way == 1 and change == 1:
            self.clock.enter("infer")
        elif self._under_way == 0:
            self.clock.enter("idle")

    def _seal(self, made: Attempt, part: Part, last: bool) -> None:
        part.seal(last)
        made.commits.append(asyncio.create_task(self._commit(made, part)))

    async def _commit(self, made: Attempt, part: Part) -> Receipt:
        await part.done.wait()
        if part.error:
            raise part.error
        receipt: Receipt = await self._thread(self._write, made, part)
        made.parts.remove(part)
        made.committed += receipt.usage.rows
        return receipt

    def _write(self, made: Attempt, part: Part) -> Receipt:
        with timed(self.cpu, "write"):
            return made.commit(part, self.batches.quarantined.get(made.shard.index, "") if part.last else "")

    # -- rows that may kill engines ------------------------------------------------------------

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
            await self._thread(made.mark)
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
        await self._thread(made.mark)

    async def _nothing_in_flight(self, made: Attempt) -> None:
        """Wait for what is, this shard's and others', and keep it. Raises what ended the engine, or Stopped."""
        while self._under_way and not self.ended:
            self.room.clear()
            await self.room.wait()
        self._raise_if_over()
        await self._spill_safely(made, time.time_ns())

    async def _note_death(self, made: Attempt) -> None:
        strikes = poison.LOST if isinstance(self.ended, EngineOutOfMemory) else poison.DIED
        try:
            await self._thread(made.note, made.death(strikes))
        except BatchqError as error:  # without it more rows are suspected than need be
            print(f"batchq: shard {made.shard.index}: its mark failed: {error}", file=sys.stderr, flush=True)

    # -- the end, and what is kept -------------------------------------------------------------

    def _raise_if_over(self) -> None:
        if self.ended:
            raise self.ended
        if self.stopping:
            raise Stopped(LEFT)

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

    async def _spill_regularly(self, made: Attempt) -> None:
        for number in itertools.count(1):
            await asyncio.sleep(self.spec.spill_seconds)
            await self._spill_safely(made, number)

    async def _spill_safely(self, made: Attempt, number: int) -> None:
        try:
            await self._thread(made.spill, list(made.parts), number)
        except BatchqError as error:  # what isn't spilled may have to be asked again; nothing is lost
            print(f"batchq: a spill of shard {made.shard.index} failed: {error}", file=sys.stderr, flush=True)


def _never_silent(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.result()
