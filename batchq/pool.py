"""Ray actors: placement, handing out shards, replacing what is lost. The only importer of ray.

The driver hands each replica two shards, the one it labels and the next, so that no replica waits
for the driver; nothing but shards, receipts and snapshots travels through Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchq import hardware, poison, write
from batchq.account import PhaseClock, ReplicaAccount
from batchq.config import ClusterConfig
from batchq.engine import Completion, EngineSpec, Sampling
from batchq.errors import BatchqError, ConfigError, EngineError, EngineOutOfMemory, RowError, Stopped
from batchq.hardware import Hardware
from batchq.records import Failure, Receipt, Shard
from batchq.worker import Snapshot, Worker, WorkerSpec, open_engine

AHEAD = 2  # shards a replica holds: the one that feeds its engine, and the next
POLL_SECONDS = 1.0  # between snapshots of a replica
CLOSE_SECONDS = 20.0
DRAIN_SHARE = 0.6  # of the grace period, for rows in flight to be answered; then answers are saved
CLOSE_SHARE = 0.2  # of the grace period, from which on nothing is waited for but the end


class Replica:
    """The actor: one engine in its own process, its output and its children's in one log file.

    It answers the gate's prompts, or labels; one whose answers the gate accepted goes on to label.
    """

    def __init__(self, spec: EngineSpec, log: str) -> None:
        self.clock = PhaseClock("start")
        _log_to(log)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self.engine = open_engine(spec)
        self.worker: Worker | None = None  # from `start` on; Ray may run another method before it
        self.answered = 0

    # -- for gate and tune --

    async def open(self) -> None:
        self.clock.enter("load")
        phases = await self.engine.start()
        self.clock.enter("gate")
        self.clock.move("load", "compile", phases.get("compile", 0.0))

    async def ask(
        self, prompts: list[list[int]], sampling: Sampling, in_flight: int, keep: bool, warm: int, seconds: float
    ) -> tuple[list[Completion | Failure], dict[str, float]]:
        """The answers in the prompts' order, and the seconds by phase; `keep` leaves the engine up.

        The first `warm` prompts count as loading. What isn't asked within `seconds` after them isn't asked at all.
        """
        places = asyncio.Semaphore(in_flight)
        until = math.inf

        async def one(prompt: list[int]) -> Completion | Failure:
            async with places:
                if time.monotonic() >= until:
                    return Failure("not_asked", "the time was up")
                try:
                    return await self.engine.ask(prompt, sampling)
                except RowError as error:
                    return Failure(error.code, error.message)
                finally:
                    self.answered += 1

        self.clock.enter("load" if warm else "gate")
        answers = list(await asyncio.gather(*map(one, prompts[:warm])))
        self.clock.enter("gate")
        until = time.monotonic() + seconds
        answers += await asyncio.gather(*map(one, prompts[warm:]))
        if not keep:
            await self.engine.close()
        spent, self.clock = self.clock.seconds(), PhaseClock("idle")  # from here on it is the labelling's time
        return answers, spent

    async def progress(self) -> tuple[int, dict[str, float]]:
        """How many prompts were answered, and the seconds by phase."""
        return self.answered, self.clock.seconds()

    # -- for the labelling --

    async def start(self, spec: WorkerSpec) -> None:
        self.worker = Worker(spec, self.clock, self.engine)
        await self.worker.start()
        # What stands now stays; looking through it again and again is up to 10 us a row.
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)

    async def label(self, shard: Shard, attempt: str) -> list[Receipt]:
        assert self.worker is not None, "start() comes first"
        try:
            return await self.worker.label(shard, attempt)
        except BatchqError:
            raise
        except Exception as error:  # a defect: where it happened goes to the log, its message may quote a row
            print(
                f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}",
                file=sys.stderr,
                flush=True,
            )
            raise

    async def snapshot(self) -> Snapshot | None:
        return self.worker.snapshot() if self.worker else None

    async def stop(self, grace: float) -> None:
        if self.worker:
            self.worker.stop(grace)

    async def close(self) -> Snapshot | None:
        """Free the devices; says how far it was, unless it has only served the gate."""
        snapshot = await self.snapshot()
        await (self.worker or self.engine).close()
        return snapshot


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one replica: a node, and on a node without accelerators the cores it may use."""

    node: str
    cores: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """A replica that has served the gate and may go on to label."""

    spec: EngineSpec
    slot: Slot
    actor: Any
    log: str


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
    live_tokens: int
    phases: list[str]
    accounts: tuple[ReplicaAccount, ...]
    lost_replicas: int
    reached: dict[str, float]  # what of the start-up, and when, on the driver's time.monotonic()


class Pool:
    """A connection to Ray, local or an existing cluster, for one run; opened when it is first needed."""

    def __init__(self, cluster: ClusterConfig, logs: Path) -> None:
        self.cluster = cluster
        self.logs = logs
        self._connected = False
        self._kept: Kept | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._connected:
            import ray

            ray.shutdown()

    def connect(self) -> None:
        """Start Ray on this machine, on loopback only, or join `cluster.address`. Once; later calls do nothing.

        Raises ConfigError if no cluster answers there.
        """
        if self._connected:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray makes its workers nice to everything else (15); here the engines are what the machine is for.
        os.environ.setdefault("RAY_worker_niceness", "0")
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
        if self.cluster.address is None:
            here = hardware.detect()
            options |= {
                "address": "local",
                "_node_ip_address": "127.0.0.1",
                "include_dashboard": False,
                "num_cpus": len(here.cores),
                "num_gpus": len(here.gpus),
                "object_store_memory": 100 * 1024 * 1024,  # no row travels through it
            }
        else:
            _require_answer(self.cluster.address)
            import batchq

            options |= {"address": self.cluster.address, "runtime_env": {"py_modules": [batchq]}}
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            hint = "" if "RAY_AUTH_MODE" in os.environ else "; if it asks for a token, set RAY_AUTH_MODE=token"
            raise ConfigError(f"cluster.address={self.cluster.address}: {str(error).splitlines()[0]}{hint}") from error
        self._connected = True
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray takes SIGTERM for itself
                signal.signal(number, handler)

    def hardware(self) -> Hardware:
        """What a node that will run replicas has: this machine, or one of the cluster's."""
        if self.cluster.address is None:
            return hardware.detect()
        self.connect()
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = _nodes()
        nodes.sort(key=lambda n: (-n["Resources"].get("GPU", 0), -n["Resources"].get("CPU", 0)))
        there = NodeAffinitySchedulingStrategy(nodes[0]["NodeID"], soft=False)
        return ray.get(ray.remote(hardware.detect).options(num_cpus=0, scheduling_strategy=there).remote())  # type: ignore[no-any-return]

    def slots(self, here: Hardware) -> list[Slot]:
        """Where replicas go. Raises ConfigError if the cluster has no room for what is asked."""
        cluster, nodes = self.cluster, _nodes()
        gpus = cluster.tensor_parallel_size * cluster.pipeline_parallel_size
        rooms: list[list[Slot]] = []
        for node in nodes:
            if here.device == "cuda":
                count = int(node["Resources"].get("GPU", 0)) // gpus
                rooms.append([Slot(node["NodeID"], ())] * count)
            else:
                cores = here.cores[: int(node["Resources"].get("CPU", 0))]
                a_node = -(-(cluster.replicas or 1) // len(nodes))
                share = cluster.cpus_per_replica or max(1, len(cores) // a_node)
                starts = range(0, len(cores) - share + 1, share)
                rooms.append([Slot(node["NodeID"], cores[i : i + share]) for i in starts])
        # A node's first before any node's second.
        slots = [slot for row in itertools.zip_longest(*rooms) for slot in row if slot is not None]
        wanted = cluster.replicas or len(slots)
        if not slots or wanted > len(slots):
            unit = f"{gpus} GPUs" if here.device == "cuda" else "cores"
            raise ConfigError(
                f"cluster.replicas={cluster.replicas}: there is room for {len(slots)} (of {unit} each); "
                "lower it, cluster.tensor_parallel_size, cluster.pipeline_parallel_size or cluster.cpus_per_replica"
            )
        return slots[:wanted]

    def ask(
        self,
        spec: EngineSpec,
        prompts: list[list[int]],
        sampling: Sampling,
        in_flight: int,
        here: Hardware,
        log: str,
        start_timeout: float,
        stop: threading.Event,
        on_progress: Callable[[int], None],
        say: Callable[[str], None] = lambda _: None,
        keep: bool = False,
        warm: int = 0,
        seconds: float = math.inf,
    ) -> tuple[list[Completion | Failure], ReplicaAccount]:
        """Start one engine and have it answer; returns the answers in order and what it cost.

        An engine that dies is replaced, up to `cluster.max_attempts`, and `say` is told. With `keep` it stays up, and
        `label` goes on with it if it is to label with an engine of just this kind; `release` ends it otherwise.
        The first `warm` prompts count as its start; what it hasn't been asked `seconds` after them is a Failure.
        Raises EngineError when it doesn't start or dies too often, Stopped after `stop` was set.
        """
        self.connect()
        self.release()
        import ray

        slot = self.slots(here)[0]
        path = str(self.logs / log)
        spec = dataclasses.replace(spec, cores=slot.cores)
        spent: Counter[str] = Counter()

        def wait(actor: Any, future: Any, limit: float, seen: dict[str, float]) -> Any:
            began = time.monotonic()
            while not ray.wait([future], timeout=POLL_SECONDS)[0]:
                if stop.is_set():
                    raise Stopped("stopped while a sample was asked; nothing was labelled yet")
                if time.monotonic() - began > limit:
                    raise EngineError(f"an engine was not ready after engine.start_timeout_s={limit:.0f}; log: {path}")
                looking = actor.progress.remote()
                if ray.wait([looking], timeout=POLL_SECONDS)[0]:
                    count, phases = ray.get(looking)
                    seen.update(phases)
                    on_progress(count)
            return ray.get(future)

        for _ in range(self.cluster.max_attempts):
            actor: Any = _actor_class(Replica).options(**_placement(slot, spec, here)).remote(spec, path)
            seen: dict[str, float] = {}
            ready = False
            try:
                wait(actor, actor.open.remote(), start_timeout, seen)
                ready = True
                asking = actor.ask.remote(prompts, sampling, in_flight, keep, warm, seconds)
                found, seen = wait(actor, asking, math.inf, seen)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, BaseException) else error
                if not isinstance(cause, EngineError):
                    raise BatchqError(f"the sample's engine failed ({type(cause).__name__}); log: {path}") from None
                if not ready:  # it would not start another time either
                    raise EngineError(f"{cause}; log: {path}") from None
                if isinstance(cause, EngineOutOfMemory):
                    in_flight = max(1, min(in_flight, spec.max_num_seqs) // 2)
                    spec = dataclasses.replace(spec, max_num_seqs=in_flight)
                why = str(cause)
            except ray.exceptions.RayError:
                why = "its process died"
            else:
                self._kept = Kept(spec, slot, actor, path) if keep else None
                spent.update(seen)
                devices = len(slot.cores) or spec.devices
                return found, ReplicaAccount(here.accelerator, devices, {p: round(s, 3) for p, s in spent.items()})
            finally:
                if self._kept is None or self._kept.actor is not actor:
                    ray.kill(actor)
            spent.update(seen)
            say(f"the engine that was asked a sample is lost: {why}; log: {path}")
        raise EngineError(f"a sample cost {self.cluster.max_attempts} engines in a row ({why}); log: {path}")

    def release(self) -> None:
        """End the engine that `ask` kept, if there is one."""
        if self._kept is None:
            return
        import ray

        kept, self._kept = self._kept, None
        with contextlib.suppress(ray.exceptions.RayError):  # it is gone, which is what we want
            ray.wait([kept.actor.close.remote()], timeout=CLOSE_SECONDS)
        ray.kill(kept.actor)

    def take(self, spec: EngineSpec, slot: Slot) -> Kept | None:
        """The engine that `ask` kept, if it is of this kind and at this place; otherwise it is ended."""
        if self._kept is not None and (self._kept.spec, self._kept.slot) == (spec, slot):
            kept, self._kept = self._kept, None
            return kept
        self.release()
        return None

    def label(
        self,
        spec: WorkerSpec,
        shards: Sequence[Shard],
        here: Hardware,
        start_timeout: float,
        stop: threading.Event,
        on_progress: Callable[[State], None],
        say: Callable[[str], None],
    ) -> State:
        """Label all `shards`; returns the final state. `say` is told of every replica that is lost.

        Raises Stopped after `stop` was set, within `cluster.grace_seconds`; EngineError when an engine
        doesn't start or a shard lost too many (`cluster.max_attempts`); and what a worker raised for good.
        """
        self.connect()
        return _Labelling(self, spec, shards, here, start_timeout, stop, on_progress, say).run()


class _Labelling:
    def __init__(
        self,
        pool: Pool,
        spec: WorkerSpec,
        shards: Sequence[Shard],
        here: Hardware,
        start_timeout: float,
        stop: threading.Event,
        on_progress: Callable[[State], None],
        say: Callable[[str], None],
    ) -> None:
        self.pool, self.spec, self.here = pool, spec, here
        self.start_timeout, self.stop, self.on_progress, self.say = start_timeout, stop, on_progress, say
        self.pending = deque(shards)
        self.members: list[Member] = []
        self.former: list[Member] = []
        self.futures: dict[Any, tuple[str, Member, Shard | None]] = {}
        self.false_starts = 0  # processes in a row that were lost before they were ready
        self.committed_shards = self.committed_rows = 0
        self.stopped_at: float | None = None
        self.lost = 0
        self.told_at = 0.0
        self.reached: dict[str, float] = {}

    def run(self) -> State:
        import ray

        slots = self.pool.slots(self.here)[: max(1, len(self.pending))]
        try:
            for slot in slots:
                self._open(slot)
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
                        member.actor.stop.remote(DRAIN_SHARE * self.pool.cluster.grace_seconds)
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

    def _open(self, slot: Slot) -> None:
        number = len(self.members) + len(self.former)
        log = str(self.pool.logs / f"replica-{number}.log")
        spec = dataclasses.replace(self.spec, engine=dataclasses.replace(self.spec.engine, cores=slot.cores))
        if kept := self.pool.take(spec.engine, slot):
            actor, log = kept.actor, kept.log
        else:
            actor = _actor_class(Replica).options(**_placement(slot, spec.engine, self.here)).remote(spec.engine, log)
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
        if self._alive(member.slot):
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
        most = self.pool.cluster.max_attempts
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
        return 1 - (time.monotonic() - self.stopped_at) / self.pool.cluster.grace_seconds

    def _alive(self, slot: Slot) -> bool:
        return any(node["NodeID"] == slot.node for node in _nodes())

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
            limit = min(limit, max(0.0, self._grace() * self.pool.cluster.grace_seconds / 2))
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
            if not member.ready and self._alive(member.slot):
                self.false_starts += 1
                refused = isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed
                if refused or self.false_starts >= self.pool.cluster.max_attempts:
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


def _placement(slot: Slot, spec: EngineSpec, here: Hardware) -> dict[str, Any]:
    """Ray's options for the actor that runs one engine."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cuda = here.device == "cuda"
    return {
        "num_cpus": 0 if cuda else len(slot.cores),
        "num_gpus": spec.devices if cuda else 0,
        "max_restarts": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(slot.node, soft=False),
    }


def _log_to(path: str) -> None:
    """Send this process's output, and its children's, to a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _require_answer(address: str) -> None:
    """Raises ConfigError when nothing listens there; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ConfigError(
            f"cluster.address={address}: no Ray cluster answers there ({error.strerror or error})"
        ) from None


def _nodes() -> list[dict[str, Any]]:
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return sorted((n for n in nodes if n["Alive"]), key=lambda n: str(n["NodeID"]))


def _actor_class(kind: type) -> Any:
    import ray

    return ray.remote(kind)
