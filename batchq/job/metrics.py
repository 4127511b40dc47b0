"""A run's values for the metrics in telemetry/metrics.py: while it labels, and at its end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from batchq.account.cost import cost_of
from batchq.account.events import Event, Kind
from batchq.account.ledger import Invocation
from batchq.account.usage import PHASES, Counters
from batchq.config import Config, PricingConfig
from batchq.errors import ExitCode
from batchq.machine.progress import Progress
from batchq.pool import PoolSnapshot
from batchq.telemetry import metrics
from batchq.telemetry.delivery import deliver
from batchq.telemetry.metrics import Metric, Sample


def of_pool(state: PoolSnapshot, pricing: PricingConfig) -> list[Sample]:
    """What replicas have done so far in this invocation."""
    counts = state.counters
    seconds: Counter[str] = Counter()
    for account in state.accounts:
        seconds.update(account.phases)
    phases = Counter(state.phases)
    cost = cost_of(state.accounts, pricing)
    return [
        Sample(metrics.ROWS, counts.rows - counts.failures, {"outcome": "answer"}),
        Sample(metrics.ROWS, counts.failures, {"outcome": "failure"}),
        *(Sample(metrics.FAILURES, count, {"code": code}) for code, count in counts.failures_by_code.items()),
        Sample(metrics.TRUNCATED, counts.truncated),
        *metrics.tokens_by_kind(metrics.TOKENS, counts.tokens, counts.cached_tokens, counts.output_tokens),
        *(Sample(metrics.REPLICA_SECONDS, value, {"phase": phase}) for phase, value in seconds.items()),
        *([Sample(metrics.COST, cost, {"currency": pricing.currency})] if cost is not None else []),
        Sample(metrics.LOST, len(state.losses)),
        Sample(metrics.IN_FLIGHT, state.in_flight),
        *(Sample(metrics.REPLICAS, phases[phase], {"phase": phase}) for phase in PHASES),
    ]


def known(values: Mapping[Metric, float | None]) -> list[Sample]:
    """Of metrics without labels, those that have a value at the moment."""
    return [Sample(metric, value) for metric, value in values.items() if value is not None]


class LastMetrics:
    """Delivers what outlives a run once it has ended, however it ended. A listener of its events."""

    def __init__(self, config: Config, invocation: Invocation, progress: Progress) -> None:
        self._config, self._invocation, self._progress = config, invocation, progress
        self._recovery: dict[str, float] = {}  # by scheme

    def __call__(self, event: Event) -> None:
        if event.kind is Kind.gated and event.data["recovery"] is not None:
            self._recovery[event.data["scheme"]] = event.data["recovery"]
        if event.kind in (Kind.stopped, Kind.completed, Kind.failed):
            samples = self._samples(event.data["exit_code"])
            deliver(self._config.metrics, self._config.job.name, samples, self._progress.warn)

    def _samples(self, exit_code: int) -> list[Sample]:
        pricing = self._config.pricing
        account = self._invocation.account("ended")
        counts = sum((replica.counters for replica in account.replicas), Counters())
        cost = cost_of(account.replicas, pricing)
        now = time.time()
        return [
            *([Sample(metrics.LAST_SUCCESS, now)] if exit_code == ExitCode.COMPLETE else []),
            Sample(metrics.LAST_END, now),
            Sample(metrics.EXIT_CODE, exit_code),
            Sample(metrics.DURATION, account.wall_seconds),
            Sample(metrics.LAST_ROWS, counts.rows),
            Sample(metrics.LAST_FAILURES, counts.failures),
            *metrics.tokens_by_kind(metrics.LAST_TOKENS, counts.tokens, counts.cached_tokens, counts.output_tokens),
            Sample(metrics.LAST_LOST, account.lost_replicas),
            *([Sample(metrics.LAST_COST, cost, {"currency": pricing.currency})] if cost is not None else []),
            *(Sample(metrics.RECOVERY, value, {"scheme": scheme}) for scheme, value in self._recovery.items()),
        ]
