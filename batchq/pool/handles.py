"""Replicas as the driver sees them, and what it knows of all of them together."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from batchq.account.usage import Counters, ReplicaAccount
from batchq.config import ClusterConfig, EngineConfig
from batchq.engine.protocol import EngineSpec
from batchq.machine.hardware import Hardware
from batchq.machine.log import LogSetting
from batchq.records import Shard
from batchq.sizing.replicas import Slot
from batchq.worker.counters import Snapshot

CLOSE_SECONDS = 20.0


class Notify(Protocol):
    """Told of what was lost, and of which replica's or shard's it is: `Progress.warn`."""

    def __call__(self, text: str, *, replica: int | None = None, shard: int | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how replicas run, whatever they are asked: `engine` says how long one may take, `logs` is a folder."""

    cluster: ClusterConfig
    engine: EngineConfig
    hardware: Hardware
    logs: Path
    log_setting: LogSetting


class EngineClock:
    """Seconds by phase of one engine: as its process said them last, and from then on by the driver's clock, so that
    one which says nothing, or never did, is held all the same."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._phases: dict[str, float] = {}
        self._phase, self._began = "start", now()
        self._since = self._began
        self._unseen: float | None = None  # seconds of its start, before its process had a clock of its own

    @property
    def phase(self) -> str:
        """Empty once it has ended."""
        return self._phase

    def note(self, phases: Mapping[str, float], phase: str) -> None:
        """What its process says now; nothing counts that it says when it has ended."""
        if not self._phase:
            return
        if self._unseen is None:
            self._unseen = max(0.0, self._now() - self._began - sum(phases.values()))
        self._phases = {**phases, "start": round(phases.get("start", 0.0) + self._unseen, 3)}
        self._phase, self._since = phase, self._now()

    def end(self) -> None:
        self._phases, self._phase = self.seconds(), ""

    def seconds(self) -> dict[str, float]:
        total = dict(self._phases)
        if self._phase:
            total[self._phase] = round(total.get(self._phase, 0.0) + self._now() - self._since, 3)
        return total


class SampleClock:
    """What the engines that answer one sample hold, one after the other."""

    def __init__(self, accelerator: str, now: Callable[[], float] = time.monotonic) -> None:
        self._accelerator, self._devices, self._now = accelerator, 0, now
        self._ended: dict[str, float] = {}
        self.engine: EngineClock | None = None

    def begin(self, devices: int) -> EngineClock:
        """The clock of the next engine, which holds so many devices from now on."""
        self._devices, self.engine = devices, EngineClock(self._now)
        return self.engine

    def end(self) -> None:
        """The engine has ended, or is somebody else's from now on."""
        if self.engine:
            self.engine.end()
            self._ended = self.account().phases
            self.engine = None

    def account(self) -> ReplicaAccount:
        now = self.engine.seconds() if self.engine else {}
        phases = {name: round(self._ended.get(name, 0.0) + now.get(name, 0.0), 3) for name in {**self._ended, **now}}
        phase = self.engine.phase if self.engine else ""
        return ReplicaAccount(self._accelerator, self._devices, phases, phase=phase)


@dataclass(frozen=True, slots=True)
class WarmReplica:
    """A replica that has served the gate and may go on to label. `idle` counts from then on; `spent` is told of it if
    it ends without having labelled."""

    spec: EngineSpec
    slot: Slot
    actor: Any
    log: str
    idle: SampleClock
    spent: Callable[[ReplicaAccount], None]

    def end(self) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):  # it is gone, which is what we want
            ray.wait([self.actor.close.remote()], timeout=CLOSE_SECONDS)
        ray.kill(self.actor)
        self.idle.end()
        self.spent(self.idle.account())


@dataclass(slots=True, eq=False)
class ReplicaHandle:
    """One replica that labels, or did."""

    number: int
    slot: Slot
    actor: Any
    log: str
    started_at: float
    ready: bool = False
    joined: bool = False  # while others worked
    shards: dict[int, tuple[Shard, str]] = field(default_factory=dict)  # and the attempt's id
    snapshot: Snapshot | None = None
    clock: EngineClock = field(default_factory=EngineClock)
    polling: bool = False
    polled_at: float = 0.0

    def note(self, snapshot: Snapshot | None) -> None:
        """What its process says now, if it says anything."""
        if snapshot:
            self.snapshot = snapshot
            self.clock.note(snapshot.phases, snapshot.phase)

    def account(self, accelerator: str, devices: int) -> ReplicaAccount:
        """What it held and did; `devices` of an engine that binds no cores."""
        held = ReplicaAccount(
            accelerator, len(self.slot.cores) or devices, self.clock.seconds(), phase=self.clock.phase
        )
        if self.snapshot is None:
            return held
        seen = self.snapshot
        return dataclasses.replace(held, cpu=seen.cpu, counters=seen.counters, joules=seen.joules)


@dataclass(slots=True)
class PoolSnapshot:
    """What the driver knows while shards are labelled; given to `on_progress` about once a second."""

    committed_shards: int  # by this invocation; their receipts are in the store, not in the driver's memory
    committed_rows: int
    counters: Counters  # of all replicas of this invocation, lost ones too; committed or not
    phases: list[str]
    accounts: tuple[ReplicaAccount, ...]
    losses: tuple[str, ...]  # replicas that were lost: which, and why
    reached: dict[str, float]  # what of the start-up, and when, on the driver's time.monotonic()
    in_flight: int = 0  # rows that engines have at the moment
