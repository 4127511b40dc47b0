"""Ray actors: placement, handing out shards, replacing what is lost. The only importer of ray.

The driver hands each replica two shards, the one it labels and the next, so that no replica waits
for the driver; nothing but shards, receipts and snapshots travels through Ray.

    cluster.py    Ray's nodes, and the places on them where replicas go
    replica.py    the actor: one engine in a process of its own
    handles.py    replicas as the driver sees them
    labelling.py  shards handed out, replicas replaced, until all is committed
    losses.py     what follows for a shard when its replica is lost
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from batchq import hardware
from batchq.account import ReplicaAccount
from batchq.config import ClusterConfig, EngineConfig
from batchq.engine import Completion, EngineSpec
from batchq.errors import BatchqError, EngineError, EngineOutOfMemory, Stopped
from batchq.hardware import Hardware
from batchq.pool import cluster
from batchq.pool.handles import PoolSnapshot, Setting, WarmReplica
from batchq.pool.labelling import POLL_SECONDS, ShardScheduler
from batchq.pool.replica import SampleRequest
from batchq.records import Failure, Shard
from batchq.worker.spec import WorkerSpec

__all__ = ["Pool", "PoolSnapshot", "SampleRequest"]


class _Stalled(Exception):
    """Prompts are waiting, and the engine has answered none for too long."""


class Pool:
    """A connection to Ray, local or an existing cluster, for one run; opened when it is first needed."""

    def __init__(self, cluster: ClusterConfig, engine: EngineConfig, logs: Path) -> None:
        """`engine` says how long an engine may take to start, and to answer nothing."""
        self.cluster, self.engine = cluster, engine
        self.logs = logs
        self._connected = False
        self._over = threading.Event()
        self._warm: WarmReplica | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._connected:
            import ray

            ray.shutdown()

    def connect(self) -> None:
        """Start Ray on this machine, or join `cluster.address`. Once; later calls do nothing.

        Raises ConfigError if no cluster answers there.
        """
        if not self._connected:
            cluster.connect(self.cluster.address)
            self._connected = True
            cluster.watch_head(self.cluster.address, self._over)

    def hardware(self) -> Hardware:
        """What a node that will run replicas has: this machine, or one of the cluster's."""
        if self.cluster.address is None:
            return hardware.detect()
        self.connect()
        return cluster.detect()

    def answer_sample(
        self,
        spec: EngineSpec,
        request: SampleRequest,
        here: Hardware,
        stop: threading.Event,
        on_progress: Callable[[int], None],
        notify: Callable[[str], None],
    ) -> tuple[list[Completion | Failure], ReplicaAccount]:
        """Start one engine and have it answer; returns the answers in order and what it cost.

        An engine that dies or stalls is replaced, up to `cluster.max_attempts`, and `notify` is told. One that is to
        stay up is used by `label`, if that takes an engine of just this kind; `release` ends it otherwise.
        Raises EngineError when it doesn't start or dies too often, Stopped after `stop` was set.
        """
        self.connect()
        self.release()
        import ray

        slot = cluster.slots(self.cluster, here)[0]
        path = str(self.logs / request.log)
        spec = dataclasses.replace(spec, cores=slot.cores)
        spent: Counter[str] = Counter()
        for _ in range(self.cluster.max_attempts):
            actor = cluster.start(slot, spec, here, path)
            seen: dict[str, float] = {}
            ready = False

            def look(actor: Any = actor, seen: dict[str, float] = seen) -> int:
                """How many prompts are answered; 0 if it doesn't say at once."""
                looking = actor.progress.remote()
                if not ray.wait([looking], timeout=POLL_SECONDS)[0]:
                    return 0
                count, phases = ray.get(looking)
                seen.update(phases)
                on_progress(count)
                return int(count)

            try:
                self._await_start(actor.open.remote(), look, path, stop)
                ready = True
                found, seen = self._await_answers(actor.answer_sample.remote(request), look, len(request.prompts), stop)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, BaseException) else error
                if not isinstance(cause, EngineError):
                    raise BatchqError(f"the sample's engine failed ({type(cause).__name__}); log: {path}") from None
                if not ready:  # it would not start another time either
                    raise EngineError(f"{cause}; log: {path}") from None
                if isinstance(cause, EngineOutOfMemory):
                    fewer = max(1, min(request.in_flight, spec.max_num_seqs) // 2)
                    request = dataclasses.replace(request, in_flight=fewer)
                    spec = dataclasses.replace(spec, max_num_seqs=fewer)
                why = str(cause)
            except _Stalled as error:
                why = str(error)
            except ray.exceptions.RayError:
                why = "its process died"
            else:
                self._warm = WarmReplica(spec, slot, actor, path) if request.stay_up else None
                spent.update(seen)
                devices = len(slot.cores) or spec.devices
                return found, ReplicaAccount(here.accelerator, devices, {p: round(s, 3) for p, s in spent.items()})
            finally:
                if self._warm is None or self._warm.actor is not actor:
                    ray.kill(actor)
            spent.update(seen)
            notify(f"the engine that was asked a sample is lost: {why}; log: {path}")
        raise EngineError(f"a sample cost {self.cluster.max_attempts} engines in a row ({why}); log: {path}")

    def _await_start(self, future: Any, look: Callable[[], int], log: str, stop: threading.Event) -> None:
        limit, began = self.engine.start_timeout_s, time.monotonic()
        while not _done(future, stop):
            if time.monotonic() - began > limit:
                raise EngineError(f"an engine was not ready after engine.start_timeout_s={limit:.0f}; log: {log}")
            look()
        _result(future)

    def _await_answers(self, future: Any, look: Callable[[], int], prompts: int, stop: threading.Event) -> Any:
        """Raises _Stalled when nothing is answered for too long, or nothing said about it."""
        limit = self.engine.stall_timeout_s
        answered, since = 0, time.monotonic()
        while not _done(future, stop):
            if (count := look()) > answered:
                answered, since = count, time.monotonic()
            elif answered < prompts and time.monotonic() - since > limit:
                raise _Stalled(f"no answer for engine.stall_timeout_s={limit:g}")
        return _result(future)

    def release(self) -> None:
        """End the engine that `answer_sample` left up, if there is one."""
        if self._warm is not None:
            warm, self._warm = self._warm, None
            warm.end()

    def label(
        self,
        spec: WorkerSpec,
        shards: Sequence[Shard],
        here: Hardware,
        stop: threading.Event,
        on_progress: Callable[[PoolSnapshot], None],
        notify: Callable[[str], None],
    ) -> PoolSnapshot:
        """Label all `shards`; returns the final state. `notify` is told of every replica that is lost.

        Raises Stopped after `stop` was set, within `cluster.grace_seconds`; EngineError when an engine
        doesn't start or a shard lost too many (`cluster.max_attempts`); and what a worker raised for good.
        """
        self.connect()
        slots = cluster.slots(self.cluster, here)[: max(1, len(shards))]
        warm, self._warm = self._warm, None
        setting = Setting(self.cluster, self.engine, here, self.logs)
        return ShardScheduler(setting, spec, stop, on_progress, notify).run(shards, slots, warm)


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
