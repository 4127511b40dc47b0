"""What is made of a complete output for its readers, where that is asked for: few large objects."""

from __future__ import annotations

import threading
from collections.abc import Callable

from batchq import storage
from batchq.config import Config
from batchq.errors import Stopped
from batchq.output import compaction, objects
from batchq.records import Plan


def is_due(config: Config) -> bool:
    """Whether something is asked for that isn't done yet."""
    return config.output.compact is not None and objects.announced(storage.normalize(config.output.path)) is None


def publish(config: Config, plan: Plan, stop: threading.Event, say: Callable[[str], None]) -> None:
    """Compact a complete output, if that is asked for. Raises Stopped once `stop` is set; what is made stays."""
    if config.output.compact is None or not is_due(config):
        return

    def going_on(done: int, of: int) -> None:
        if stop.is_set():
            raise Stopped(f"stopped with {done} of {of} compacted objects made; the same command goes on")
        say(f"compacting: object {done + 1} of {of}")

    output = storage.normalize(config.output.path)
    compaction.compact(output, plan, config.output.compact, going_on)
    say(f"the rows are read from {objects.folder(output)}")
