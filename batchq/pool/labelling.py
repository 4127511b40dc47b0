"""Shards handed out to replicas, and replicas replaced, until all is committed."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from threading import Event
from typing import Any

from batchq.account.usage import Counters
from batchq.errors import BatchqError, EngineError, EngineOutOfMemory, Stopped
from batchq.machine.log import LogFile
from batchq.pool import cluster, losses
from batchq.pool.growth import Growth
from batchq.pool.handles import CLOSE_SECONDS, Notify, PoolSnapshot, ReplicaHandle, Setting, WarmReplica
from batchq.records import Shard
from batchq.sizing.replicas import Slot
from batchq.worker.counters import Snapshot
from batchq.worker.spec import WorkerSpec

AHEAD = 2  # shards a replica holds: the one that feeds its engine, and the next
POLL_SECONDS = 1.0  # between snapshots of a replica
DRAIN_SHARE = 0.6  # of the grace period, for rows in flight to be answered; then answers are saved
CLOSE_SHARE = 0.2  # of the grace period, from which on nothing is waited for but the end


class ShardScheduler:
    """Labels one run's shards: each replica has the shard that feeds its engine, and the next."""

    def __init__(
        self,
        setting: Setting,
        spec: WorkerSpec,
        stop: Event,
        on_progress: Callable[[PoolSnapshot], None],
        notify: Notify,
    ) -> None:
        """`notify` is told of every replica that is lost, and what follows from that."""
        self.setting, self.spec = setting, spec
        self.cluster = setting.cluster
        self.stop, self.on_progress, self.notify = stop, on_progress, notify
        self.pending: deque[Shard] = deque()
        self.replicas: list[ReplicaHandle] = []
        self.former: list[ReplicaHandle] = []
        self.futures: dict[Any, tuple[str, ReplicaHandle, Shard | None]] = {}
        self.false_starts = 0  # processes in a row that were lost before they were ready
        self.committed_shards = self.committed_rows = 0
        self.stopped_at: float | None = None
        self.losses: list[str] = []
        self.told_at = 0.0
        self.reached: dict[str, float] = {}
        self.growth = Growth(setting.cluster, setting.hardware, notify)

    def label(self, shards: Sequence[Shard], slots: Sequence[Slot], warm: WarmReplica | None = None) -> PoolSnapshot:
        """Label all shards with a replica at each slot; `warm` is the first, if there is one."""
        self.pending.extend(shards)
        try:
            for slot in slots:
                self._open(slot, warm)
                warm = None
            while self.pending or any(r.shards for r in self.replicas):
                self._hand_out()
                for future in self._wait():
                    self._finished(future)
                self._grow()
                self._poll()
                self._check_starts()
                self._check_stalls()
                if time.monotonic() - self.told_at >= POLL_SECONDS:
                    self.told_at = time.monotonic()
                    self.on_progress(self._snapshot())
                if self.stop.is_set() and self.stopped_at is None:
                    self.stopped_at = time.monotonic()
                    self.pending.clear()
                    for replica in self.replicas:
                        replica.actor.stop.remote(DRAIN_SHARE * self.cluster.grace_seconds)
                if self.stopped_at is not None and (
                    not any(r.ready and r.shards for r in self.replicas) or self._grace() < CLOSE_SHARE
                ):
                    break
        finally:
            self.growth.close()
            self._close()
            self.on_progress(self._snapshot())
        if self.stopped_at is not None:
            raise Stopped("stopped before the end; the same command goes on from here")
        return self._snapshot()

    # -- replicas ------------------------------------------------------------------------------

    def _grow(self) -> None:
        """Open replicas on nodes that joined, as long as there are shards for them."""
        if self.stopped_at is not None:
            return
        shards = len(self.pending) + sum(len(r.shards) for r in self.replicas)
        most = min(len(self.pending), shards - len(self.replicas))
        for slot in self.growth.slots([r.slot for r in self.replicas], most):
            replica = self._open(slot, joined=True)
            self.notify(f"replica {replica.number} starts on a node that has room for it", replica=replica.number)

    def _open(self, slot: Slot, warm: WarmReplica | None = None, joined: bool = False) -> ReplicaHandle:
        number = len(self.replicas) + len(self.former)
        path = str(self.setting.logs / f"replica-{number}.log")
        log = cluster.log_of(slot, path, self.cluster)
        spec = dataclasses.replace(self.spec, engine=dataclasses.replace(self.spec.engine, cores=slot.cores))
        if warm and (warm.spec, warm.slot) == (spec.engine, slot):
            actor, log = warm.actor, warm.log
        else:
            if warm:
                warm.end()
            shown = self.cluster.address is not None
            file = LogFile(path, dataclasses.replace(self.setting.log_setting, replica=number), shown)
            actor = cluster.start(slot, spec.engine, self.setting.hardware, file)
        replica = ReplicaHandle(number, slot, actor, log, time.monotonic(), joined=joined)
        self.replicas.append(replica)
        self.futures[actor.start.remote(spec)] = ("start", replica, None)
        return replica

    def _lose(self, replica: ReplicaHandle, why: str) -> None:
        """Give a lost replica's shards back, and start another in its place; its rows may be to blame.

        Raises EngineError when a shard has cost too many engines.
        """
        if replica not in self.replicas:
            return
        self._drop(replica)
        self.losses.append(f"replica {replica.number} lost: {why}; log: {replica.log}")
        self.notify(self.losses[-1], replica=replica.number)
        if self.stopped_at is None:  # a signal to all processes may have ended it
            lost = list(replica.shards.values())
            for shard, words in losses.note(self.spec, lost, self.cluster.max_attempts, f"({why}); log: {replica.log}"):
                self.notify(words, replica=replica.number, shard=shard.index)
            self.pending.extendleft(shard for shard, _ in reversed(lost))
        replica.shards.clear()
        if self.stopped_at is None and cluster.alive(replica.slot):
            self._open(replica.slot, joined=replica.joined)

    def _drop(self, replica: ReplicaHandle) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(replica.actor)
        replica.clock.end()
        self.replicas.remove(replica)
        self.former.append(replica)
        self.futures = {f: v for f, v in self.futures.items() if v[1] is not replica}

    def _never_started(self, replica: ReplicaHandle, why: str) -> None:
        """Raises EngineError, unless it was one on a node that joined while others work: they go on without it."""
        if not replica.joined or not any(r.ready for r in self.replicas):
            raise EngineError(f"{why}; log: {replica.log}")
        self._drop(replica)
        self.growth.leave_out(replica.slot)
        self.notify(f"{why}, and its node is left out; log: {replica.log}", replica=replica.number)

    def _lower(self, most: int, why: str) -> None:
        """Replicas from here on have fewer rows in flight."""
        if most < self.spec.in_flight:
            engine = self.spec.engine
            engine = dataclasses.replace(engine, max_num_seqs=min(engine.max_num_seqs, most))
            self.spec = dataclasses.replace(self.spec, in_flight=most, engine=engine)
            self.notify(f"{why}: new engines have at most {most} rows in flight")

    def _grace(self) -> float:
        """Share of the grace period that is left; 1 before it began."""
        if self.stopped_at is None:
            return 1.0
        return 1 - (time.monotonic() - self.stopped_at) / self.cluster.grace_seconds

    def _check_starts(self) -> None:
        limit = self.setting.engine.start_timeout_s
        for replica in [r for r in self.replicas if not r.ready]:
            if time.monotonic() - replica.started_at > limit:
                self._never_started(replica, f"an engine was not ready after engine.start_timeout_s={limit:.0f}")

    def _check_stalls(self) -> None:
        """A process that doesn't even say how far it is; what its engine does is watched in the process itself."""
        limit = self.spec.stall_seconds + 4 * POLL_SECONDS
        for replica in [r for r in self.replicas if r.ready and r.polling]:
            if time.monotonic() - replica.polled_at > limit:
                self._lose(replica, f"it has not answered for engine.stall_timeout_s={self.spec.stall_seconds:g}")

    def _close(self) -> None:
        import ray

        limit = CLOSE_SECONDS
        if self.stopped_at is not None:
            limit = min(limit, max(0.0, self._grace() * self.cluster.grace_seconds / 2))
        closing = {r.actor.close.remote(): r for r in self.replicas if r.ready}
        done, _ = ray.wait(list(closing), num_returns=len(closing), timeout=limit) if closing else ([], [])
        for future in done:
            with contextlib.suppress(ray.exceptions.RayError):  # it is gone, which is what we want
                snapshot = ray.get(future)
                closing[future].note(snapshot)
                self._note_first(snapshot)
        for replica in self.replicas:
            ray.kill(replica.actor)
            replica.clock.end()

    # -- the loop's steps ------------------------------------------------------------------------

    def _wait(self) -> list[Any]:
        """What is done, after POLL_SECONDS at most."""
        import ray

        if not self.futures:  # no replica is left; a node may join
            self.stop.wait(POLL_SECONDS)
            return []
        done, _ = ray.wait(list(self.futures), num_returns=1, timeout=POLL_SECONDS)
        return list(done)

    def _hand_out(self) -> None:
        for depth in range(AHEAD):  # everyone's first before anyone's second
            for replica in self.replicas:
                if self.pending and replica.ready and len(replica.shards) == depth:
                    shard = self.pending.popleft()
                    attempt = uuid.uuid4().hex
                    replica.shards[shard.index] = (shard, attempt)
                    self.futures[replica.actor.label.remote(shard, attempt)] = ("label", replica, shard)

    def _finished(self, future: Any) -> None:
        import ray

        what, replica, shard = self.futures.pop(future, (None, None, None))
        if what is None or replica is None:
            return  # of a replica that was lost in this same round
        try:
            result = ray.get(future)
        except ray.exceptions.RayTaskError as error:
            self._failed(replica, what, shard, error.cause if isinstance(error.cause, BaseException) else error)
            return
        except ray.exceptions.RayError as error:  # the process is gone, or its node, or its slot
            if replica.ready:
                self._lose(replica, "its process died")
            elif not cluster.alive(replica.slot):
                self._drop(replica)  # it was to take the place of one that was lost with the node
            else:
                self.false_starts += 1
                refused = isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed
                if refused or self.false_starts >= self.cluster.max_attempts:
                    self._never_started(replica, f"a replica did not start ({cluster.why(error)})")
                else:
                    self._lose(replica, "its process died")
            return
        if what == "start":
            replica.ready, self.false_starts = True, 0
            self.reached.setdefault("engine", time.monotonic())
        elif what == "snapshot":
            replica.polling = False
            replica.note(result)
            self._note_first(result)
            if result and result.lowered:
                self._lower(result.lowered, "no row alone kills an engine, so memory is short")
        elif shard is not None:
            replica.shards.pop(shard.index, None)
            self.committed_shards += 1
            self.committed_rows += sum(receipt.usage.rows for receipt in result)

    def _failed(self, replica: ReplicaHandle, what: str, shard: Shard | None, cause: BaseException) -> None:
        if isinstance(cause, Stopped) and shard is not None:
            replica.shards.pop(shard.index, None)  # the others are still draining
        elif isinstance(cause, EngineError) and what == "label":
            if isinstance(cause, EngineOutOfMemory):
                most = min(self.spec.in_flight, self.spec.engine.max_num_seqs)
                self._lower(max(1, most // 2), "an engine ran out of memory")
            self._lose(replica, str(cause))
        elif isinstance(cause, EngineError):
            self._never_started(replica, str(cause))
        elif isinstance(cause, BatchqError):
            raise cause
        else:
            where = losses.named(self.spec, shard) if shard else f"replica {replica.number}"
            raise BatchqError(f"{where}: a worker failed ({cluster.why(cause)}); log: {replica.log}") from None

    def _poll(self) -> None:
        now = time.monotonic()
        for replica in self.replicas:
            if not replica.polling and now - replica.polled_at >= POLL_SECONDS:
                replica.polling, replica.polled_at = True, now
                self.futures[replica.actor.snapshot.remote()] = ("snapshot", replica, None)

    def _snapshot(self) -> PoolSnapshot:
        everyone = [*self.former, *self.replicas]
        name, devices = self.setting.hardware.accelerator, self.spec.engine.devices
        return PoolSnapshot(
            committed_shards=self.committed_shards,
            committed_rows=self.committed_rows,
            counters=sum((r.snapshot.counters for r in everyone if r.snapshot), Counters()),
            in_flight=sum(r.snapshot.in_flight for r in self.replicas if r.snapshot),
            phases=[r.snapshot.phase if r.snapshot else "start" for r in self.replicas],
            accounts=tuple(replica.account(name, devices) for replica in everyone),
            losses=tuple(self.losses),
            reached=self.reached,
        )

    def _note_first(self, snapshot: Snapshot | None) -> None:
        if snapshot and snapshot.first is not None:
            at = time.monotonic() - snapshot.first
            self.reached["first answer"] = min(at, self.reached.get("first answer", at))
