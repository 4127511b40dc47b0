"""One invocation at work: what every step of a job needs and none of them changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from batchq import storage
from batchq.account.events import Events, Kind
from batchq.account.ledger import Invocation
from batchq.config import Config, check
from batchq.errors import BatchqError, GateRefused, Stopped, StorageError, exit_code_of, words_of
from batchq.job.metrics import LastMetrics
from batchq.machine import log
from batchq.machine.cache import log_dir
from batchq.machine.hardware import Hardware
from batchq.machine.progress import Progress
from batchq.pool import Pool
from batchq.telemetry.lineage import open_lineage
from batchq.telemetry.traces import Traces, open_traces


@dataclass(frozen=True, slots=True)
class Session:
    """`output` is output.path, normalized; `stop` asks for an early end; every answer is saved."""

    config: Config
    output: str
    pool: Pool
    invocation: Invocation
    stop: threading.Event
    progress: Progress
    events: Events
    traces: Traces

    @property
    def hardware(self) -> Hardware:
        """The hardware that will run the engines: this machine's, or the cluster's, after connecting to it."""
        return self.pool.hardware(self.stop, self.progress.update)


@contextmanager
def open_session(config: Config, verb: str, stop: threading.Event | None = None) -> Iterator[Session]:
    """A session for one command. However it ends, what it held of devices is on record afterwards, and a run that
    didn't complete has told so; only runs have events.

    Raises ConfigError for a configuration that can't be.
    """
    check(config)
    output = storage.normalize(config.output.path)
    invocation = Invocation(output, config.job.name, verb)
    invocation.pricing = config.pricing
    log_setting = log.setting(config.log, invocation.id)
    logs = log_dir(config.job.name, invocation.id)
    with (
        log.configured(log_setting) as progress,
        Pool(config.cluster, config.engine, logs, log_setting, config.metrics.port) as pool,
    ):
        events = Events(config.events if verb == "run" else None, invocation.id, config.job.name, output, progress)
        lineage, traces = None, Traces()
        if verb == "run":
            lineage, traces = open_lineage(config, output, progress.warn), open_traces(progress.warn)
            events.listeners += [LastMetrics(config, invocation, progress), *([lineage] if lineage else [])]
        invocation.logs = logs
        try:
            with traces.run(job_name=config.job.name, run=invocation.id, output=output):
                yield Session(config, output, pool, invocation, stop or threading.Event(), progress, events, traces)
        except BaseException as error:
            progress.clear()
            try:
                invocation.fail(state_after(error), error)
            except StorageError as unwritten:  # the store may be what ended it; those who listen are told all the same
                progress.warn(f"how this run ended isn't on record: {unwritten}")
            if isinstance(error, BatchqError):
                error.run = invocation.id
            if verb == "run":
                kind = Kind.stopped if isinstance(error, (Stopped, KeyboardInterrupt)) else Kind.failed
                events.emit(kind, exit_code=int(exit_code_of(error)), reason=words_of(error))
            raise
        else:
            progress.clear()
            invocation.end("complete")
        finally:
            invocation.close()
            events.close()
            if lineage:
                lineage.close()


def state_after(error: BaseException) -> str:
    """What the record of an invocation that this error ends says of it."""
    if isinstance(error, Stopped):
        return "stopped"
    return "refused" if isinstance(error, GateRefused) else "failed"
