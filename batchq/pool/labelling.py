"""Shards handed out to replicas, and replicas replaced, until all is committed."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from batchq import poison, write
from batchq.account import ReplicaAccount
from batchq.config import ClusterConfig, EngineConfig
from batchq.engine.protocol import EngineSpec
from batchq.errors import BatchqError, EngineError, EngineOutOfMemory, Stopped
from batchq.hardware import Hardware
from batchq.pool import cluster
from batchq.pool.cluster import Slot
from batchq.records import Shard
from batchq.worker import Snapshot, WorkerSpec

AHEAD = 2  # shards a replica holds: the one that feeds its engine, and the next
POLL_SECONDS = 1.0  # between snapshots of a replica
CLOSE_SECONDS = 20.0
DRAIN_SHARE = 0.6  # of the grace period, for rows in flight to be answered; then answers are saved
CLOSE_SHARE = 0.2  # of the grace period, from which on nothing is waited for but the end


@dataclass(frozen=True, slots=True)
class Kept:
    """A replica that has served the gate and may go on to label."""

    spec: EngineSpec
    slot: Slot
    actor: Any
    log: str

    def end(self) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):  # it is gone, which is what we want
            ray.wait([self.actor.close.remote()], timeout=CLOSE_SECONDS)
        ray.kill(self.actor)


@dataclass(slots=True, eq=False)
class Member:
    """A replica as the driver sees it."""

    number: int
    slot: Slot
    actor: Any
    log: str
    started_at: float
    ready: bool = False
    shards: dict[int, tuple[Shard, str]] = field(default_factory=dict)  # and the attempt's id
    snapshot: Snapshot | None = None
    polling: bool = False
    polled_at: float = 0.0


@dataclass(slots=True)
class State:
    """What the driver knows while shards are labelled; given to `on_progress` about once a second."""

    committed_shards: int  # by this invocation; their receipts stand in the store, not in the driver's memory
    committed_rows: int
    live_rows: int  # rows answered by replicas in this invocation, committed or not
    live_failures: int  # of these
    live_tokens: int
    phases: list[str]
    accounts: tuple[ReplicaAccount, ...]
    lost_replicas: int
    reached: dict[str, float]  # what of the start-up, and when, on the driver's time.monotonic()


class Labelling:
    def __init__(
        self,
        cluster: ClusterConfig,
        engine: EngineConfig,
        spec: WorkerSpec,
        here: Hardware,
        logs: Path,
        stop: Event,
        on_progress: Callable[[State], None],
        say: Callable[[str], None],
    ) -> None:
        self.cluster, self.start_timeout = cluster, engine.start_timeout_s
        self.spec, self.here, self.logs = spec, here, logs
        self.stop, self.on_progress, self.say = stop, on_progress, say
        self.pending: deque[Shard] = deque()
        self.members: list[Member] = []
        self.former: list[Member] = []
        self.futures: dict[Any, tuple[str, Member, Shard | None]] = {}
        self.false_starts = 0  # processes in a row that were lost before they were ready
        self.committed_shards = self.committed_rows = 0
        self.stopped_at: float | None = None
        self.lost = 0
        self.told_at = 0.0
        self.reached: dict[str, float] = {}

    def run(self, shards: Sequence[Shard], slots: Sequence[Slot], kept: Kept | None = None) -> State:
        """Label all shards with a replica at each slot; `kept` is the first, if it is such a one."""
        import ray

        self.pending.extend(shards)
        try:
            for slot in slots:
                self._open(slot, kept)
                kept = None
            while self.pending or any(m.shards for m in self.members):
                self._hand_out()
                done: list[Any] = []
                if self.futures:
                    done, _ = ray.wait(list(self.futures), num_returns=1, timeout=POLL_SECONDS)
                for future in done:
                    self._settle(future)
                self._poll()
                self._check_starts()
                self._check_stalls()
                if time.monotonic() - self.told_at >= POLL_SECONDS:
                    self.told_at = time.monotonic()
                    self.on_progress(self._state())
                if self.stop.is_set() and self.stopped_at is None:
                    self.stopped_at = time.monotonic()
                    self.pending.clear()
                    for member in self.members:
                        member.actor.stop.remote(DRAIN_SHARE * self.cluster.grace_seconds)
                if self.stopped_at is not None and (
                    not any(m.ready and m.shards for m in self.members) or self._grace() < CLOSE_SHARE
                ):
                    break
        finally:
            self._close()
        self.on_progress(self._state())
        if self.stopped_at is not None:
            raise Stopped("stopped before the end; the same command goes on from here")
        return self._state()

    # -- members -------------------------------------------------------------------------------

    def _open(self, slot: Slot, kept: Kept | None = None) -> None:
        number = len(self.members) + len(self.former)
        log = str(self.logs / f"replica-{number}.log")
        spec = dataclasses.replace(self.spec, engine=dataclasses.replace(self.spec.engine, cores=slot.cores))
        if kept and (kept.spec, kept.slot) == (spec.engine, slot):
            actor, log = kept.actor, kept.log
        else:
            if kept:
                kept.end()
            actor = cluster.start(slot, spec.engine, self.here, log)
        member = Member(number, slot, actor, log, time.monotonic())
        self.members.append(member)
        self.futures[actor.start.remote(spec)] = ("start", member, None)

    def _lose(self, member: Member, why: str) -> None:
        """Give a lost replica's shards back, and start another in its place; its rows may be to blame.

        Raises EngineError when a shard has cost too many engines.
        """
        import ray

        if member not in self.members:
            return
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(member.actor)
        self.members.remove(member)
        self.former.append(member)
        self.futures = {f: v for f, v in self.futures.items() if v[1] is not member}
        self.lost += 1
        self.say(f"replica {member.number} lost: {why}; log: {member.log}")
        for shard, attempt in reversed(member.shards.values()):
            if self.stopped_at is None:  # a signal to all processes may have ended it
                self._suspect(shard, attempt, member, why)
            if self.stopped_at is None:
                self.pending.appendleft(shard)
        member.shards.clear()
        if self.stopped_at is not None:
            return
        if cluster.alive(member.slot):
            self._open(member.slot)
        elif not self.members:
            raise EngineError(f"every node that ran replicas is gone ({why}); the same command goes on elsewhere")

    def _suspect(self, shard: Shard, attempt: str, member: Member, why: str) -> None:
        """Note in the store that this attempt lost its engine; say what follows, or raise EngineError."""
        marks = [poison.from_json(m) for m in write.read_marks(self.spec.output, shard)]
        if mark := poison.after_loss(marks, attempt):
            write.mark_attempt(self.spec.output, shard, poison.to_json(mark), len(marks) + 1)
        ours = [m for m in [*marks, *([mark] if mark else [])] if m.attempt == attempt]
        if not ours:
            return  # none of its rows had been asked
        search, before = ours[-1].search, ours[0].search
        name = self.spec.plan.objects[shard.object].name
        most = self.cluster.max_attempts
        if search.barren >= most or search.lost > most * (self.spec.plan.rows_per_part.bit_length() + 2):
            raise EngineError(
                f"shard {shard.index} ({name}) lost its replica {search.lost} times ({why}); log: {member.log}"
            )
        if len(search.convicted) > len(before.convicted):
            self.say(
                f"shard {shard.index} ({name}): the row at {search.convicted[-1]} kills engines; it becomes a failure"
            )
        elif search.searching:
            count = "its unanswered rows" if search.suspects is None else f"{len(search.suspects)} rows"
            self.say(
                f"shard {shard.index} ({name}): {count} may kill engines; half of them are asked apart from the rest"
            )

    def _lower(self, most: int, why: str) -> None:
        """Replicas from here on have fewer rows in flight."""
        if most < self.spec.in_flight:
            engine = self.spec.engine
            engine = dataclasses.replace(engine, max_num_seqs=min(engine.max_num_seqs, most))
            self.spec = dataclasses.replace(self.spec, in_flight=most, engine=engine)
            self.say(f"{why}: new engines have at most {most} rows in flight")

    def _grace(self) -> float:
        """Share of the grace period that is left; 1 before it began."""
        if self.stopped_at is None:
            return 1.0
        return 1 - (time.monotonic() - self.stopped_at) / self.cluster.grace_seconds

    def _check_starts(self) -> None:
        for member in self.members:
            if not member.ready and time.monotonic() - member.started_at > self.start_timeout:
                raise EngineError(
                    f"an engine was not ready after engine.start_timeout_s={self.start_timeout:.0f}; log: {member.log}"
                )

    def _check_stalls(self) -> None:
        """A process that doesn't even say how far it is; what its engine does is watched in the process itself."""
        limit = self.spec.stall_seconds + 4 * POLL_SECONDS
        for member in [m for m in self.members if m.ready and m.polling]:
            if time.monotonic() - member.polled_at > limit:
                self._lose(member, f"it has not answered for engine.stall_timeout_s={self.spec.stall_seconds:g}")

    def _close(self) -> None:
        import ray

        limit = CLOSE_SECONDS
        if self.stopped_at is not None:
            limit = min(limit, max(0.0, self._grace() * self.cluster.grace_seconds / 2))
        closing = {m.actor.close.remote(): m for m in self.members if m.ready}
        done, _ = ray.wait(list(closing), num_returns=len(closing), timeout=limit) if closing else ([], [])
        for future in done:
            with contextlib.suppress(ray.exceptions.RayError):  # it is gone, which is what we want
                closing[future].snapshot = snapshot = ray.get(future)
                self._note_first(snapshot)
        for member in self.members:
            ray.kill(member.actor)

    # -- the loop's steps ------------------------------------------------------------------------

    def _hand_out(self) -> None:
        for depth in range(AHEAD):  # everyone's first before anyone's second
            for member in self.members:
                if self.pending and member.ready and len(member.shards) == depth:
                    shard = self.pending.popleft()
                    attempt = uuid.uuid4().hex
                    member.shards[shard.index] = (shard, attempt)
                    self.futures[member.actor.label.remote(shard, attempt)] = ("label", member, shard)

    def _settle(self, future: Any) -> None:
        import ray

        what, member, shard = self.futures.pop(future, (None, None, None))
        if what is None or member is None:
            return  # of a member that was lost in this same round
        try:
            result = ray.get(future)
        except ray.exceptions.RayTaskError as error:
            self._failed(member, what, shard, error.cause if isinstance(error.cause, BaseException) else error)
            return
        except ray.exceptions.RayError as error:  # the process, its node, or the place it was to run at
            if not member.ready and cluster.alive(member.slot):
                self.false_starts += 1
                refused = isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed
                if refused or self.false_starts >= self.cluster.max_attempts:
                    raise EngineError(f"a replica did not start ({type(error).__name__}); log: {member.log}") from None
            self._lose(member, "its process died")
            return
        if what == "start":
            member.ready, self.false_starts = True, 0
            self.reached.setdefault("engine", time.monotonic())
        elif what == "snapshot":
            member.polling, member.snapshot = False, result or member.snapshot
            self._note_first(result)
            if result and result.lowered:
                self._lower(result.lowered, "no row alone kills an engine, so memory is short")
        elif shard is not None:
            member.shards.pop(shard.index, None)
            self.committed_shards += 1
            self.committed_rows += sum(receipt.usage.rows for receipt in result)

    def _failed(self, member: Member, what: str, shard: Shard | None, cause: BaseException) -> None:
        if isinstance(cause, Stopped) and shard is not None:
            member.shards.pop(shard.index, None)  # the others are still draining
        elif isinstance(cause, EngineError) and what == "label":
            if isinstance(cause, EngineOutOfMemory):
                most = min(self.spec.in_flight, self.spec.engine.max_num_seqs)
                self._lower(max(1, most // 2), "an engine ran out of memory")
            self._lose(member, str(cause))
        elif isinstance(cause, EngineError):
            raise EngineError(f"{cause}; log: {member.log}") from None
        elif isinstance(cause, BatchqError):
            raise cause
        else:
            raise BatchqError(f"a worker failed ({type(cause).__name__}); log: {member.log}") from None

    def _poll(self) -> None:
        now = time.monotonic()
        for member in self.members:
            if not member.polling and now - member.polled_at >= POLL_SECONDS:
                member.polling, member.polled_at = True, now
                self.futures[member.actor.snapshot.remote()] = ("snapshot", member, None)

    def _state(self) -> State:
        everyone = [*self.former, *self.members]
        seen = [m.snapshot for m in everyone if m.snapshot]
        name, devices = self.here.accelerator, self.spec.engine.devices
        return State(
            committed_shards=self.committed_shards,
            committed_rows=self.committed_rows,
            live_rows=sum(s.rows for s in seen),
            live_failures=sum(s.failed for s in seen),
            live_tokens=sum(s.tokens for s in seen),
            phases=[m.snapshot.phase if m.snapshot else "start" for m in self.members],
            accounts=tuple(
                ReplicaAccount(
                    name,
                    len(m.slot.cores) or devices,
                    s.phases,
                    s.cpu,
                    s.tokens,
                    s.computed,
                    s.joules,
                    s.generated,
                    s.recalled,
                )
                for m in everyone
                if (s := m.snapshot)
            ),
            lost_replicas=self.lost,
            reached=self.reached,
        )

    def _note_first(self, snapshot: Snapshot | None) -> None:
        if snapshot and snapshot.first is not None:
            at = time.monotonic() - snapshot.first
            self.reached["first answer"] = min(at, self.reached.get("first answer", at))
