"""The group `run`: when a run has to be done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RunConfig:
    """When a run has to be done.

    deadline: HH:MM ZONE is the next time that a clock there shows it, 2026-12-01T06:00+01:00 a moment, 8h or 1h30m a
        duration from the start of each invocation. cluster.grace_seconds before it nothing new is asked; what is asked
        is finished or saved, and the run ends in exit code 6. The same command goes on.
    """

    deadline: str | None = None
