"""The group `metrics`: who is told how a run went, once it has ended."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from batchq.config.fields import PORT
from batchq.errors import ConfigError

PUSHGATEWAY = "BATCHQ_PUSHGATEWAY"  # in the environment: the URL, where it holds a password


@dataclass
class MetricsConfig:
    """What outlives a run, for Prometheus: docs/metrics.md. What it counts while it runs is Ray's to export.

    textfile: the folder of node exporter's textfile collector, on the driver's machine; null for none.
    pushgateway: the http or https URL of a Pushgateway; null for that of BATCHQ_PUSHGATEWAY in the environment, where a
        URL with a password in it belongs.
    port: where a Ray that batchq starts itself serves its metrics, on loopback; null for a port that Ray chooses. On
        a cluster its nodes have theirs.
    """

    textfile: str | None = None
    pushgateway: str | None = None
    port: int | None = field(default=None, metadata=PORT)


def check_metrics(metrics: MetricsConfig) -> None:
    """Raises ConfigError for a folder, or URL that can't be. The message shows no secret."""
    if metrics.textfile is not None and not os.path.isdir(metrics.textfile):
        raise ConfigError(f"metrics.textfile={metrics.textfile}: no such folder; it is node exporter's to make")
    if metrics.pushgateway is not None and "@" in _checked("metrics.pushgateway", metrics.pushgateway):
        raise ConfigError(
            f"metrics.pushgateway: it holds a user or a password; put this URL into {PUSHGATEWAY} in the environment"
        )
    pushgateway_of(metrics)


def pushgateway_of(metrics: MetricsConfig) -> str | None:
    """Where metrics are pushed, if anywhere. Raises ConfigError for a URL of the environment that can't be."""
    if metrics.pushgateway is not None:
        return metrics.pushgateway
    if given := os.environ.get(PUSHGATEWAY):
        _checked(PUSHGATEWAY, given)
    return given or None


def _checked(name: str, value: str) -> str:
    """The URL's host, user and port. Raises ConfigError that shows nothing of it."""
    try:
        url = urlsplit(value)
        good = url.scheme in ("http", "https") and url.hostname and (url.port or 1) and not (url.query or url.fragment)
    except ValueError:
        good = False
    if not good or not value.isascii() or any(c <= " " for c in value):
        raise ConfigError(f"{name}: must be a URL as http://host:9091, http or https")
    return url.netloc
