"""`batchq compact`: joins the objects of a finished run into few large ones."""

from __future__ import annotations

import dataclasses
import threading

from batchq.config import Config
from batchq.errors import BatchqError
from batchq.job.publish import publish
from batchq.job.run import only_driver
from batchq.job.session import open_session
from batchq.output import compaction
from batchq.report.outcome import Result, finish, load


def compact(config: Config, stop: threading.Event) -> Result:
    """Compact the run at output.path, or find it compacted; and its report. Raises BatchqError if it isn't complete."""
    size = config.output.compact or compaction.SIZE
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, compact=size))
    with open_session(config, "compact", stop) as session:
        plan, committed = load(config)
        if left := len(committed.remaining):
            raise BatchqError(f"{session.output}: {left} shards to go; only a complete run is compacted")
        with only_driver(session):
            publish(config, plan, session.stop, session.progress.step)
            return finish(config, plan, committed, [])
