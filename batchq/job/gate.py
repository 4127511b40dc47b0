"""Asks the unquantized model and the quantized one the same rows of the job, and has verdict.py compare the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from batchq import __version__, capacity, findings, models, quantize
from batchq.config import Config, EngineKind, KvCache, ModelConfig, Scheme
from batchq.engine import Completion, EngineSpec
from batchq.errors import ConfigError, GateRefused
from batchq.fit import Fit
from batchq.job.served import Served
from batchq.job.session import Session
from batchq.models import Model
from batchq.plan import sample
from batchq.pool import SampleRequest
from batchq.records import Failure, Plan
from batchq.settings import engine_version
from batchq.task import Task
from batchq.verdict import Verdict, judge, verdict_from_json


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
        session.progress.step(f"gate: {baseline.name} doesn't fit here unquantized, so {scheme.value} goes unjudged")
        return None
    tokenizer = models.open_tokenizer(model.path, model.trusted)
    task = Task(config.task, tokenizer, draft.columns, config.model.chat_template)
    asked = sample.judging(config, draft, task)
    if warning := sample.unknown_gold_warning(config, asked.golds):
        session.progress.step(f"gate: {warning}")
    sampling = task.sampling if config.task.labels else dataclasses.replace(task.sampling, score_prompt=True)
    request = [dataclasses.asdict(sampling), asked.prompts, config.engine.max_model_len, config.engine.kind.value]
    # Another batchq may compute otherwise: with vLLM's norms instead of torch's 0.734 of the demo's rows became 0.713.
    key = models.digest_of([baseline.digest, request, engine_version(), __version__])
    terms = [settings.recovery, settings.confidence, settings.min_gold, settings.seed]
    case = models.digest_of([key, checkpoint.key, asked.golds, config.quantization.kv_cache.value, terms])
    if cached := quantize.read_verdict(checkpoint, case, config.quantization):
        return verdict_from_json(cached)

    def ask(name: str, spec: EngineSpec, keep: bool) -> list[Completion | Failure]:
        in_flight = config.engine.in_flight or 2 * spec.max_num_seqs
        request = SampleRequest(asked.prompts, sampling, in_flight, log=f"gate-{name}.log", stay_up=keep)
        return _ask(session, name, spec, request)

    before = recall_answers(key)
    if before is None:
        size = capacity.stored_bytes(capacity.read_tensors(baseline.path))
        before = ask("baseline", capacity.engine_spec(unquantized, baseline.path, size, session.hardware), keep=False)
        remember_answers(key, before)
    after = ask(scheme.value, served.engine, keep=True)  # it may go on to label
    verdict = judge(scheme.value, asked, before, after, config.task.labels, settings)
    quantize.write_verdict(checkpoint, case, dataclasses.asdict(verdict), config.quantization)
    return verdict


def find_baseline(config: Config, model: Model) -> Model | None:
    """The unquantized model that the gate compares with; None for a quantized one whose baseline isn't named."""
    if config.gate.baseline is not None:
        named = models.resolve(ModelConfig(path=config.gate.baseline))
        if named.quantized:
            raise ConfigError(f"gate.baseline={config.gate.baseline}: is quantized itself ({named.quantized})")
        return named
    return None if model.quantized else model


def _ask(session: Session, name: str, spec: EngineSpec, request: SampleRequest) -> list[Completion | Failure]:
    rows = len(request.prompts)
    session.progress.step(f"gate: asking {name} for {rows:,} rows")
    answers, spent = session.pool.answer_sample(
        spec,
        request,
        session.hardware,
        session.stop,
        lambda count: session.progress.update(f"gate: {name} has answered {count:,} of {rows:,} rows", count / rows),
        session.progress.step,
    )
    session.invocation.spent(spent)
    return answers


# ---- answers of the baseline, kept for another run ----


def remember_answers(key: str, answers: Sequence[Completion | Failure]) -> None:
    """Keep a baseline's answers; no row's text is in them."""
    stored = [
        dataclasses.asdict(dataclasses.replace(a, text="")) if isinstance(a, Completion) else dataclasses.asdict(a)
        for a in answers
    ]
    findings.keep("gate", key, stored)


def recall_answers(key: str) -> list[Completion | Failure] | None:
    """What `remember_answers` kept under this key, if anything."""
    return findings.recall("gate", key, _answers)


def _answers(stored: list[dict[str, Any]]) -> list[Completion | Failure]:
    return [
        Failure(**a)
        if "code" in a
        else Completion(**{**a, "logprobs": tuple(a["logprobs"]), "token_ids": tuple(a["token_ids"])})
        for a in stored
    ]
