"""Quantized against baseline on the job's own rows: how much of the quality is kept, how sure that is, what follows.

Recovery is the quantized model's figure over the baseline's: accuracy where rows have gold labels, else the share of
rows that keep their label, and for generated text the ratio of perplexities on the prompts. Its interval is a paired
bootstrap over rows (Efron and Tibshirani 1993, percentile method).
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchq import __version__, capacity, findings, models, quantize, sample, tune
from batchq.config import Config, EngineKind, GateConfig, KvCache, ModelConfig, Scheme
from batchq.engine.protocol import Completion
from batchq.errors import ConfigError, GateRefused
from batchq.fit import Fit
from batchq.hardware import Hardware
from batchq.ledger import Invocation
from batchq.models import Model
from batchq.pool import Pool, Question
from batchq.progress import Progress
from batchq.quantize import Checkpoint
from batchq.records import Failure, Plan
from batchq.sample import Sample
from batchq.task.task import Task

RESAMPLES = 2000
CHUNK = 100  # resamples drawn at a time: 100 x 20,000 rows of counts take 16 MB


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate found. Shares are between 0 and 1, recovery and its bounds around 1; `kl` in nats.

    `verdict` is "pass" (the lower bound reaches `wanted`), "fail" (the upper bound doesn't) or "undecided".
    `needs`: about how many rows would decide. For generated text `baseline` and `quantized` are perplexities.
    """

    scheme: str
    measure: str  # "accuracy", "agreement" or "perplexity"
    verdict: str
    wanted: float
    recovery: float
    low: float
    high: float
    confidence: float
    rows: int  # asked and answered by both
    judged: int  # of these, those that the recovery is taken from
    baseline: float
    quantized: float
    agreement: float  # of labels, or of generated tokens up to the first that differs
    kl: float | None
    flips: dict[str, int]
    macro_f1: tuple[float, float] | None
    needs: int | None
    failed: int  # rows that either model couldn't answer

    def accepts(self, strict: bool) -> bool:
        return self.verdict == "pass" or (self.verdict == "undecided" and not strict)

    def words(self) -> str:
        """One line for a person."""
        kept = f"keeps {self.recovery:.1%} [{self.low:.1%}, {self.high:.1%}] of the baseline's {self.measure}"
        if self.measure == "agreement":
            kept = f"keeps the label of {self.recovery:.1%} [{self.low:.1%}, {self.high:.1%}] of the rows"
        figures = {"accuracy": f" ({self.baseline:.3f} -> {self.quantized:.3f})"}.get(self.measure, "")
        if self.measure == "perplexity":
            figures = f" ({self.baseline:.2f} -> {self.quantized:.2f})"
        more = "" if self.measure == "agreement" else f", agreement {self.agreement:.1%}"
        more += "" if self.kl is None else f", KL {self.kl:.4f}"
        enough = f"; about {self.needs:,} would do" if self.needs else ""
        end = {
            "pass": f"passes {self.wanted:.1%}",
            "fail": f"fails {self.wanted:.1%}",
            "undecided": f"UNDECIDED at {self.wanted:.1%}, too few rows{enough}; gate=strict refuses that",
        }[self.verdict]
        return f"{self.scheme} {kept}{figures}{more} on {self.judged:,} rows: {end}"


def judged(
    config: Config,
    draft: Plan,
    model: Model,
    scheme: Scheme,
    checkpoint: Checkpoint,
    pool: Pool,
    here: Hardware,
    invocation: Invocation,
    stop: threading.Event,
    show: Progress,
) -> Verdict | None:
    """The gate's verdict on a checkpoint; None where there is nothing to judge it by."""
    full, settings = baseline_of(config, model), config.gate
    as_it_is = scheme is Scheme.none and not model.quantized and config.quantization.kv_cache is KvCache.auto
    if not settings.enabled or as_it_is or full is None:
        return None
    bare = dataclasses.replace(config.quantization, kv_cache=KvCache.auto)
    whole = dataclasses.replace(config, quantization=bare)
    if config.engine.kind is EngineKind.vllm and not Fit(full, here, whole).fits(Scheme.none):
        if settings.strict:
            raise GateRefused(f"gate.strict: {full.name} doesn't fit here unquantized, so nothing can be compared")
        show.step(f"gate: {full.name} doesn't fit here unquantized, so {scheme.value} goes unjudged")
        return None
    task = Task(
        config.task, models.open_tokenizer(model.path, model.trusted), draft.columns, config.model.chat_template
    )
    chosen = sample.judging(config, draft, task)
    if not chosen.prompts:
        raise ConfigError("gate: no row to judge by; name some in gate.input, or set gate.enabled=false")
    if warning := sample.strange(config, chosen.golds):
        show.step(f"gate: {warning}")
    sampling = dataclasses.replace(task.sampling, score_prompt=task.space.decodes)
    prompts = [prompt.token_ids for prompt in chosen.prompts]
    asked = [dataclasses.asdict(sampling), prompts, config.engine.max_model_len, config.engine.kind.value]
    # Another batchq may compute otherwise: with vLLM's norms instead of torch's 0.734 of the demo's rows became 0.713.
    key = models.digest_of([full.digest, asked, tune.engine_version(), __version__])
    terms = [settings.recovery, settings.confidence, settings.min_gold, settings.seed]
    case = models.digest_of([key, checkpoint.key, chosen.golds, config.quantization.kv_cache.value, terms])
    if known := quantize.read_verdict(checkpoint, case, config.quantization):
        return verdict_from_json(known)

    def ask(what: str, whose: Config, path: str, weights: int, keep: bool) -> list[Completion | Failure]:
        spec = capacity.engine_spec(whose, path, weights, here)
        show.step(f"gate: asking {what} for {len(chosen.prompts):,} rows")
        question = Question(chosen.prompts, sampling, config.engine.in_flight or 2 * spec.max_num_seqs)
        answers, spent = pool.ask(
            spec,
            question,
            here,
            f"gate-{what}.log",
            stop,
            lambda count: show.update(
                f"gate: {what} has answered {count:,} of {len(chosen.prompts):,} rows", count / len(chosen.prompts)
            ),
            show.step,
            keep,
        )
        invocation.spent(spent)
        return answers

    before = recall(key)
    if before is None:
        before = ask("baseline", whole, full.path, capacity.stored_bytes(capacity.read_tensors(full.path)), keep=False)
        remember(key, before)
    served, _ = tune.settled(config, draft, checkpoint.path, checkpoint.bytes, here)  # it may go on to label
    after = ask(scheme.value, served, checkpoint.path, checkpoint.bytes, keep=True)
    verdict = judge(scheme.value, chosen, before, after, task.space.labels, settings)
    quantize.write_verdict(checkpoint, case, dataclasses.asdict(verdict), config.quantization)
    return verdict


def baseline_of(config: Config, model: Model) -> Model | None:
    """The unquantized model that the gate compares with; None for a quantized one whose baseline isn't named."""
    if config.gate.baseline is not None:
        found = models.resolve(ModelConfig(path=config.gate.baseline))
        if found.quantized:
            raise ConfigError(f"gate.baseline={config.gate.baseline}: is quantized itself ({found.quantized})")
        return found
    return None if model.quantized else model


def judge(
    scheme: str,
    asked: Sample,
    baseline: Sequence[Completion | Failure],
    quantized: Sequence[Completion | Failure],
    labels: Sequence[str],
    config: GateConfig,
) -> Verdict:
    """The verdict on two models' answers to the same sample; `labels` is empty for generated text."""
    both = [i for i, (a, b) in enumerate(zip(baseline, quantized, strict=True)) if _answered(a) and _answered(b)]
    ours: list[Any] = [baseline[i] for i in both]
    theirs: list[Any] = [quantized[i] for i in both]
    if not both:
        return _verdict(scheme, "agreement", config, np.zeros(0), np.zeros(0), failed=len(asked.prompts))
    failed = len(asked.prompts) - len(both)
    if not labels:
        tokens = np.array([max(1, len(asked.prompts[i]) - 1) for i in both], dtype=float)
        losses = [np.array([-c.prompt_logprob for c in side]) for side in (ours, theirs)]
        same = float(np.mean([_common(a.token_ids, b.token_ids) for a, b in zip(ours, theirs, strict=True)]))
        return _perplexity(scheme, config, tokens, losses[0], losses[1], same, failed)
    p, q = (_distributions(answers) for answers in (ours, theirs))
    first, second = p.argmax(1), q.argmax(1)
    agreement = float((first == second).mean())
    kl = float((p * (np.log(p) - np.log(q))).sum(1).mean())
    index = {label: i for i, label in enumerate(labels)}
    gold = np.array([index.get(str(asked.golds[i]), -1) if asked.golds[i] is not None else -1 for i in both])
    known = gold >= 0
    common: dict[str, Any] = {"agreement": agreement, "kl": kl, "rows": len(both), "failed": failed}
    if known.sum() < config.min_gold:
        flips = {"changed": int((first != second).sum())}
        ones = np.ones(len(both))
        return _verdict(scheme, "agreement", config, ones, (first == second).astype(float), flips=flips, **common)
    right, still = (first == gold)[known], (second == gold)[known]
    flips = {"lost": int((right & ~still).sum()), "gained": int((~right & still).sum())}
    f1 = (_macro_f1(first[known], gold[known]), _macro_f1(second[known], gold[known]))
    return _verdict(
        scheme, "accuracy", config, right.astype(float), still.astype(float), flips=flips, macro_f1=f1, **common
    )


def _answered(answer: Completion | Failure) -> bool:
    return isinstance(answer, Completion) and not any(map(math.isnan, answer.logprobs))


def _distributions(answers: Sequence[Completion]) -> Any:
    """Shares of the labels, shape [rows, labels], none of them zero."""
    scores = np.array([a.logprobs for a in answers], dtype=float).clip(min=-1e4)
    shares = np.exp(scores - scores.max(1, keepdims=True))
    return (shares / shares.sum(1, keepdims=True)).clip(min=1e-12)


def _macro_f1(said: np.ndarray, gold: np.ndarray) -> float:
    """Mean F1 over the labels that occur in gold."""
    scores = []
    for label in np.unique(gold):
        hits = int(((said == label) & (gold == label)).sum())
        scores.append(2 * hits / max(1, int((said == label).sum() + (gold == label).sum())))
    return float(np.mean(scores))


def _common(a: Sequence[int], b: Sequence[int]) -> float:
    """The share of the longer text that both begin with."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return same / max(1, len(a), len(b))


def _perplexity(
    scheme: str,
    config: GateConfig,
    tokens: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    agreement: float,
    failed: int,
) -> Verdict:
    def recovery(weights: np.ndarray) -> Any:
        per_token = ((weights @ first) - (weights @ second)) / (weights @ tokens)
        return np.exp(per_token)

    base, quant = (float(np.exp(loss.sum() / tokens.sum())) for loss in (first, second))
    return _conclude(scheme, "perplexity", config, recovery, len(tokens), base, quant, len(tokens), agreement, failed)


def _verdict(
    scheme: str,
    measure: str,
    config: GateConfig,
    base: np.ndarray,
    kept: np.ndarray,
    *,
    agreement: float = 0.0,
    kl: float | None = None,
    rows: int = 0,
    failed: int = 0,
    flips: dict[str, int] | None = None,
    macro_f1: tuple[float, float] | None = None,
) -> Verdict:
    """From 0 and 1 by row, for baseline and quantized."""

    def recovery(weights: np.ndarray) -> Any:
        return (weights @ kept) / np.maximum(weights @ base, 1e-9)

    first, second = (float(x.mean()) if len(x) else 0.0 for x in (base, kept))
    found = _conclude(scheme, measure, config, recovery, len(base), first, second, rows, agreement, failed)
    return dataclasses.replace(found, kl=kl, flips=flips or {}, macro_f1=macro_f1)


def _conclude(
    scheme: str,
    measure: str,
    config: GateConfig,
    recovery: Any,
    judged: int,
    base: float,
    quant: float,
    rows: int,
    agreement: float,
    failed: int,
) -> Verdict:
    """`recovery` maps weights, shape [resamples, rows], to a recovery a resample."""
    if judged == 0 or base <= 0:  # nothing to compare with: nothing is known
        point, low, high = 0.0, 0.0, math.inf
    else:
        random = np.random.default_rng(config.seed)
        point = float(recovery(np.ones((1, judged)))[0])
        even = np.full(judged, 1 / judged)
        drawn = [recovery(random.multinomial(judged, even, CHUNK).astype(float)) for _ in range(RESAMPLES // CHUNK)]
        tail = (1 - config.confidence) / 2
        low, high = (float(x) for x in np.quantile(np.concatenate(drawn), [tail, 1 - tail]))
    wanted = config.recovery
    verdict = "pass" if low >= wanted else "fail" if high < wanted else "undecided"
    needs = None
    if verdict == "undecided" and judged and point != wanted and math.isfinite(high):
        half = point - low if point > wanted else high - point
        needs = math.ceil(judged * (half / (point - wanted)) ** 2)  # an interval shrinks with the root of the rows
    return Verdict(
        scheme=scheme,
        measure=measure,
        verdict=verdict,
        wanted=wanted,
        recovery=point,
        low=low,
        high=high,
        confidence=config.confidence,
        rows=rows,
        judged=judged,
        baseline=base,
        quantized=quant,
        agreement=agreement,
        kl=None,
        flips={},
        macro_f1=None,
        needs=needs,
        failed=failed,
    )


# ---- what was asked before ----


def remember(key: str, answers: Sequence[Completion | Failure]) -> None:
    """Keep a baseline's answers; no row's text is in them."""
    kept = [
        dataclasses.asdict(dataclasses.replace(a, text="")) if isinstance(a, Completion) else dataclasses.asdict(a)
        for a in answers
    ]
    findings.keep("gate", key, kept)


def recall(key: str) -> list[Completion | Failure] | None:
    """What `remember` kept under this key, if anything."""
    return findings.recall("gate", key, _answers)


def _answers(kept: list[dict[str, Any]]) -> list[Completion | Failure]:
    return [
        Failure(**a)
        if "code" in a
        else Completion(**{**a, "logprobs": tuple(a["logprobs"]), "token_ids": tuple(a["token_ids"])})
        for a in kept
    ]


def verdict_from_json(found: dict[str, Any]) -> Verdict:
    f1 = found["macro_f1"]
    return Verdict(**{**found, "macro_f1": tuple(f1) if f1 else None})
