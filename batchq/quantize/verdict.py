"""Two models' answers to the same rows -> how much of the quality is left, how sure that is, and what follows. Pure.

Recovery is the quantized model's figure over the baseline's: accuracy where rows have gold labels, else
agreement with the baseline's labels, and for generated text the ratio of perplexities on the prompts. Its interval is
a paired bootstrap over rows (Efron and Tibshirani 1993, percentile method).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batchq.config import GateConfig
from batchq.engine.protocol import Completion
from batchq.plan.sample import Sample
from batchq.records import Failure, restored

RESAMPLES = 2000
CHUNK = 100  # resamples drawn at a time: 100 x 20,000 rows of counts take 16 MB


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate measured and concluded. Shares are between 0 and 1, recovery and its bounds around 1; `kl` in nats.

    `verdict` is "pass" (the lower bound reaches `wanted`), "fail" (the upper bound doesn't) or "undecided".
    `high` is None where nothing could be compared: no row was answered by both, or the baseline was never right.
    `needs`: about how many rows would decide. For generated text `baseline` and `quantized` are perplexities.
    """

    scheme: str
    measure: str  # "accuracy", "agreement" or "perplexity"
    verdict: str
    wanted: float
    recovery: float
    low: float
    high: float | None
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
        bounds = f"[{self.low:.1%}, {'?' if self.high is None else f'{self.high:.1%}'}]"
        claim = f"keeps {self.recovery:.1%} {bounds} of the baseline's {self.measure}"
        if self.measure == "agreement":
            claim = f"agrees with the baseline on {self.recovery:.1%} {bounds} of the rows"
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
        return f"{self.scheme} {claim}{figures}{more} on {self.judged:,} rows: {end}"


@dataclass(frozen=True, slots=True)
class Figures:
    """What two models came to on the same rows, before anything is concluded; fields as in Verdict."""

    measure: str
    rows: int
    judged: int
    failed: int
    baseline: float = 0.0
    quantized: float = 0.0
    agreement: float = 0.0
    kl: float | None = None
    flips: dict[str, int] = field(default_factory=dict)
    macro_f1: tuple[float, float] | None = None


# Weights of the judged rows, shape [resamples, rows] -> recovery per resample.
Recovery = Callable[[np.ndarray], np.ndarray]


def judge(
    scheme: str,
    asked: Sample,
    baseline: Sequence[Completion | Failure],
    quantized: Sequence[Completion | Failure],
    labels: Sequence[str],
    config: GateConfig,
) -> Verdict:
    """The verdict on two models' answers to the same sample; `labels` is empty for generated text."""
    both = [i for i, pair in enumerate(zip(baseline, quantized, strict=True)) if all(map(_answered, pair))]
    pairs: list[tuple[Any, Any]] = [(baseline[i], quantized[i]) for i in both]
    failed = len(asked.prompts) - len(both)
    if not both:
        return _conclude(scheme, Figures("agreement", 0, 0, failed), _ratio(np.zeros(0), np.zeros(0)), config)
    if not labels:
        lengths = [len(asked.prompts[i]) for i in both]
        return _conclude(scheme, *_of_text(pairs, lengths, failed), config)
    index = {label: i for i, label in enumerate(labels)}
    gold = np.array([index.get(str(asked.golds[i]), -1) if asked.golds[i] is not None else -1 for i in both])
    return _conclude(scheme, *_of_labels(pairs, gold, failed, config.min_gold), config)


def _of_labels(
    pairs: Sequence[tuple[Completion, Completion]], gold: np.ndarray, failed: int, min_gold: int
) -> tuple[Figures, Recovery]:
    """By accuracy where enough rows have gold, else by agreement. `gold`: a label's index per row, -1 for none."""
    p, q = (_distributions(answers) for answers in zip(*pairs, strict=True))
    first, second = p.argmax(1), q.argmax(1)
    same = first == second
    kl = float((p * (np.log(p) - np.log(q))).sum(1).mean())
    known = gold >= 0
    figures = Figures("agreement", len(pairs), len(pairs), failed, agreement=float(same.mean()), kl=kl)
    if known.sum() < min_gold:
        figures = dataclasses.replace(
            figures, baseline=1.0, quantized=float(same.mean()), flips={"changed": int((~same).sum())}
        )
        return figures, _ratio(np.ones(len(pairs)), same.astype(float))
    right, still = (first == gold)[known], (second == gold)[known]
    figures = dataclasses.replace(
        figures,
        measure="accuracy",
        judged=int(known.sum()),
        baseline=float(right.mean()),
        quantized=float(still.mean()),
        flips={"lost": int((right & ~still).sum()), "gained": int((~right & still).sum())},
        macro_f1=(_macro_f1(first[known], gold[known]), _macro_f1(second[known], gold[known])),
    )
    return figures, _ratio(right.astype(float), still.astype(float))


def _of_text(
    pairs: Sequence[tuple[Completion, Completion]], lengths: Sequence[int], failed: int
) -> tuple[Figures, Recovery]:
    """By perplexity on the prompts, whose lengths in tokens these are."""
    tokens = np.array([max(1, length - 1) for length in lengths], dtype=float)
    first, second = (
        np.array([-(c.prompt_logprob or 0.0) for c in completions]) for completions in zip(*pairs, strict=True)
    )
    figures = Figures(
        "perplexity",
        len(pairs),
        len(pairs),
        failed,
        baseline=float(np.exp(first.sum() / tokens.sum())),
        quantized=float(np.exp(second.sum() / tokens.sum())),
        agreement=float(np.mean([_common(a.token_ids, b.token_ids) for a, b in pairs])),
    )

    def recovery(weights: np.ndarray) -> np.ndarray:
        per_token = ((weights @ first) - (weights @ second)) / (weights @ tokens)
        return np.asarray(np.exp(per_token))

    return figures, recovery


def _ratio(base: np.ndarray, quantized: np.ndarray) -> Recovery:
    """From 0 and 1 per row, for baseline and quantized."""
    return lambda weights: np.asarray((weights @ quantized) / np.maximum(weights @ base, 1e-9))


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


def _conclude(scheme: str, figures: Figures, recovery: Recovery, config: GateConfig) -> Verdict:
    high: float | None
    judged = figures.judged
    if judged == 0 or figures.baseline <= 0:  # nothing to compare with: nothing is known
        point, low, high = 0.0, 0.0, None
    else:
        random = np.random.default_rng(config.seed)
        point = float(recovery(np.ones((1, judged)))[0])
        even = np.full(judged, 1 / judged)
        resampled = [recovery(random.multinomial(judged, even, CHUNK).astype(float)) for _ in range(RESAMPLES // CHUNK)]
        tail = (1 - config.confidence) / 2
        low, high = (float(x) for x in np.quantile(np.concatenate(resampled), [tail, 1 - tail]))
    wanted = config.recovery
    verdict = "pass" if low >= wanted else "fail" if high is not None and high < wanted else "undecided"
    needs = None
    if verdict == "undecided" and point != wanted and high is not None:
        half = point - low if point > wanted else high - point
        needs = math.ceil(judged * (half / (point - wanted)) ** 2)  # an interval shrinks with the root of the rows
    values: dict[str, Any] = {f.name: getattr(figures, f.name) for f in dataclasses.fields(figures)}
    values |= {"recovery": point, "low": low, "high": high, "confidence": config.confidence}
    return Verdict(scheme=scheme, verdict=verdict, wanted=wanted, needs=needs, **values)


def verdict_from_json(data: dict[str, Any]) -> Verdict:
    """Raises ValueError if it isn't one."""
    high = data.get("high")
    known = high is not None and math.isfinite(high)  # version 0.1.0 wrote Infinity
    return restored({**data, "high": high if known else None}, Verdict)
