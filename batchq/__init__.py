"""batchq: label millions of documents with a language model, offline, and lose none.

    import batchq
    result = batchq.run(batchq.compose(["job=sentiment_transcripts"]))

Nothing heavy is imported until it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchq.config import Config

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

    from batchq.report.outcome import Result


__version__ = "0.1.0"
__all__ = ["Config", "compose", "run"]


def compose(overrides: Sequence[str]) -> Config:
    """The checked configuration that these Hydra overrides make, as `python -m batchq` would.

    Raises ConfigError naming the field, group or choice.
    """
    from batchq.config.compose import compose

    return compose(overrides)


def run(config: Config, stop: threading.Event | None = None) -> Result:
    """Do the job, or what is left of it. Set `stop` to end early; every answer is saved.

    Raises BatchqError (see errors.py) with one line for a person; nothing committed is lost by it.
    """
    from batchq.job.run import run

    return run(config, stop)
