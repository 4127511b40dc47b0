"""What is measured of a run, for Prometheus: names, kinds, labels; and the text format of values.

Every metric has the label job_name; no label holds a row's text, an id or a path. docs/metrics.md has this table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Metric:
    """`kind` is Prometheus' own word; `labels` are those beside job_name."""

    name: str
    kind: str
    words: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """A value now; a counter's since the run began."""

    metric: Metric
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


def _counter(name: str, words: str, *labels: str) -> Metric:
    return Metric(name, "counter", words, labels)


def _gauge(name: str, words: str, *labels: str) -> Metric:
    return Metric(name, "gauge", words, labels)


# ---- while a run labels, of this invocation; by Ray, so each name begins with ray_ where it is scraped ----

ROWS = _counter("batchq_rows_total", "Rows that are over, committed or not: answers and failures.", "outcome")
FAILURES = _counter("batchq_failures_total", "Rows that became failures, by the failure's code.", "code")
TRUNCATED = _counter("batchq_truncated_answers_total", "Answers that were cut off.")
TOKENS = _counter(
    "batchq_tokens_total",
    "Tokens by kind: prompt tokens that were computed, prompt tokens that the prefix cache held, output tokens.",
    "kind",
)
REPLICA_SECONDS = _counter("batchq_replica_seconds_total", "Seconds of all replicas, by phase.", "phase")
COST = _counter("batchq_cost_total", "What was held so far costs, in the currency of the label.", "currency")
LOST = _counter("batchq_lost_replicas_total", "Replicas that were lost: their process, engine or node.")
IN_FLIGHT = _gauge("batchq_rows_in_flight", "Rows that engines have at the moment.")
REPLICAS = _gauge("batchq_replicas", "Replicas at the moment, by phase.", "phase")
SHARDS = _gauge("batchq_shards", "Shards of the run, those of earlier invocations included.")
COMMITTED = _gauge("batchq_committed_shards", "Shards that are committed, those of earlier invocations included.")
PROGRESS = _gauge("batchq_progress_ratio", "Share of the corpus that is labelled, 0 to 1.")
ETA = _gauge("batchq_eta_seconds", "Seconds until all is labelled, at the speed so far.")
SLACK = _gauge(
    "batchq_deadline_slack_seconds",
    "Seconds between the end of labelling, at the speed so far, and of intake for run.deadline; negative: too late.",
)
BUDGET = _gauge("batchq_budget_spent_ratio", "Share of pricing.budget that is spent, earlier invocations included.")

LIVE = (
    *(ROWS, FAILURES, TRUNCATED, TOKENS, REPLICA_SECONDS, COST, LOST),
    *(IN_FLIGHT, REPLICAS, SHARDS, COMMITTED, PROGRESS, ETA, SLACK, BUDGET),
)

# ---- at its end, of the last run of the job; by node exporter or a Pushgateway ----

LAST_SUCCESS = _gauge("batchq_last_success_timestamp_seconds", "When the job's last run with exit code 0 ended.")
LAST_END = _gauge("batchq_last_end_timestamp_seconds", "When the job's last run ended, however it ended.")
EXIT_CODE = _gauge("batchq_last_exit_code", "What the job's last run ended in.")
DURATION = _gauge("batchq_last_duration_seconds", "How long the job's last run took.")
LAST_ROWS = _gauge("batchq_last_rows", "Rows that the job's last run answered, or that failed.")
LAST_FAILURES = _gauge("batchq_last_failures", "Rows that failed in the job's last run.")
LAST_TOKENS = _gauge("batchq_last_tokens", "Tokens of the job's last run, by kind as in batchq_tokens_total.", "kind")
LAST_LOST = _gauge("batchq_last_lost_replicas", "Replicas that the job's last run lost.")
LAST_COST = _gauge("batchq_last_cost", "What the job's last run cost, in the currency of the label.", "currency")
RECOVERY = _gauge(
    "batchq_last_gate_recovery_ratio",
    "Share of the baseline's quality that the quantized model reached when the gate last judged one.",
    "scheme",
)

LAST = (
    *(LAST_SUCCESS, LAST_END, EXIT_CODE, DURATION),
    *(LAST_ROWS, LAST_FAILURES, LAST_TOKENS, LAST_LOST, LAST_COST, RECOVERY),
)


def tokens_by_kind(metric: Metric, prompt_and_output: int, cached: int, output: int) -> list[Sample]:
    """The three kinds add up to all tokens."""
    kinds = {"prompt_computed": prompt_and_output - output - cached, "prompt_cached": cached, "output": output}
    return [Sample(metric, count, {"kind": kind}) for kind, count in kinds.items()]


# ---- Prometheus' text format ----


def exposition(samples: Iterable[Sample], job: str) -> str:
    """The samples, those of one metric after one another, as Prometheus reads them."""
    lines = []
    for metric, same in groupby(samples, key=lambda sample: sample.metric):
        lines += [f"# HELP {metric.name} {metric.words}", f"# TYPE {metric.name} {metric.kind}"]
        for sample in same:
            labels = {"job_name": job, **sample.labels}
            told = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
            lines.append(f"{metric.name}{{{told}}} {float(sample.value)!r}")
    return "".join(f"{line}\n" for line in lines)


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
