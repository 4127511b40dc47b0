"""Tries engine settings on some of the job's rows, an engine each, and saves the fastest for later runs."""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from batchq.config import Config, EngineKind, Scheme
from batchq.engine.protocol import Completion, Prompt
from batchq.errors import ConfigError, EngineError
from batchq.job.scheme import choose_scheme
from batchq.job.served import ensure_checkpoint
from batchq.job.session import Session, open_session
from batchq.machine.hardware import Hardware
from batchq.model.source import resolve_for
from batchq.plan import sample
from batchq.plan.draft import make_plan
from batchq.plan.inputs import obeyed
from batchq.plan.sample import Lengths
from batchq.plan.stored import load_plan
from batchq.pool import SampleListener, SampleRequest
from batchq.quantize.checkpoint import Checkpoint, origin_of
from batchq.records import Plan
from batchq.sizing import settings, tuned
from batchq.sizing.settings import EAGER, FIELDS, ROWS, SHARE, STEP, TIGHT_SHARE, Weights, configured, free_share
from batchq.sizing.tuned import Arguments, Tuned
from batchq.task.task import Task, open_task

WARM = 8  # rows that an engine answers before it is measured
MARGIN = 0.02  # by which a setting has to be faster than the best so far to replace it
BUSY = 0.5  # processes that wait for each core, from which on speeds on a CPU don't compare


def tune_job(config: Config, stop: threading.Event) -> str:
    """`batchq tune`: find this job's fastest engine settings and save them; labels nothing."""
    cluster = dataclasses.replace(config.cluster, max_attempts=1)  # settings whose engine dies are out
    with open_session(dataclasses.replace(config, cluster=cluster), "tune", stop) as session:
        existing = load_plan(session.output)
        model = resolve_for(config)
        if existing:
            drafted = obeyed(existing, config)
        else:
            drafted = make_plan(config, model.digest, choose_scheme(session, model).scheme, checkpoint="")
        checkpoint = ensure_checkpoint(session, drafted, model, Scheme(drafted.quantization))
        return sweep(session, drafted, checkpoint)


@dataclass(frozen=True, slots=True)
class Slice:
    """The rows that every engine is asked."""

    task: Task
    prompts: list[Prompt]


def sweep(session: Session, drafted: Plan, checkpoint: Checkpoint) -> str:
    """Try settings on a slice of the job's rows, an engine each, and save the fastest; in words.

    Begins with what is chosen without trying, then changes one setting at a time, as long as that helps. Raises
    ConfigError when no row can be asked, EngineError when no engine ran, Stopped after `session.stop` was set.
    """
    config, progress, hardware = session.config, session.progress, session.hardware
    began = time.monotonic()
    rows = _slice(config, drafted, checkpoint.path)
    untuned = dataclasses.replace(config, tune=dataclasses.replace(config.tune, use=False))
    lengths = Lengths.of(rows.prompts)
    weights = Weights(checkpoint.path, checkpoint.bytes, origin_of(checkpoint, drafted.model, config))
    plain, _ = settings.choose_settings(untuned, drafted, weights, hardware, lengths)
    progress.step(
        f"tune: {len(rows.prompts):,} rows of {lengths.median:,} tokens in the median; "
        f"at most {config.tune.engines} engines, {config.tune.seconds:g} s each after its start"
    )
    if (
        not hardware.gpus
        and config.cluster.address is None
        and (load := os.getloadavg()[0]) > BUSY * len(hardware.cores)
    ):
        progress.warn(f"tune: this machine is busy already (load {load:.1f}), so the result may not be the fastest")

    def attempt(trial: Arguments, number: int) -> float:
        return _rate(session, plain, weights, rows, trial, number)

    best = {name: getattr(plain.engine, name) for name in FIELDS if name not in configured(config)}
    tried = [(best, attempt(best, 0))]
    highest = before = tried[0][1]
    for name, values in _axes(plain, hardware):
        base = best
        for value in values if name not in configured(config) else ():
            trial = {**base, name: value}
            if len(tried) >= config.tune.engines or any(trial == former for former, _ in tried):
                continue
            tried.append((trial, attempt(trial, len(tried))))
            if tried[-1][1] > (1 + MARGIN) * highest:
                best, highest = tried[-1]
    if not highest:
        raise EngineError("tune: no engine ran; the lines above name their logs")
    result = Tuned(best, round(highest, 1), round(before, 1), lengths.median, f"{datetime.now(UTC):%Y-%m-%d}")
    tuned.remember(config, drafted, hardware, result)
    gain = f"{highest / before:.2f} times what is chosen without" if before else "the only ones that ran"
    if best == tried[0][0]:
        gain = f"what is chosen without; nothing else was faster by {MARGIN:.0%}"
    return (
        f"{_words(best)}: {highest:,.0f} tokens/s, {gain}\n"
        f"{len(tried)} engines in {time.monotonic() - began:.0f} s; saved for this hardware, model, scheme and vLLM, "
        "until it is tuned again; tune.use=false goes without"
    )


def _rate(session: Session, plain: Config, weights: Weights, rows: Slice, trial: Arguments, number: int) -> float:
    """Tokens of prompt and answer per second under these settings; 0 if the engine didn't run."""
    config, progress = session.config, session.progress
    spec = settings.engine_spec(settings.with_settings(plain, trial), weights, session.hardware)
    in_flight = settings.in_flight(config, spec)
    request = SampleRequest(
        rows.prompts,
        rows.task.sampling,
        in_flight,
        log=f"tune-{number}.log",
        warm_up=WARM,
        seconds=config.tune.seconds,
    )
    told = f"tune: {_words(trial)}: "
    listener = SampleListener(
        lambda count: progress.update(f"{told}{count:,} rows answered"),
        lambda _: None,  # the error says it again
        session.invocation.hold,
        session.invocation.add,
    )
    try:
        answers, spent = session.pool.answer_sample(spec, request, session.hardware, session.stop, listener)
    except EngineError as error:
        progress.step(f"{told}didn't run: {error}")
        return 0.0
    done = [a for a in answers[WARM:] if isinstance(a, Completion)]
    phases = spent.phases
    rate = sum(a.prompt_tokens + a.output_tokens for a in done) / max(phases["gate"], 1e-3)
    up = phases["start"] + phases["load"] + phases["compile"]
    progress.step(f"{told}{rate:,.0f} tokens/s ({len(done):,} rows in {phases['gate']:.1f} s, up after {up:.0f} s)")
    return rate


def _slice(config: Config, drafted: Plan, path: str) -> Slice:
    """Prompts from all over the corpus that the engine takes."""
    task = open_task(config, path, drafted)
    wanted = config.tune.rows + WARM
    asked = sample.spread(drafted, wanted, lambda rows: sample.rendered(task, rows))
    fitting = sample.fitting(task, asked, config.engine.max_model_len)
    prompts = [prompt for prompt, _ in itertools.islice(fitting, wanted)]
    if len(prompts) <= WARM:
        raise ConfigError(f"tune: only {len(prompts)} rows of this job can be asked, and it takes more than {WARM}")
    return Slice(task, prompts)


def _axes(plain: Config, hardware: Hardware) -> list[tuple[str, list[Any]]]:
    """What is tried of each setting, most promising first."""
    step, rows = plain.engine.max_num_batched_tokens or 0, plain.engine.max_num_seqs or 0
    if hardware.device == "cpu":
        steps: list[tuple[str, list[Any]]] = [(STEP, [2 * step, 4 * step]), (ROWS, [rows // 2, 2 * rows])]
        return [(EAGER, [False]), *steps] if plain.engine.kind is EngineKind.vllm else steps
    axes: list[tuple[str, list[Any]]] = [(STEP, [step // 2, 2 * step]), (ROWS, [max(1, rows // 4)])]
    if plain.engine.kind is EngineKind.vllm:
        axes.append((EAGER, [True]))
        if free_share(hardware) > TIGHT_SHARE:
            axes.append((SHARE, [TIGHT_SHARE]))
    return axes


def _words(trial: Arguments) -> str:
    return " · ".join(f"{name} {value:,}" if name in FIELDS else f"{name} {value}" for name, value in trial.items())
