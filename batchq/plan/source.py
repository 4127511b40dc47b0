"""The finished run whose answers a new one takes over: the one that output.reuse names, or with output.incremental the
last one beside the new output."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from batchq import storage
from batchq.config import Config
from batchq.errors import ConfigError, NotFound, StorageError
from batchq.output import layout
from batchq.plan.committed import Committed, read_committed
from batchq.plan.stored import load_plan
from batchq.records import Plan

AT_ONCE = 16  # outputs whose age is asked for
_DATE = re.compile(r"(?<!\d)(\d{4})-?(\d\d)-?(\d\d)(?!\d)")


@dataclass(frozen=True, slots=True)
class Source:
    """A finished run, its normalized output, and how many answers it has."""

    output: str
    plan: Plan
    answers: int


def named_source(config: Config) -> Source | None:
    """The run that output.reuse names, None if it names none.

    Raises ConfigError unless it is another output than this run's, and complete.
    """
    if not config.output.reuse:
        return None
    reuse = storage.normalize(config.output.reuse)
    if reuse == storage.normalize(config.output.path):
        raise ConfigError(f"output.reuse={reuse}: is output.path itself; what is reused goes to a new output.path")
    plan = load_plan(reuse)
    if plan is None:
        raise ConfigError(
            f"output.reuse={reuse}: no run has been planned there; name the output.path of a finished one"
        )
    committed = read_committed(plan, reuse)
    if left := len(committed.remaining):
        raise ConfigError(
            f"output.reuse={reuse}: {left} of its {len(plan.shards)} shards are to go; finish that run first"
        )
    return _source(reuse, plan, committed)


def last_source(config: Config, warn: Callable[[str], None]) -> Source | None:
    """The last finished run of this job beside output.path; None if there is none. `warn` is told of those that say
    that they are finished and can't be read.

    Where a folder of output.path has a date in its name, the last is that of the nearest date before it; without any,
    of the nearest after it. Otherwise it is the one that was planned last, by the store's own clock.
    """
    for output in _others(config):
        try:
            if not storage.exists(layout.manifest(output)):
                continue
            plan = load_plan(output)
            if plan is None or plan.job != config.job.name:
                continue
            committed = read_committed(plan, output)
            if not committed.remaining:
                return _source(output, plan, committed)
            warn(f"{output}: was complete, and {len(committed.remaining)} of its shards are gone; it is passed over")
        except StorageError as error:
            warn(f"{error}; that output is passed over, no answer is taken from it")
    return None


def with_reuse(config: Config, output: str) -> Config:
    """The configuration with another output.reuse; empty for none."""
    return dataclasses.replace(config, output=dataclasses.replace(config.output, reuse=output or None))


def where(config: Config) -> str:
    """The folder below which output.incremental looks for outputs."""
    return _place(config)[0]


def _source(output: str, plan: Plan, committed: Committed) -> Source:
    return Source(output, plan, sum(receipt.usage.answers for receipt in committed.receipts))


def _place(config: Config) -> tuple[str, str, str]:
    """What of output.path is above the folder that tells runs apart, that folder, and what is below it.

    It is the first that has input.date in its name, or else the last.
    """
    folders, date = storage.normalize(config.output.path).split("/"), config.input.date
    at = next((n for n, name in enumerate(folders) if date and date in name), len(folders) - 1)
    return "/".join(folders[:at]), folders[at], "/".join(folders[at + 1 :])


def _others(config: Config) -> list[str]:
    """Outputs that may be there beside output.path, the last first."""
    above, own, below = _place(config)
    names = [name for name in storage.folders(above) if name != own]
    if not (dated := _dated(own)):
        return _newest_first([storage.join(above, name) for name in names])
    known = {name: when for name in names if (when := _dated(name)) and when[0] == dated[0]}
    before = sorted((name for name, when in known.items() if when < dated), key=lambda name: known[name], reverse=True)
    after = sorted((name for name, when in known.items() if when > dated), key=lambda name: known[name])
    return [
        storage.join(above, name, *([below.replace(config.input.date or own, known[name][1])] if below else []))
        for name in [*before, *after]
    ]


def _dated(name: str) -> tuple[str, str, str] | None:
    """What is before the date in a name, the date as 2026-11-21, and what is after it; None without a date."""
    found = _DATE.search(name)
    return (name[: found.start()], "-".join(found.groups()), name[found.end() :]) if found else None


def _newest_first(outputs: list[str]) -> list[str]:
    """Those of these folders that are outputs, by when they were planned: a plan is written once, a manifest anew by
    every report."""

    def planned(output: str) -> float:
        try:
            return storage.written_at(layout.plan(output))
        except NotFound:
            return 0.0

    with ThreadPoolExecutor(AT_ONCE) as threads:
        times = dict(zip(outputs, threads.map(planned, outputs), strict=True))
    return sorted((output for output in outputs if times[output]), key=lambda output: (-times[output], output))
