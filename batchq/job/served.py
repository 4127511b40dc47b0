"""What is served: a checkpoint made or found, and the engine on it, settled once for the gate and for labelling."""

from __future__ import annotations

import time
from dataclasses import dataclass

from batchq import capacity, models, quantize
from batchq.account import ReplicaAccount
from batchq.config import Config, Scheme
from batchq.engine import EngineSpec
from batchq.errors import Stopped
from batchq.hardware import Hardware, detect
from batchq.job.session import Session
from batchq.models import Model
from batchq.plan import sample
from batchq.quantize import Checkpoint
from batchq.records import Plan
from batchq.settings import Reason, settled
from batchq.task import Task


@dataclass(frozen=True, slots=True)
class Served:
    """A checkpoint and the engine that serves it, the same for the gate and for labelling, with the reasons of its
    settings."""

    model: Model
    scheme: Scheme
    checkpoint: Checkpoint
    engine: EngineSpec
    in_flight: int  # rows handed to the engine and not yet answered
    reasons: tuple[Reason, ...]


def serve(session: Session, drafted: Plan, model: Model, scheme: Scheme) -> Served:
    """The scheme's checkpoint, and the engine that it is served with."""
    checkpoint = ensure_checkpoint(session, drafted, model, scheme)
    return served_on(session.config, session.hardware, drafted, model, checkpoint)


def served_on(config: Config, hardware: Hardware, drafted: Plan, model: Model, checkpoint: Checkpoint) -> Served:
    """What serves the draft's checkpoint on such hardware."""
    with_settings, reasons = settled(config, drafted, checkpoint.path, checkpoint.bytes, hardware)
    engine = capacity.engine_spec(with_settings, checkpoint.path, checkpoint.bytes, hardware)
    in_flight = config.engine.in_flight or 2 * engine.max_num_seqs
    return Served(model, Scheme(drafted.quantization), checkpoint, engine, in_flight, tuple(reasons))


def ensure_checkpoint(session: Session, drafted: Plan, model: Model, scheme: Scheme) -> Checkpoint:
    """The checkpoint that is served: the draft's, if it names one and the cache has it; otherwise the one that follows
    from the configuration, from the cache or made now; or the model as it is.

    Quantizing runs on the driver, and that machine's devices are charged for it, also when it fails or is stopped.
    Raises Stopped at the next layer after `session.stop` was set.
    """
    config, progress = session.config, session.progress
    if scheme is not Scheme.none:
        progress.step(f"quantizing {model.name} to {scheme.value}, unless it is cached")
    log = models.cache_dir() / "logs" / config.job.name / "quantize.log"
    began: list[float] = []  # when the work began, if there was any

    def prompts() -> list[list[int]]:
        tokenizer = models.open_tokenizer(model.path, model.trusted)
        task = Task(config.task, tokenizer, drafted.columns, config.model.chat_template)
        return sample.calibration(config, drafted, task)

    def on_progress(words: str) -> None:
        began.append(time.monotonic())
        if session.stop.is_set():
            raise Stopped("stopped while the model was quantized; nothing was labelled yet")
        progress.update(words)

    if drafted.checkpoint and (
        former := quantize.kept(model, drafted.checkpoint, config.quantization, progress.update)
    ):
        return former  # not calibrated again on rows that may be others by now
    try:
        return quantize.quantize(model, scheme, config.quantization, prompts, log, on_progress=on_progress)
    finally:
        if began:
            driver = detect()
            phases = {"quantize": round(time.monotonic() - began[0], 3)}
            devices = len(driver.gpus) or len(driver.cores)
            session.invocation.spent(ReplicaAccount(driver.accelerator, devices, phases))
