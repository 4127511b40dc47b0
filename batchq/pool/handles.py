"""Replicas as the driver sees them, and what it knows of all of them together."""

from __future__ import annotations

import contextlib
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


@dataclass(frozen=True, slots=True)
class WarmReplica:
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
    polling: bool = False
    polled_at: float = 0.0

    def account(self, accelerator: str, devices: int) -> ReplicaAccount | None:
        """What it held and did, where that is known; `devices` of an engine that binds no cores."""
        seen = self.snapshot
        if seen is None:
            return None
        return ReplicaAccount(
            accelerator=accelerator,
            devices=len(self.slot.cores) or devices,
            phases=seen.phases,
            cpu=seen.cpu,
            counters=seen.counters,
            joules=seen.joules,
        )


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
