"""Ray actors: placement, handing out shards, replacing what is lost.

The only package that imports ray; tests/test_packages.py says which of its modules do.

The driver hands each replica two shards, the one it labels and the next, so that no replica waits
for the driver; nothing but shards, receipts and snapshots travels through Ray.

    exporter.py   a run's metrics, by Ray
    connection.py Ray is started on this machine or joined
    cluster.py    Ray's nodes, and the slots on them that replicas take
    growth.py     nodes that aren't there yet
    replica.py    the actor: one engine in a process of its own
    handles.py    replicas as the driver sees them
    labelling.py  shards handed out, replicas replaced, until all is committed
    losses.py     what follows for a shard when its replica is lost
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchq.account.usage import ReplicaAccount
from batchq.config import ClusterConfig, EngineConfig
from batchq.engine.protocol import Completion, EngineSpec
from batchq.errors import BatchqError, EngineError, EngineOutOfMemory, Stopped
from batchq.machine import hardware
from batchq.machine.hardware import Hardware
from batchq.machine.log import AS_SHIPPED, LogFile, LogSetting
from batchq.pool import cluster, connection, growth
from batchq.pool.exporter import Exporter
from batchq.pool.handles import EngineClock, Notify, PoolSnapshot, SampleClock, Setting, WarmReplica
from batchq.pool.labelling import POLL_SECONDS, ShardScheduler
from batchq.pool.replica import SampleRequest
from batchq.records import Failure, Shard
from batchq.telemetry.metrics import Sample
from batchq.worker.spec import WorkerSpec

__all__ = ["Pool", "PoolSnapshot", "SampleListener", "SampleRequest"]


class _Lost(Exception):
    """An engine died, or has prompts and has answered none for too long; another one may do better."""

    def __init__(self, why: str, out_of_memory: bool = False) -> None:
        super().__init__(why)
        self.out_of_memory = out_of_memory


@dataclass(frozen=True, slots=True)
class SampleListener:
    """Callbacks of a sample: `on_progress` with the prompts answered so far, `notify` for each engine that is lost,
    `holds` about once a second with what is held so far, and `spent`, at the end, with all that was."""

    on_progress: Callable[[int], None]
    notify: Callable[[str], None]
    holds: Callable[[ReplicaAccount], None]
    spent: Callable[[ReplicaAccount], None]


@dataclass(frozen=True, slots=True)
class Watch:
    """Polls the progress of one engine, whose clock it sets; `log` is the engine's file."""

    listener: SampleListener
    sample: SampleClock
    clock: EngineClock
    log: str

    def look(self, actor: Any) -> int:
        """How many prompts are answered; 0 if it doesn't say at once."""
        import ray

        self.listener.holds(self.sample.account())
        looking = actor.progress.remote()
        if not ray.wait([looking], timeout=POLL_SECONDS)[0]:
            return 0
        count, phases, phase = ray.get(looking)
        self.clock.note(phases, phase)
        self.listener.on_progress(count)
        return int(count)


class Pool:
    """A connection to Ray, local or an existing cluster, for one run; opened when it is first needed."""

    def __init__(
        self,
        cluster: ClusterConfig,
        engine: EngineConfig,
        logs: Path,
        log_setting: LogSetting = AS_SHIPPED,
        metrics_port: int | None = None,
    ) -> None:
        """`engine` says how long an engine may take to start, and to answer nothing; `metrics_port`, where a Ray that
        is started here serves its metrics."""
        self.cluster, self.engine = cluster, engine
        self.logs = logs
        self.log_setting = log_setting
        self.metrics_port = metrics_port
        self._connected = False
        self._over = threading.Event()
        self._hardware: Hardware | None = None
        self._warm: WarmReplica | None = None
        self._exporter: Exporter | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._connected:
            connection.close()

    def connect(self) -> None:
        """Start Ray on this machine, or join `cluster.address`. Once; later calls do nothing.

        Raises ConfigError if no cluster answers there.
        """
        if not self._connected:
            connection.connect(self.cluster.address, self.metrics_port)
            self._connected = True
            connection.watch_head(self.cluster.address, self._over)

    def export(self, job: str, samples: Iterable[Sample]) -> None:
        """Have Ray serve these metrics of the job, once it is connected."""
        if self._connected:
            self._exporter = self._exporter or Exporter(job)
            self._exporter.export(samples)

    def hardware(self, stop: threading.Event, tell: Callable[[str], None]) -> Hardware:
        """The hardware that replicas will run on: this machine's, or that of the best equipped of the cluster's nodes,
        seen once, after one with room for a replica was waited for; `tell` hears for how long.

        Raises EngineError when none joins within `cluster.wait_s`, Stopped after `stop` was set.
        """
        if self._hardware is None and self.cluster.address is not None:
            self.connect()
            growth.await_room(self.cluster, self.engine, stop, tell)
            self._hardware = cluster.detect()
        return self._hardware or hardware.detect()

    def answer_sample(
        self,
        spec: EngineSpec,
        request: SampleRequest,
        hardware: Hardware,
        stop: threading.Event,
        listener: SampleListener,
    ) -> tuple[list[Completion | Failure], ReplicaAccount]:
        """Start one engine and have it answer; returns the answers in order and what it cost.

        An engine that dies or stalls is replaced, up to `cluster.max_attempts`. One that is to stay up is used by
        `label`, if that takes an engine of just this kind; `release` ends it otherwise. However it ends, the listener
        is told once what was held. Raises EngineError when it doesn't start or dies too often, Stopped after `stop`
        was set.
        """
        self.connect()
        self.release()
        path = str(self.logs / request.log)
        sample = SampleClock(hardware.accelerator)
        try:
            for _ in range(self.cluster.max_attempts):
                slot = cluster.slots(self.cluster, hardware)[0]  # the last one's node may be gone
                spec = dataclasses.replace(spec, cores=slot.cores)
                log = cluster.log_of(slot, path, self.cluster)
                setting = dataclasses.replace(self.log_setting, replica=0)
                actor = cluster.start(slot, spec, hardware, LogFile(path, setting, self.cluster.address is not None))
                clock = sample.begin(len(slot.cores) or spec.devices)
                try:
                    answers = self._ask(actor, request, stop, Watch(listener, sample, clock, log))
                except _Lost as error:
                    why = str(error)
                    if error.out_of_memory:
                        fewer = max(1, min(request.in_flight, spec.max_num_seqs) // 2)
                        request = dataclasses.replace(request, in_flight=fewer)
                        spec = dataclasses.replace(spec, max_num_seqs=fewer)
                    listener.notify(f"the engine that was asked a sample is lost: {why}; log: {log}")
                else:
                    if request.stay_up:
                        idle = SampleClock(hardware.accelerator)
                        idle.begin(len(slot.cores) or spec.devices).note({}, "idle")
                        self._warm = WarmReplica(spec, slot, actor, log, idle, listener.spent)
                    return answers, sample.account()
                finally:
                    self._kill_unless_warm(actor)
                    sample.end()
            raise EngineError(f"a sample cost {self.cluster.max_attempts} engines in a row ({why}); log: {log}")
        finally:
            listener.spent(sample.account())

    def _kill_unless_warm(self, actor: Any) -> None:
        if self._warm is None or self._warm.actor is not actor:
            import ray

            ray.kill(actor)

    def _ask(
        self, actor: Any, request: SampleRequest, stop: threading.Event, watch: Watch
    ) -> list[Completion | Failure]:
        """The answers of one engine. Raises _Lost if another one may do better, EngineError if not."""
        import ray

        ready = False
        try:
            self._await_start(actor, watch, stop)
            ready = True
            answers, phases = self._await_answers(actor, request, watch, stop)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            if not isinstance(cause, EngineError):
                raise BatchqError(f"the sample's engine failed ({type(cause).__name__}); log: {watch.log}") from None
            if not ready:  # it would not start another time either
                raise EngineError(f"{cause}; log: {watch.log}") from None
            raise _Lost(str(cause), isinstance(cause, EngineOutOfMemory)) from None
        except ray.exceptions.RayError as error:
            if getattr(error, "actor_init_failed", False):
                raise EngineError(f"a replica did not start ({cluster.why(error)}); log: {watch.log}") from None
            raise _Lost("its process died") from None
        watch.clock.note(phases, "gate")
        return list(answers)

    def _await_start(self, actor: Any, watch: Watch, stop: threading.Event) -> None:
        limit, began = self.engine.start_timeout_s, time.monotonic()
        opening = actor.open.remote()
        while not _done(opening, stop):
            if time.monotonic() - began > limit:
                raise EngineError(f"an engine was not ready after engine.start_timeout_s={limit:.0f}; log: {watch.log}")
            watch.look(actor)
        _result(opening)

    def _await_answers(self, actor: Any, request: SampleRequest, watch: Watch, stop: threading.Event) -> Any:
        """Raises _Lost when no prompt is answered for too long, or the actor no longer says how many are."""
        limit, prompts = self.engine.stall_timeout_s, len(request.prompts)
        asking = actor.answer_sample.remote(request)
        answered, since = 0, time.monotonic()
        while not _done(asking, stop):
            if (count := watch.look(actor)) > answered:
                answered, since = count, time.monotonic()
            elif answered < prompts and time.monotonic() - since > limit:
                raise _Lost(f"no answer for engine.stall_timeout_s={limit:g}")
        return _result(asking)

    def release(self) -> None:
        """End the engine that `answer_sample` left up, if there is one."""
        if self._warm is not None:
            warm, self._warm = self._warm, None
            warm.end()

    def label(
        self,
        spec: WorkerSpec,
        shards: Sequence[Shard],
        hardware: Hardware,
        stop: threading.Event,
        on_progress: Callable[[PoolSnapshot], None],
        notify: Notify,
    ) -> PoolSnapshot:
        """Label all `shards`; returns the final state. `notify` is told of every replica that is lost.

        Raises Stopped after `stop` was set, within `cluster.grace_seconds`; EngineError when an engine
        doesn't start or a shard lost too many (`cluster.max_attempts`); and what a worker raised for good.
        """
        self.connect()
        slots = cluster.slots(self.cluster, hardware)[: max(1, len(shards))]
        warm, self._warm = self._warm, None
        setting = Setting(self.cluster, self.engine, hardware, self.logs, self.log_setting)
        return ShardScheduler(setting, spec, stop, on_progress, notify).label(shards, slots, warm)


def _done(future: Any, stop: threading.Event) -> bool:
    """Whether it is done, after a second at most. Raises Stopped after `stop` was set."""
    import ray

    if ray.wait([future], timeout=POLL_SECONDS)[0]:
        return True
    if stop.is_set():
        raise Stopped("stopped while a sample was asked; nothing was labelled yet")
    return False


def _result(future: Any) -> Any:
    import ray

    return ray.get(future)
