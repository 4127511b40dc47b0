"""The group `events`: who is told what a run does."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from batchq.errors import ConfigError

WEBHOOK = "BATCHQ_WEBHOOK"  # in the environment: the URL, where it holds a secret


@dataclass
class EventsConfig:
    """Who is told that a run began, is in danger, has ended: docs/operations.md has the kinds and their data.

    webhook: an http or https URL that gets a POST of one JSON object per event; null for that of BATCHQ_WEBHOOK in the
        environment, where a URL with a secret in it belongs.
    stderr: also print each event as a line of JSON on standard error.
    """

    webhook: str | None = None
    stderr: bool = False


def check_events(events: EventsConfig) -> None:
    """Raises ConfigError for a URL that can't be posted to, or that shows a secret; the message shows no more of it
    than its scheme."""
    if events.webhook is not None:
        url = _checked("events.webhook", events.webhook)
        if "@" in url.netloc or url.query or url.fragment:
            raise ConfigError(
                f"events.webhook={url.scheme}://...: a user, a password or what follows ? and # may be a secret; "
                f"put this URL into {WEBHOOK} in the environment"
            )
    webhook_of(events)


def webhook_of(events: EventsConfig) -> str | None:
    """Where events are posted, if anywhere. Raises ConfigError for a URL of the environment that can't be."""
    if events.webhook is not None:
        return events.webhook
    if given := os.environ.get(WEBHOOK):
        _checked(WEBHOOK, given)
    return given or None


def _checked(name: str, value: str) -> SplitResult:
    """The URL's parts. Raises ConfigError that shows nothing of it."""
    try:
        url = urlsplit(value)
        good = url.scheme in ("http", "https") and url.hostname and (url.port or 1)
    except ValueError:
        good = False
    if not good or not value.isascii() or any(c <= " " for c in value):
        raise ConfigError(f"{name}: must be a URL as https://host/path, http or https")
    return url
