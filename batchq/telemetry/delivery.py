"""The last values of a run, where they outlive it: node exporter's textfile collector and a Pushgateway."""

from __future__ import annotations

import base64
import http.client
import os
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from batchq.config import MetricsConfig, pushgateway_of
from batchq.telemetry.metrics import Sample, exposition

TIMEOUT_SECONDS = 5.0  # of a Pushgateway


def deliver(config: MetricsConfig, job: str, samples: Sequence[Sample], warn: Callable[[str], None]) -> None:
    """Write and push them, to where the configuration says. `warn` is told of what couldn't be delivered.

    Of a metric that isn't among the samples, the job's earlier value stays: a run that failed says nothing of the last
    success.
    """
    if config.textfile is not None:
        try:
            write(Path(config.textfile), job, samples)
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it isn't text"
            warn(f"metrics.textfile={config.textfile}: not written: {why}")
    if url := pushgateway_of(config):
        try:
            push(url, job, samples)
        except urllib.error.HTTPError as error:
            warn(f"metrics.pushgateway: {urlsplit(url).hostname} refused them: HTTP {error.code}")
            error.close()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            why = getattr(reason, "strerror", None) or type(reason).__name__
            warn(f"metrics.pushgateway: {urlsplit(url).hostname} didn't take them: {why}")


def file_name(job: str) -> str:
    """The job's own file among those of other jobs."""
    safe = re.sub(r"[^\w.-]+", "_", job)[:80]
    return f"batchq_{safe}.prom" if safe == job else f"batchq_{safe}_{sha256(job.encode()).hexdigest()[:8]}.prom"


def write(folder: Path, job: str, samples: Sequence[Sample]) -> None:
    """Replace the job's file at once, so that the collector never reads half of it. Raises OSError."""
    path = folder / file_name(job)
    told = {sample.metric.name for sample in samples}
    text = exposition(samples, job)
    if path.exists():
        families = re.split(r"^(?=# HELP )", path.read_text(), flags=re.M)
        text += "".join(f for f in families if (name := _name(f)) and name not in told)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.", suffix=".tmp")  # not *.prom
    try:
        with open(descriptor, "w") as file:
            file.write(text)
            os.fchmod(descriptor, 0o644)  # the collector is another user
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def _name(family: str) -> str | None:
    found = re.match(r"# HELP (batchq_\w+) ", family)
    return found[1] if found else None


def push(url: str, job: str, samples: Sequence[Sample]) -> None:
    """Add the samples to the job's group of metrics; those of the same name are replaced. Raises OSError."""
    parts = urlsplit(url)
    # A name may hold a slash, and a proxy may undo quote(); base64 goes through.
    group = base64.urlsafe_b64encode(job.encode()).decode()
    host = parts.netloc.rpartition("@")[2]
    where = f"{parts.scheme}://{host}{parts.path.rstrip('/')}/metrics/job/batchq/job_name@base64/{quote(group)}"
    request = urllib.request.Request(where, exposition(samples, job).encode(), method="POST")
    request.add_header("Content-Type", "text/plain; version=0.0.4")
    if parts.username is not None:
        known = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_header("Authorization", "Basic " + base64.b64encode(known.encode()).decode())
    urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()
