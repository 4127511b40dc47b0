"""Metrics of a run while it labels, by Ray: each node's metrics port serves them where ray[default] is installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from batchq.telemetry.metrics import Metric, Sample

# A counter has to be there before it counts, or its first increase is none to Prometheus, and Ray takes no 0. Added to
# any other number this is nothing.
ZERO = 5e-324


class Exporter:
    """One per run, in the driver, which alone knows the counts of lost replicas too."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._made: dict[Metric, Any] = {}
        self._told: dict[tuple[Metric, tuple[str, ...]], float] = {}  # of counters

    def export(self, samples: Iterable[Sample]) -> None:
        """Ray takes what a counter has gained. One that fell gains nothing: of a replica that was lost, less may be
        known than before."""
        for sample in samples:
            metric = self._ray(sample.metric)
            tags = {"job_name": self._job, **sample.labels}
            if sample.metric.kind == "gauge":
                metric.set(sample.value, tags)
                continue
            key = sample.metric, tuple(sample.labels.values())
            gain = sample.value - self._told.get(key, 0.0)
            if gain > 0 or key not in self._told:
                metric.inc(max(gain, ZERO), tags)
                self._told[key] = sample.value

    def _ray(self, metric: Metric) -> Any:
        if metric not in self._made:
            from ray.util import metrics

            kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
            self._made[metric] = kind(metric.name, metric.words, ("job_name", *metric.labels))
        return self._made[metric]
