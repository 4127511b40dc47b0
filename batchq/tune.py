"""The fastest engine settings of those that are tried on a slice of the job's own rows."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from datetime import UTC, datetime
from typing import Any

from batchq import sample
from batchq.config import Config, EngineKind
from batchq.engine import Completion
from batchq.errors import ConfigError, EngineError
from batchq.machine.hardware import Hardware
from batchq.model.folder import open_tokenizer
from batchq.pool import Pool, Question
from batchq.progress import Progress
from batchq.quantize.checkpoint import Checkpoint
from batchq.records import Plan
from batchq.sample import Lengths
from batchq.sizing import settings, tuned
from batchq.sizing.settings import EAGER, FIELDS, ROWS, SHARE, STEP, TIGHT_SHARE, Weights
from batchq.sizing.tuned import Arguments, Tuned
from batchq.task import Task

WARM = 8  # rows that an engine answers before it is measured
MARGIN = 0.02  # by which a setting has to be faster to be kept
BUSY = 0.5  # processes that wait for each core, from which on speeds on a CPU don't compare


def sweep(
    config: Config,
    draft: Plan,
    checkpoint: Checkpoint,
    pool: Pool,
    here: Hardware,
    stop: threading.Event,
    show: Progress,
) -> str:
    """Try settings on a slice of the job's rows, an engine each, and keep the fastest; in words.

    Begins with what is chosen without trying, then changes one setting at a time and keeps what helps. Raises
    ConfigError when no row can be asked, EngineError when no engine ran, Stopped after `stop` was set.
    """
    began = time.monotonic()
    task, prompts = _slice(config, draft, checkpoint.path)
    untuned = dataclasses.replace(config, tune=dataclasses.replace(config.tune, use=False))
    lengths = Lengths.of(prompts)
    weights = Weights(checkpoint.path, checkpoint.bytes)
    plain, _ = settings.choose_settings(untuned, draft, weights, here, lengths)
    show.step(
        f"tune: {len(prompts):,} rows of {lengths.median:,} tokens in the median; "
        f"at most {config.tune.engines} engines, {config.tune.seconds:g} s each after its start"
    )

    if not here.gpus and config.cluster.address is None and (load := os.getloadavg()[0]) > BUSY * len(here.cores):
        show.step(f"tune: this machine is busy already (load {load:.1f}), so what is found may not be the fastest")

    def attempt(trial: Arguments, number: int) -> float:
        """Tokens of prompt and answer a second; 0 if the engine didn't run."""
        spec = settings.engine_spec(settings.with_settings(plain, trial), weights, here)
        question = Question(prompts, task.sampling, settings.in_flight(config, spec), WARM, config.tune.seconds)
        told = f"tune: {_words(trial)}: "
        try:
            answers, spent = pool.ask(
                spec,
                question,
                here,
                f"tune-{number}.log",
                stop,
                lambda count: show.update(f"{told}{count:,} rows answered"),
                lambda _: None,  # the error says it again
            )
        except EngineError as error:
            show.step(f"tune: {_words(trial)}: didn't run: {error}")
            return 0.0
        done = [a for a in answers[WARM:] if isinstance(a, Completion)]
        phases = spent.phases
        rate = sum(a.prompt_tokens + a.output_tokens for a in done) / max(phases["gate"], 1e-3)
        up = phases["start"] + phases["load"] + phases["compile"]
        show.step(
            f"tune: {_words(trial)}: {rate:,.0f} tokens/s "
            f"({len(done):,} rows in {phases['gate']:.1f} s, up after {up:.0f} s)"
        )
        return rate

    given = settings.configured(config)
    best = {name: getattr(plain.engine, name) for name in FIELDS if name not in given}
    tried = [(best, attempt(best, 0))]
    highest = before = tried[0][1]
    for name, values in _axes(plain, here):
        base = best
        for value in values if name not in given else ():
            trial = {**base, name: value}
            if len(tried) >= config.tune.engines or any(trial == one for one, _ in tried):
                continue
            tried.append((trial, attempt(trial, len(tried))))
            if tried[-1][1] > (1 + MARGIN) * highest:
                best, highest = tried[-1]
    if not highest:
        raise EngineError("tune: no engine ran; the lines above name their logs")
    found = Tuned(best, round(highest, 1), round(before, 1), lengths.median, f"{datetime.now(UTC):%Y-%m-%d}")
    tuned.remember(config, draft, here, found)
    show.clear()
    gain = f"{highest / before:.2f} times what is chosen without" if before else "the only ones that ran"
    if best == tried[0][0]:
        gain = f"what is chosen without; nothing else was faster by {MARGIN:.0%}"
    return (
        f"{_words(best)}: {highest:,.0f} tokens/s, {gain}\n"
        f"{len(tried)} engines in {time.monotonic() - began:.0f} s; kept for this hardware, model, scheme and vLLM, "
        "until it is tuned again; tune.use=false goes without"
    )


def _slice(config: Config, draft: Plan, path: str) -> tuple[Task, list[list[int]]]:
    """Prompts from all over the corpus that the engine takes."""
    task = Task(
        config.task,
        open_tokenizer(path, config.model.trust_remote_code),
        draft.columns,
        config.model.chat_template,
    )
    room = config.engine.max_model_len - task.sampling.max_tokens
    wanted = config.tune.rows + WARM
    messages = [message for message, _ in sample.rendered(task, sample.spread(draft, wanted))]
    prompts = [ids for ids in task.encode(messages) if len(ids) <= room][:wanted]
    if len(prompts) <= WARM:
        raise ConfigError(f"tune: only {len(prompts)} rows of this job can be asked, and it takes more than {WARM}")
    return task, prompts


def _axes(plain: Config, here: Hardware) -> list[tuple[str, list[Any]]]:
    """What is tried of each setting, most promising first."""
    step, rows = plain.engine.max_num_batched_tokens or 0, plain.engine.max_num_seqs or 0
    if here.device == "cpu":
        steps: list[tuple[str, list[Any]]] = [(STEP, [2 * step, 4 * step]), (ROWS, [rows // 2, 2 * rows])]
        return [(EAGER, [False]), *steps] if plain.engine.kind is EngineKind.vllm else steps
    axes: list[tuple[str, list[Any]]] = [(STEP, [step // 2, 2 * step]), (ROWS, [max(1, rows // 4)])]
    if plain.engine.kind is EngineKind.vllm:
        axes.append((EAGER, [True]))
        if settings.free_share(here) > TIGHT_SHARE:
            axes.append((SHARE, [TIGHT_SHARE]))
    return axes


def _words(trial: Arguments) -> str:
    return " · ".join(f"{name} {value:,}" if name in FIELDS else f"{name} {value}" for name, value in trial.items())
