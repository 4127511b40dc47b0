"""What a run tells of itself while it works: events. `Events.emit` is the one place where they begin; whoever wants to
hear them is a listener.

    webhook.py    each as a POST
    standard error, as a line of JSON, where `events.stderr` asks for it
    the log       where it is JSON: the same object in the record's `event`
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from batchq.account.webhook import Webhook
from batchq.config import EventsConfig, webhook_of
from batchq.machine.progress import Progress

logger = logging.getLogger("batchq.events")


class Kind(StrEnum):
    """docs/operations.md has what stands in the data of each."""

    planned = "planned"
    gated = "gated"
    started = "started"
    progress = "progress"
    budget = "budget"
    deadline_at_risk = "deadline_at_risk"
    engine_lost = "engine_lost"
    stopped = "stopped"
    completed = "completed"
    failed = "failed"


@dataclass(frozen=True, slots=True)
class Event:
    """`run` is the invocation's id, `output` its URI, `time` UTC in ISO 8601. No row's text is in it, and no secret."""

    kind: Kind
    time: str
    run: str
    job: str
    output: str
    data: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)


class Events:
    """Those of one invocation. A listener returns at once and raises nothing: it is called by who does the work."""

    def __init__(self, config: EventsConfig | None, run: str, job: str, output: str, progress: Progress) -> None:
        """Without `config` nobody but the log is told."""
        self.listeners: list[Callable[[Event], None]] = [_log]
        self._about = (run, job, output)
        self._webhook: Webhook | None = None
        if config and config.stderr:
            self.listeners.append(lambda event: progress.line(event.to_json()))
        if config and (url := webhook_of(config)):
            self._webhook = Webhook(url, progress.warn)
            self.listeners.append(self._post)

    def emit(self, kind: Kind, **data: Any) -> None:
        """Tell all listeners. `data` holds what JSON can: counts, seconds, names, messages for a person."""
        event = Event(kind, datetime.now(UTC).isoformat(timespec="milliseconds"), *self._about, data)
        for listener in self.listeners:
            listener(event)

    def close(self) -> None:
        """Give what isn't delivered yet a few seconds, and warn of what wasn't."""
        if self._webhook is not None:
            self._webhook.close()

    def _post(self, event: Event) -> None:
        assert self._webhook is not None
        self._webhook.post(event.to_json().encode(), passing=event.kind is Kind.progress)


def _log(event: Event) -> None:
    """At level info: what is a warning or an error has a line of its own already."""
    logger.info("%s", event.kind.value, extra={"event": asdict(event), "exit_code": event.data.get("exit_code")})
