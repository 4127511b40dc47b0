"""The actor: one engine in a process of its own. Ray runs it, and nothing here knows of Ray."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import io
import logging
import math
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from batchq.account.usage import PhaseClock
from batchq.engine.protocol import Completion, EngineSpec, Prompt, Sampling
from batchq.errors import BatchqError, RowError
from batchq.machine import log as logs
from batchq.machine.cache import written
from batchq.quantize.checkpoint import bring
from batchq.records import Failure, Receipt, Shard
from batchq.worker.counters import Snapshot
from batchq.worker.spec import WorkerSpec, open_engine
from batchq.worker.worker import Worker

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """What one engine is asked apart from any labelling: by the gate, or to try settings."""

    prompts: list[Prompt]
    sampling: Sampling
    in_flight: int
    log: str  # name of the file that the engine's output goes to
    warm_up: int = 0  # the first so many prompts count as the engine's start
    seconds: float = math.inf  # what isn't asked so soon after the warm-up isn't asked
    stay_up: bool = False  # the engine may go on to label


class Replica:
    """One engine, its output and its children's in one log file.

    It answers the gate's prompts, or labels; one whose answers the gate accepted goes on to label.
    """

    def __init__(self, spec: EngineSpec, log: logs.LogFile) -> None:
        self.clock = PhaseClock("start")
        _log_to(log)
        logs.configure(log.setting)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self.folder = bring(spec.model, spec.origin)
        self.engine = open_engine(dataclasses.replace(spec, model=self.folder))
        self.worker: Worker | None = None  # from `start` on; Ray may run another method before it
        self.answered = 0

    # -- for gate and tune --

    async def open(self) -> None:
        self.clock.enter("load")
        phases = await self.engine.start()
        self.clock.enter("gate")
        self.clock.move("load", "compile", phases.get("compile", 0.0))

    async def answer_sample(self, request: SampleRequest) -> tuple[list[Completion | Failure], dict[str, float]]:
        """The answers in the prompts' order, and the seconds by phase."""
        slots = asyncio.Semaphore(request.in_flight)
        until = math.inf

        async def one(prompt: Prompt) -> Completion | Failure:
            async with slots:
                if time.monotonic() >= until:
                    return Failure("not_asked", "the time was up")
                try:
                    return await self.engine.ask(prompt, request.sampling)
                except RowError as error:
                    return Failure(error.code, error.message)
                finally:
                    self.answered += 1

        warm = request.warm_up
        self.clock.enter("load" if warm else "gate")
        answers = list(await asyncio.gather(*map(one, request.prompts[:warm])))
        self.clock.enter("gate")
        until = time.monotonic() + request.seconds
        answers += await asyncio.gather(*map(one, request.prompts[warm:]))
        if not request.stay_up:
            await self.engine.close()
        spent, self.clock = self.clock.seconds(), PhaseClock("idle")  # from here on it is the labelling's time
        return answers, spent

    async def progress(self) -> tuple[int, dict[str, float], str]:
        """How many prompts were answered, the seconds by phase, and the phase."""
        return self.answered, self.clock.seconds(), self.clock.phase

    # -- for the labelling --

    async def start(self, spec: WorkerSpec) -> None:
        spec = dataclasses.replace(spec, engine=dataclasses.replace(spec.engine, model=self.folder))
        self.worker = Worker(spec, self.clock, self.engine)
        await self.worker.start()
        # These objects live as long as the process; scanning them again and again takes up to 10 us per row.
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)

    async def label(self, shard: Shard, attempt: str) -> list[Receipt]:
        assert self.worker is not None, "start() comes first"
        try:
            return await self.worker.label(shard, attempt)
        except BatchqError:
            raise
        except Exception as error:  # a defect: where it happened goes to the log, its message may quote a row
            where = "".join(traceback.format_tb(error.__traceback__))
            about = {"shard": shard.index, "code": type(error).__name__}
            logger.error("%s\n%s", type(error).__name__, where, extra=about)
            raise

    async def snapshot(self) -> Snapshot | None:
        return self.worker.snapshot() if self.worker else None

    async def stop(self, grace: float) -> None:
        if self.worker:
            self.worker.stop(grace)

    async def close(self) -> Snapshot | None:
        """Free the devices; says how far it was, unless it has only served the gate."""
        snapshot = await self.snapshot()
        await (self.worker or self.engine).close()  # which may take a while, and is held too
        return snapshot and dataclasses.replace(snapshot, phases=self.clock.seconds())


def _log_to(log: logs.LogFile) -> None:
    """Send this process's output, and its children's, to a file. Raises ConfigError where none can be made."""
    path = Path(log.path)
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    if log.shown:  # tee ends when the last process that writes to it has ended, however that came
        tee = subprocess.Popen(["tee", "-a", log.path], stdin=subprocess.PIPE, stdout=2, start_new_session=True)
        assert tee.stdin is not None
        os.dup2(tee.stdin.fileno(), descriptor)
        tee.stdin.close()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for stream in (sys.stdout, sys.stderr):  # whatever the driver's terminal takes: this is a file
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    os.environ["PYTHONIOENCODING"] = "utf-8:backslashreplace"
