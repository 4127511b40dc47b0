"""What a worker is sent before it begins, and the engine that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchq.config import TaskConfig
from batchq.engine.fake import FakeEngine
from batchq.engine.protocol import Engine, EngineSpec
from batchq.engine.vllm import VllmEngine
from batchq.engine.vllm_process import import_ahead
from batchq.records import Plan


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a worker needs, sent to it once. `plan` comes without its shards."""

    plan: Plan
    task: TaskConfig
    engine: EngineSpec
    output: str
    chat_template: dict[str, Any]
    in_flight: int
    spill_seconds: float
    stall_seconds: float
    incremental: bool = False  # answers of the former run that can't be read are asked for again
    quarantine: bool = False  # a shard whose input can't be read on ends there, and its receipt says why


def open_engine(spec: EngineSpec) -> Engine:
    """An engine of the kind that is asked for, not started yet."""
    if spec.kind == "fake":
        return FakeEngine(spec)
    import_ahead(spec)
    return VllmEngine(spec)
