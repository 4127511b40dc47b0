"""The rows that the engine has at the moment: handed over one by one as slots come free, and what ends them all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from batchq.account.usage import PhaseClock
from batchq.engine.protocol import Engine, Prompt
from batchq.errors import EngineError, RowError, Stopped
from batchq.records import Failure
from batchq.task.task import Task
from batchq.worker.attempt import Part
from batchq.worker.batch import Batch
from batchq.worker.counters import Tally

MOST_TOKENS = 2_000_000  # of prompts in flight: seconds of any engine's work, and some 40 bytes each in this process
LEFT = "stopped while a shard was under way; its answers so far are saved"


class InFlight:
    """All methods run on the worker's event loop."""

    def __init__(self, engine: Engine, clock: PhaseClock, limit: int, on_end: Callable[[BaseException], None]) -> None:
        """`limit`: rows at a time. `on_end` is told once why no row will be answered any more."""
        self.engine = engine
        self.clock = clock
        self.limit = limit
        self.task: Task  # how rows are asked, once the worker has started
        self.tally = Tally()
        self.count = 0  # rows
        self.tokens = 0  # of their prompts
        self.stopping = False
        self.ended: BaseException | None = None  # the engine's death, or that the time to leave is up
        self._on_end = on_end
        self._slot_freed = asyncio.Event()
        self._asked: set[asyncio.Task[None] | None] = set()  # asyncio itself would let them be collected under way

    async def slot(self, part: Part) -> None:
        """Wait until another row may be handed over, or this part can't be finished, or the worker is to stop."""
        while (self.count >= self.limit or self.tokens >= MOST_TOKENS) and not (part.error or self.stopping):
            await self._next_freed()

    def hand_over(self, part: Part, batch: Batch, i: int, prompt: Prompt) -> None:
        batch.prompts[i] = None  # from here on the row is in flight
        self._enter(+1, len(prompt))
        self._asked.add(asyncio.create_task(self._ask(part, batch, i, prompt)))

    async def none(self) -> None:
        """Wait until no row is in flight. Raises what ended the engine, or Stopped."""
        while self.count and not self.ended:
            await self._next_freed()
        self.raise_if_over()

    async def drain(self, seconds: float = float("inf")) -> None:
        """Wait until no row is in flight or the engine has ended. With `seconds`, wait so long for an ended one too:
        its other requests still have to return."""
        deadline = time.monotonic() + seconds
        while self.count and time.monotonic() < deadline and (seconds < float("inf") or not self.ended):
            await asyncio.sleep(0.02)

    # -- the end -------------------------------------------------------------------------------

    def stop(self, grace: float) -> None:
        """No more rows; what isn't answered within `grace` seconds is given up."""
        self.stopping = True
        self._slot_freed.set()
        asyncio.get_running_loop().call_later(grace, lambda: self.end(Stopped(LEFT)))

    def end(self, error: BaseException) -> None:
        """The engine is of no more use: nothing waits for it any longer."""
        if not self.ended:
            self.ended = error
            self._on_end(error)
            self._slot_freed.set()

    def raise_if_over(self) -> None:
        if self.ended:
            raise self.ended
        if self.stopping:
            raise Stopped(LEFT)

    async def watch_for_stalls(self, limit: float) -> None:
        """End it all when rows are in flight and none is answered for `limit` seconds."""
        seen, since = -1, 0.0
        while not self.ended:
            await asyncio.sleep(min(limit / 4, 10.0))
            now = time.monotonic()
            if self.tally.rows != seen or not self.count:
                seen, since = self.tally.rows, now
            elif now - since >= limit:
                self.end(EngineError(f"{self.count} rows in flight and no answer for engine.stall_timeout_s={limit:g}"))

    # -- one row -------------------------------------------------------------------------------

    async def _ask(self, part: Part, batch: Batch, i: int, prompt: Prompt) -> None:
        me = asyncio.current_task()
        try:
            answer = self.task.answer(await self.engine.ask(prompt, self.task.sampling))
            batch.outcomes[i] = answer
            self.tally.answered(answer, self.task.space.truncated(answer))
        except RowError as error:
            batch.outcomes[i] = Failure(error.code, error.message)
            self.tally.failures[error.code] += 1
        except EngineError as error:
            self.end(error)
            part.error = part.error or self.ended
        except BaseException as error:
            part.error = error if isinstance(error, Exception) else EngineError("a request was cancelled")
        finally:
            self._asked.discard(me)
            self.tally.rows += 1
            self._enter(-1, -len(prompt))
            self._slot_freed.set()
            part.pending -= 1
            part.close_if_over()

    def _enter(self, change: int, tokens: int) -> None:
        """Switch the phase clock: the engine infers while anything is in flight, and idles otherwise."""
        self.count += change
        self.tokens += tokens
        if self.count == 1 and change == 1:
            self.clock.enter("infer")
        elif self.count == 0:
            self.clock.enter("idle")

    async def _next_freed(self) -> None:
        self._slot_freed.clear()
        await self._slot_freed.wait()
