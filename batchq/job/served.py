"""What is served: a checkpoint, cached or made now, and its engine, chosen once for the gate and for labelling."""

from __future__ import annotations

import dataclasses
import time
from contextlib import nullcontext
from dataclasses import dataclass

from batchq.account.usage import ReplicaAccount
from batchq.config import Config, Scheme
from batchq.errors import Stopped
from batchq.job.session import Session
from batchq.machine.hardware import Hardware, detect
from batchq.model.source import Model
from batchq.plan import sample
from batchq.quantize.checkpoint import Checkpoint, find_checkpoint, make_checkpoint, origin_of
from batchq.records import Plan
from batchq.sizing.settings import Settings, Weights, resolve_settings
from batchq.task.task import open_task


@dataclass(frozen=True, slots=True)
class Served:
    """A checkpoint, and how the engine that serves it is started: the same for the gate and for labelling."""

    model: Model
    scheme: Scheme
    checkpoint: Checkpoint
    settings: Settings


def serve(session: Session, drafted: Plan, model: Model, scheme: Scheme) -> Served:
    """The scheme's checkpoint, and the engine that it is served with."""
    checkpoint = ensure_checkpoint(session, drafted, model, scheme)
    return served_on(session.config, session.hardware, drafted, model, checkpoint)


def served_on(config: Config, hardware: Hardware, drafted: Plan, model: Model, checkpoint: Checkpoint) -> Served:
    """The draft's checkpoint, and how an engine is started on it with this hardware."""
    weights = Weights(checkpoint.path, checkpoint.bytes, origin_of(checkpoint, model.digest, config))
    settings = resolve_settings(config, drafted, weights, hardware)
    return Served(model, Scheme(drafted.quantization), checkpoint, settings)


def ensure_checkpoint(session: Session, drafted: Plan, model: Model, scheme: Scheme) -> Checkpoint:
    """The checkpoint that is served: the draft's, if it names one and the cache has it; otherwise the one that follows
    from the configuration, from the cache or made now; or the model as it is.

    Quantizing runs on the driver, and that machine's devices are charged for it, also when it fails or is stopped.
    Raises Stopped at the next layer after `session.stop` was set.
    """
    config, progress = session.config, session.progress
    if scheme is not Scheme.none:
        progress.step(f"quantizing {model.name} to {scheme.value}, unless it is cached")
    log = session.pool.logs / "quantize.log"
    began: list[float] = []  # when the work began, if there was any

    def prompts() -> list[list[int]]:
        return sample.calibration(config, drafted, open_task(config, model.path, drafted))

    def on_progress(words: str) -> None:
        if not began:
            session.invocation.hold(dataclasses.replace(_quantizing(0.0), phase="quantize"))
        began.append(time.monotonic())
        if session.stop.is_set():
            raise Stopped("stopped while the model was quantized; nothing was labelled yet")
        progress.update(words)

    if drafted.checkpoint and (
        former := find_checkpoint(model, drafted.checkpoint, config.quantization, progress.update)
    ):
        return former  # not calibrated again on rows that may be others by now
    try:
        with session.traces.phase("quantize") if scheme is not Scheme.none else nullcontext():
            return make_checkpoint(model, scheme, config.quantization, prompts, log, on_progress=on_progress)
    finally:
        if began:
            session.invocation.add(_quantizing(time.monotonic() - began[0]))


def _quantizing(seconds: float) -> ReplicaAccount:
    driver = detect()
    return ReplicaAccount(driver.accelerator, len(driver.gpus) or len(driver.cores), {"quantize": round(seconds, 3)})
