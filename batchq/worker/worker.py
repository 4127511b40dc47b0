"""One engine and the shards it is given: batches -> engine -> parts, fed continuously. Knows nothing of Ray.

Batches are made and parts are written in threads, a batch ahead of the engine; each row is handed to the engine as
soon as there is a slot; a part is written when its last row is answered. One shard feeds at a time, but the next begins
while the last one drains, so the engine never waits at a shard's end.

When the engine dies, stalls or is told to leave, every answer is spilled before anything is raised, and what was in
flight is noted; poison.py says what the next attempt makes of that.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from batchq.account.usage import PhaseClock, timed
from batchq.engine.protocol import Engine
from batchq.errors import BatchqError, EngineError, EngineOutOfMemory, Stopped
from batchq.machine.hardware import EnergyMeter
from batchq.model import tokenizer
from batchq.output import spills
from batchq.records import Answer, Failure, Receipt, Shard
from batchq.task.task import Task
from batchq.worker import poison
from batchq.worker.attempt import Attempt, Part, room
from batchq.worker.batch import Batches
from batchq.worker.counters import Snapshot
from batchq.worker.in_flight import LEFT, InFlight
from batchq.worker.reuse import open_reuse
from batchq.worker.spec import WorkerSpec, open_engine

logger = logging.getLogger(__name__)

LAST_ANSWERS_SECONDS = 2.0  # that a dead engine's other requests have to fail in, and its last answers to come
SAVE_SECONDS = 20.0  # that a shard waits, before it raises, for the others to be spilled


class Worker:
    """One engine and the shards it is given. All methods run on one event loop."""

    def __init__(self, spec: WorkerSpec, clock: PhaseClock | None = None, engine: Engine | None = None) -> None:
        """`clock` runs since this process was given its devices; `engine` may be up already."""
        self.spec = spec
        self.clock = clock or PhaseClock("start")
        self.engine = engine or open_engine(spec.engine)
        self.task: Task
        self.batches: Batches
        self.flight = InFlight(self.engine, self.clock, spec.in_flight, self._give_up)
        self.intake = asyncio.Lock()
        self.threads = ThreadPoolExecutor(4, thread_name_prefix="batchq")
        self.lowered = 0  # rows in flight since memory ran short; 0: as many as were asked for
        self.attempts: set[Attempt] = set()
        self.cpu: dict[str, float] = dict.fromkeys(("read", "render", "tokenize", "write"), 0.0)
        self._watch: asyncio.Task[None] | None = None
        self._culprit_known = False  # an earlier engine's death has been explained by a row
        self._energy: EnergyMeter | None = None

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the tokenizer and the engine. Raises EngineError or ConfigError."""
        self.clock.enter("load")
        spec, plan = self.spec, self.spec.plan
        opened = await self._thread(tokenizer.open_tokenizer, spec.engine.model, spec.engine.trust_remote_code)
        self.task = self.flight.task = Task(spec.task, opened, plan.columns, spec.chat_template, plan.date)
        opening = asyncio.ensure_future(self._thread(open_reuse, plan.reuse, spec.task, spec.incremental))
        phases = await self.engine.start()
        reuse = await opening
        self.batches = Batches(plan, self.task, spec.engine.max_model_len, reuse, spec.quarantine, self.cpu)
        if spec.engine.device == "cuda":
            self._energy = await self._thread(EnergyMeter)
        self.clock.enter("idle")
        self.clock.move("load", "compile", phases.get("compile", 0.0))
        self._watch = asyncio.create_task(self.flight.watch_for_stalls(spec.stall_seconds))

    def stop(self, grace: float) -> None:
        """Take no more rows; what is in flight is finished if it is within `grace` seconds, the rest is given up,
        all answers are spilled, and `label` raises Stopped."""
        self.flight.stop(grace)

    async def close(self) -> None:
        if self._watch:
            self._watch.cancel()
        await self.engine.close()
        self.threads.shutdown(wait=False)

    def snapshot(self) -> Snapshot:
        first = self.flight.tally.first
        return Snapshot(
            phase=self.clock.phase,
            phases=self.clock.seconds(),
            cpu={k: round(v, 3) for k, v in self.cpu.items()},
            counters=self.flight.tally.counters(),
            lowered=self.lowered,
            first=None if first is None else time.monotonic() - first,
            joules=self._energy.joules() if self._energy else None,
            in_flight=self.flight.count,
        )

    async def _thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)

    # -- a shard -------------------------------------------------------------------------------

    async def label(self, shard: Shard, attempt: str = "") -> list[Receipt]:
        """Label one shard and commit its parts; returns the receipts of all its parts.

        Raises EngineError when the engine died or stalled, Stopped after `stop`, InputError or StorageError
        when reading or writing failed for good. Whatever was answered by then has been spilled.
        """
        spec = self.spec
        id = attempt or uuid.uuid4().hex
        made: Attempt = await self._thread(Attempt.begin, spec.output, spec.plan, spec.task, shard, id)
        if made.finished:
            return made.receipts
        self.attempts.add(made)
        spiller = asyncio.create_task(self._spill_regularly(made))
        try:
            async with self.intake:
                await self._feed(made)
            receipts = await asyncio.gather(*made.commits)
        except BaseException:
            await self._save(made)
            raise
        finally:
            made.saved.set()
            self.attempts.discard(made)
            spiller.cancel()
            await asyncio.gather(spiller, return_exceptions=True)
        await self._thread(spills.drop, spec.output, shard)
        return [*made.receipts, *receipts]

    async def _feed(self, made: Attempt) -> None:
        """Hand the shard's rows to the engine, in order, as slots come free."""
        self.flight.raise_if_over()
        first = len(made.receipts)
        skip = made.receipts[-1].next_position if made.receipts else 0
        batches = self.batches.of(made.shard, first, skip, made.known)
        part = Part(first)
        made.parts.append(part)
        ahead = asyncio.ensure_future(self._thread(next, batches, None))
        culprits, suspects = frozenset(made.search.culprits), made.search.suspects
        searching = poison.searching(made.search)
        self._culprit_known |= bool(culprits)
        careful = bool(culprits) or searching
        self.flight.limit = self._most()
        if searching:
            self.flight.limit = poison.concurrency(made.search, min(self._most(), self.spec.engine.max_num_seqs))
        tally = self.flight.tally
        while (batch := await ahead) is not None:
            ahead = asyncio.ensure_future(self._thread(next, batches, None))
            if self.flight.ended:
                raise self.flight.ended
            for commit in made.commits:
                if commit.done():
                    commit.result()  # a part that can't be written ends the shard now, not at its end
            if batch.part != part.index:
                await self._search(made)
                self._seal(made, part, False)
                part = Part(batch.part)
                made.parts.append(part)
            part.batches.append(batch)
            await room(self.attempts)
            for i, prompt in enumerate(batch.prompts):
                if prompt is None:
                    known = batch.outcomes[i]
                    tally.not_asked(known, isinstance(known, Answer) and self.task.space.truncated(known))
                    continue
                if careful:
                    position = batch.positions[i]
                    if position in culprits:
                        batch.outcomes[i], batch.prompts[i] = Failure(poison.CODE, poison.MESSAGE), None
                        tally.not_asked(batch.outcomes[i])
                        continue
                    if poison.searching(made.search) and (suspects is None or position in suspects):
                        made.withheld.append((part, batch, i))
                        part.pending += 1
                        continue
                    if suspects and position > suspects[-1]:
                        await self._search(made)
                        suspects = ()
                await self.flight.slot(part)
                if part.error:
                    raise part.error
                if self.flight.stopping:
                    ahead.cancel()
                    await self.flight.drain()
                    raise Stopped(LEFT)
                part.pending += 1
                self.flight.hand_over(part, batch, i, prompt)
        await self._search(made)
        self._seal(made, part, True)

    def _most(self) -> int:
        """Rows in flight where none is suspected."""
        return self.lowered or self.spec.in_flight

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
        if not poison.searching(made.search):
            return
        left, made.withheld = made.withheld, []
        suspected = bool(left)
        while left:
            await self._nothing_in_flight(made)
            group = left[-poison.half(left) :]
            del left[-len(group) :]
            made.search = poison.ask_alone(made.search, [batch.positions[i] for _, batch, i in group])
            await self._thread(made.mark)
            for part, batch, i in group:
                await self.flight.slot(part)
                prompt = batch.prompts[i]
                if self.flight.stopping or part.error or prompt is None:
                    break
                self.flight.hand_over(part, batch, i, prompt)
        if not suspected:
            self.flight.limit = self._most()
            return
        await self._nothing_in_flight(made)
        if made.search.witnessed and not self._culprit_known:
            self.lowered = self.flight.limit
        elif self._culprit_known:
            self.flight.limit = self._most()
        made.search = poison.clear(made.search)
        await self._thread(made.mark)

    async def _nothing_in_flight(self, made: Attempt) -> None:
        """Wait until no row is in flight, of this shard or another; save the answers. Raises as `InFlight.none`."""
        await self.flight.none()
        await self._spill(made, time.time_ns())

    # -- the end, and what is saved ------------------------------------------------------------

    def _give_up(self, error: BaseException) -> None:
        """The engine is of no more use: no shard waits for it any longer."""
        for made in self.attempts:
            for part in made.parts:
                if part.pending or not part.sealed:
                    part.error = part.error or error
                    part.close_if_over()

    async def _save(self, made: Attempt) -> None:
        """An attempt ends early: spill its answers, note a death, and wait for the others to have done so too."""
        for commit in made.commits:
            commit.cancel()
        await asyncio.gather(*made.commits, return_exceptions=True)
        flight = self.flight
        if isinstance(flight.ended, EngineError):
            await flight.drain(LAST_ANSWERS_SECONDS)
        await self._spill(made, time.time_ns())
        if isinstance(flight.ended, EngineError) and not flight.stopping:  # a signal to all may have ended the engine
            await self._note_death(made, flight.ended)
        made.saved.set()
        if flight.ended or flight.stopping:  # whoever hears of it may end this process
            waits = [asyncio.ensure_future(other.saved.wait()) for other in self.attempts]
            _, late = await asyncio.wait(waits, timeout=SAVE_SECONDS)
            for task in late:
                task.cancel()

    async def _note_death(self, made: Attempt, error: EngineError) -> None:
        weight = poison.LOST if isinstance(error, EngineOutOfMemory) else poison.DIED
        try:
            await self._thread(made.note, made.death(weight))
        except BatchqError as failure:  # without it more rows are suspected than need be
            logger.warning("its mark failed: %s", failure, extra={"shard": made.shard.index})

    async def _spill_regularly(self, made: Attempt) -> None:
        for number in itertools.count(1):
            await asyncio.sleep(self.spec.spill_seconds)
            await self._spill(made, number)

    async def _spill(self, made: Attempt, number: int) -> None:
        try:
            await self._thread(made.spill, list(made.parts), number)
        except BatchqError as error:  # what isn't spilled may have to be asked again; nothing is lost
            logger.warning("a spill failed: %s", error, extra={"shard": made.shard.index})
