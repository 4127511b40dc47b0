"""What is made of a complete output for its readers, where that is asked for: few large objects, a table."""

from __future__ import annotations

import threading
from collections.abc import Callable

from batchq import storage
from batchq.config import Config, TableFormat
from batchq.errors import Stopped
from batchq.output import compaction, delta, objects
from batchq.output.schema import schema_from_text
from batchq.records import Plan


def is_due(config: Config, plan: Plan) -> bool:
    """Whether something is asked for that isn't done yet."""
    output = storage.normalize(config.output.path)
    if config.output.compact is not None and objects.announced(output) is None and objects.parts(output):
        return True
    return config.output.table is TableFormat.delta and delta.is_due(output, plan)


def publish(config: Config, plan: Plan, stop: threading.Event, say: Callable[[str], None]) -> None:
    """Compact a complete output, then register it as a table, as far as that is asked for and not done.

    Raises Stopped once `stop` is set; what is made stays, and the same command goes on.
    """
    if not is_due(config, plan):
        return

    def going_on(done: int, of: int) -> None:
        if stop.is_set():
            raise Stopped(f"stopped with {done} of {of} compacted objects made; the same command goes on")
        say(f"compacting: object {done + 1} of {of}")

    output = storage.normalize(config.output.path)
    if config.output.compact is not None:
        compaction.compact(output, plan, config.output.compact, going_on)
        say(f"the rows are read from {objects.folder(output)}")
    if config.output.table is TableFormat.delta:
        version = delta.register(output, plan, schema_from_text(plan.schema))
        say(f"Delta table {output}, version {version}")
