"""Asks the unquantized model and the quantized one the same rows of the job, and has verdict.py compare the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from batchq import __version__
from batchq.account.events import Kind
from batchq.config import Config, EngineKind, KvCache, ModelConfig, Scheme
from batchq.engine.protocol import Completion, EngineSpec, Origin
from batchq.errors import ConfigError, GateRefused
from batchq.job.served import Served
from batchq.job.session import Session
from batchq.machine import local_cache
from batchq.machine.cache import cache_of
from batchq.machine.digests import digest_of
from batchq.model.source import Model, resolve
from batchq.model.tensors import read_tensors, stored_bytes
from batchq.plan import sample, warnings
from batchq.pool import SampleListener, SampleRequest
from batchq.quantize.checkpoint import read_verdict, write_verdict
from batchq.quantize.verdict import Verdict, judge, verdict_from_json
from batchq.records import Failure, Plan, restored
from batchq.sizing.fit import Fit
from batchq.sizing.settings import Weights, engine_spec, in_flight
from batchq.sizing.tuned import engine_version
from batchq.task.task import open_task


def evaluate_gate(session: Session, draft: Plan, served: Served) -> Verdict | None:
    """The gate's verdict on what would be served; None where there is nothing to judge it by.

    The engine that answered for an accepted checkpoint stays up, and goes on to label. Raises GateRefused under
    gate.strict where the baseline can't be asked, ConfigError where no row is left to judge by, EngineError, Stopped.
    """
    config, settings = session.config, session.config.gate
    model, scheme, checkpoint = served.model, served.scheme, served.checkpoint
    baseline = find_baseline(config, model)
    as_it_is = scheme is Scheme.none and not model.quantized and config.quantization.kv_cache is KvCache.auto
    if not settings.enabled or as_it_is or baseline is None:
        return None
    unquantized = dataclasses.replace(
        config, quantization=dataclasses.replace(config.quantization, kv_cache=KvCache.auto)
    )
    if config.engine.kind is EngineKind.vllm and not Fit(baseline, session.hardware, unquantized).fits(Scheme.none):
        if settings.strict:
            raise GateRefused(f"gate.strict: {baseline.name} doesn't fit here unquantized, so nothing can be compared")
        session.progress.warn(f"gate: {baseline.name} doesn't fit here unquantized, so {scheme.value} goes unjudged")
        return None
    task = open_task(config, model.path, draft)
    asked = sample.judging(config, draft, task)
    if warning := warnings.unknown_gold(config, asked.golds):
        session.progress.warn(f"gate: {warning}")
    sampling = dataclasses.replace(task.sampling, score_prompt=task.space.decodes)
    prompts = [prompt.token_ids for prompt in asked.prompts]
    request = [dataclasses.asdict(sampling), prompts, config.engine.max_model_len, config.engine.kind.value]
    # Another batchq may compute otherwise: with vLLM's norms instead of torch's 0.734 of the demo's rows became 0.713.
    key = digest_of([baseline.digest, request, engine_version(), __version__])
    terms = [settings.recovery, settings.confidence, settings.min_gold, settings.seed]
    case = digest_of([key, checkpoint.key, asked.golds, config.quantization.kv_cache.value, terms])
    if cached := read_verdict(checkpoint, case, config.quantization):
        return verdict_from_json(cached)

    def ask(name: str, spec: EngineSpec, stay_up: bool) -> list[Completion | Failure]:
        log = f"gate-{name}.log"
        request = SampleRequest(asked.prompts, sampling, in_flight(config, spec), log=log, stay_up=stay_up)
        return _ask(session, name, spec, request)

    before = recall_answers(key)
    if before is None:
        source = config.model if config.gate.baseline is None else ModelConfig(path=config.gate.baseline)
        origin = Origin(source, cache_of(config.quantization))
        weights = Weights(baseline.path, stored_bytes(read_tensors(baseline.path)), origin)
        before = ask("baseline", engine_spec(unquantized, weights, session.hardware), stay_up=False)
        remember_answers(key, before)
    after = ask(scheme.value, served.settings.engine, stay_up=True)  # it may go on to label
    verdict = judge(scheme.value, asked, before, after, task.space.labels, settings)
    write_verdict(checkpoint, case, dataclasses.asdict(verdict), config.quantization)
    return verdict


def find_baseline(config: Config, model: Model) -> Model | None:
    """The unquantized model that the gate compares with; None for a quantized one whose baseline isn't named."""
    if config.gate.baseline is not None:
        named = resolve(ModelConfig(path=config.gate.baseline))
        if named.quantized:
            raise ConfigError(f"gate.baseline={config.gate.baseline}: is quantized itself ({named.quantized})")
        return named
    return None if model.quantized else model


def _ask(session: Session, name: str, spec: EngineSpec, request: SampleRequest) -> list[Completion | Failure]:
    rows = len(request.prompts)
    session.progress.step(f"gate: asking {name} for {rows:,} rows")
    words = f"gate: {name} has answered {{:,}} of {rows:,} rows"

    def lost(why: str) -> None:
        session.progress.warn(why)
        session.events.emit(Kind.engine_lost, reason=why)

    listener = SampleListener(
        lambda count: session.progress.update(words.format(count), count / rows),
        lost,
        session.invocation.hold,
        session.invocation.add,
    )
    answers, _ = session.pool.answer_sample(spec, request, session.hardware, session.stop, listener)
    return answers


# ---- answers of the baseline, cached for another run ----


def remember_answers(key: str, answers: Sequence[Completion | Failure]) -> None:
    """Cache a baseline's answers; no row's text is in them."""
    stored = [
        dataclasses.asdict(dataclasses.replace(a, text="")) if isinstance(a, Completion) else dataclasses.asdict(a)
        for a in answers
    ]
    local_cache.write("gate", key, stored)


def recall_answers(key: str) -> list[Completion | Failure] | None:
    """What `remember_answers` cached under this key, if anything."""
    return local_cache.read("gate", key, _answers)


def _answers(stored: list[dict[str, Any]]) -> list[Completion | Failure]:
    return [restored(answer, Failure) if "code" in answer else restored(answer, Completion) for answer in stored]
