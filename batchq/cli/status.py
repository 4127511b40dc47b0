"""`batchq status`: how far the run at output.path is, whether it is at work, and when it will be done, from the store
alone.

It is at work if its lease's beats rise, watched on this machine's clock, as by a driver that would take it over
(output/lease.py). While it is, its figures are those that it rewrites in its record; otherwise what is
committed counts.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from datetime import datetime, timedelta
from typing import Any

from batchq import storage
from batchq.account import ledger
from batchq.account.cost import spent, total, with_prices
from batchq.account.usage import RunAccount
from batchq.cli import streams
from batchq.config import Config, Scheme
from batchq.errors import ExitCode, StorageError
from batchq.machine.progress import Progress, duration, visible
from batchq.output import lease
from batchq.plan.draft import ingredients
from batchq.plan.stored import differing, load_plan
from batchq.records import Plan
from batchq.report import facts
from batchq.report.outcome import load, summarise

REDRAW_SECONDS = 5.0  # between two looks of --watch and --wait
POLL_SECONDS = 0.5  # while it isn't known whether it is at work
UNREAD_SECONDS = 600.0  # --watch and --wait go on for so long while the store can't be read
COLUMNS = 80

Figures = dict[str, Any]


def status(config: Config) -> str:
    """How far the run is, in words. Raises BatchqError if nothing is there."""
    watcher = Watcher(config)
    watcher.decide()
    return words(watcher.figures())


def observe(config: Config, as_json: bool, watch: bool, wait: bool) -> tuple[int, str]:
    """(exit code, what is printed). `watch`: a line every few seconds until the run has ended; `wait`: nothing until
    then, and the run's own exit code; `as_json`: an object instead of words.

    Raises BatchqError if nothing is there.
    """
    watcher = Watcher(config)
    try:
        watcher.decide()
        if watch or wait:
            watcher.follow(watch, as_json)
    except KeyboardInterrupt:  # no exit code of a run's
        raise SystemExit(128 + signal.SIGINT) from None
    figures = watcher.figures()
    text = _object(figures) if as_json else words(figures)
    if not wait:
        return 0, text
    code = figures["exit_code"]
    if code is None:
        since = f"not running since {figures['since']}" if figures["since"] else "no invocation of it is on record"
        streams.warn(f"batchq: {since}; it didn't say how it ended")
        code = ExitCode.FAILED
    return int(code), text


class Watcher:
    """Looks at one output again and again. `at_work` is None until it is known."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.output = storage.normalize(config.output.path)
        self.heart = lease.last(self.output)
        self.at_work: bool | None = None
        self.record: RunAccount | None = None
        self._plan: Plan | None = None

    def look(self) -> None:
        """Whether it is at work now; a later driver than the one that was watched is found."""
        latest = lease.last(self.output)
        if latest is None or self.heart is None or latest.number != self.heart.number:
            self.heart = latest
        self.record = self._record()
        self.at_work = self.heart.look(self.record and self.record.wall_seconds) if self.heart else False
        if self.at_work is False:  # its last record was written before it said so
            self.record = self._record()

    def decide(self) -> None:
        """Look until it is known; says so on standard error where that takes long."""
        self.look()
        if self.at_work is None and self.heart:
            seconds = self.heart.watch_seconds
            streams.warn(f"batchq: watching up to {seconds:.0f} s whether {self.heart.owner} is still at work")
        while self.at_work is None:
            time.sleep(POLL_SECONDS)
            self.look()

    def follow(self, watch: bool, as_json: bool) -> None:
        """Until it isn't at work any more; with `watch` it is shown."""
        screen, read = Progress(sys.stdout), time.monotonic()
        if watch and self.at_work:
            self._show(screen, as_json)
        while self.at_work is not False:
            time.sleep(REDRAW_SECONDS)
            try:
                self.look()
                if watch and self.at_work:
                    self._show(screen, as_json)
                read = time.monotonic()
            except StorageError as error:  # the run may be well
                if time.monotonic() - read > UNREAD_SECONDS:
                    raise
                streams.warn(f"batchq: {visible(str(error))}; trying again")
        screen.clear()

    def _show(self, screen: Progress, as_json: bool) -> None:
        figures = self.figures()
        if as_json:
            streams.say(_object(figures))
        elif screen.live:
            screen.update(line(figures))
        else:
            streams.say(line(figures))

    def figures(self) -> Figures:
        """All there is to say: docs/operations.md has the fields. Raises BatchqError if nothing is there."""
        record, running = self.record, bool(self.at_work)
        self._plan = self._plan or load_plan(self.output)
        if self._plan is None and not running:
            load(self.config)  # says what was tried
        standing = record.standing if record and running else None
        runs = self._runs()
        costs, whole = spent(with_prices(runs, self.config.pricing))
        figures: Figures = {
            "job": self._plan.job if self._plan else self.config.job.name,
            "date": self.config.input.date,
            "output": self.output,
            "running": running,
            "since": None if running else _ended(record),
            "run": record.id if record else self.heart.run if self.heart else None,
            "started": record.started if record else None,
            "driver": self.heart.owner if self.heart else None,
            "heartbeat_seconds": self.heart.silent_seconds if self.heart and running else None,
            "as_of_seconds": record.wall_seconds if record else None,
            "shards": len(self._plan.shards) if self._plan else None,
            "shards_done": standing.shards_done if standing else None,
            "rows": standing.rows if standing else None,
            "failures": standing.failures if standing else None,
            "failures_by_code": standing.failures_by_code if standing else {},
            "truncated": standing.truncated if standing else None,
            "share": standing.share if standing else None,
            "seconds_left": standing.seconds_left if standing else None,
            "tokens_per_second": standing.tokens_per_second if standing else None,
            "rows_per_second": standing.rows_per_second if standing else None,
            "replicas": standing.replicas if standing else None,
            "replicas_lost": sum(run.lost_replicas for run in runs),
            "deadline": record.deadline if record else None,
            "seconds_to_spare": standing.seconds_to_spare if standing else None,
            "cost": total(costs, whole),
            "currency": " ".join(sorted(costs)) or self.config.pricing.currency,
            "exit_code": record.exit_code if record and not running else None,
            "reason": record.reason if record and not running else "",
        }
        if not running:
            figures |= self._committed()
        return figures

    def _committed(self) -> Figures:
        plan, committed = load(self.config)
        summary = summarise(self.config, plan, committed, []) | {"changed": changed(self.config, plan)}
        same = ("shards_done", "rows", "failures", "failures_by_code", "truncated")
        share = summary["shards_done"] / max(1, summary["shards"])
        return {name: summary[name] for name in same} | {"share": share, "summary": summary}

    def _runs(self) -> list[RunAccount]:
        return [run for run in ledger.read_runs(self.output) if run.verb == "run"]

    def _record(self) -> RunAccount | None:
        """That of the invocation that has the lease; where it has none, the latest one's."""
        runs = self._runs()
        mine = [run for run in runs if self.heart and run.id == self.heart.run]
        return mine[-1] if mine else runs[-1] if runs else None


def _object(figures: Figures) -> str:
    return json.dumps({name: value for name, value in figures.items() if name != "summary"}, allow_nan=False)


def line(figures: Figures) -> str:
    """A line of at most 79 characters; what is needed most stands first."""
    if figures["rows"] is None:
        parts = ["running, no row is asked yet"]
    else:
        share = "" if figures["share"] is None else f" ({figures['share']:.0%})"
        parts = [f"{figures['rows']:,} rows{share}", _eta(figures)]
    if figures["failures"]:
        parts.append(f"{figures['failures']:,} failures")
    if figures["tokens_per_second"]:
        parts.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
    if figures["replicas_lost"]:
        parts.append(f"{figures['replicas_lost']} replicas lost")
    if figures["cost"] is not None:
        parts.append(f"{figures['cost']:,.{2 if figures['cost'] >= 1 else 4}f} {figures['currency']}")
    kept = parts.pop(0)
    while parts and len(kept) + 3 + len(parts[0]) < COLUMNS:
        kept += f" · {parts.pop(0)}"
    return kept


def words(figures: Figures) -> str:
    """The same for a person, with all there is."""
    return _running(figures) if figures["running"] else _not_running(figures)


def _running(figures: Figures) -> str:
    done = "nothing is planned yet"
    if figures["shards"] is not None:
        done = f"{figures['shards_done'] or 0} of {figures['shards']} shards committed"
    lines = [f"batchq · {_name(figures)} · running · {done}", f"  driver     {figures['driver']}, run {figures['run']}"]
    if figures["heartbeat_seconds"] is not None:
        lines.append(f"  heartbeat  {figures['heartbeat_seconds']:.0f} s ago")
    if figures["rows"] is None:
        lines.append("  rows       none is asked yet: the model, the gate or engines are being started")
    else:
        share = "" if figures["share"] is None else f" ({figures['share']:.0%})"
        cut = f" · {figures['truncated']:,} cut off" if figures["truncated"] else ""
        lines.append(f"  rows       {figures['rows']:,}{share}, {_failures(figures)}{cut}")
        rates = [f"{facts.number(figures[f'{what}_per_second'])} {what}/s" for what in ("rows", "tokens")]
        lines.append(f"  pace       {_eta(figures)} · {' · '.join(rates)} · {figures['replicas']} replicas")
    if figures["deadline"]:
        lines.append(f"  deadline   {figures['deadline']}")
    if figures["replicas_lost"]:
        lines.append(f"  lost       {figures['replicas_lost']} replicas")
    if figures["cost"] is not None:
        lines.append(f"  cost       {figures['cost']:.4f} {figures['currency']} so far")
    return _visible([*lines, f"  output     {figures['output']}"])


def _not_running(figures: Figures) -> str:
    summary = figures["summary"]
    since = f"not running since {figures['since']}" if figures["since"] else "not running"
    cut = f" · {summary['truncated']:,} cut off" if summary["truncated"] else ""
    lines = [
        f"batchq · {_name(figures)} · {since} · {summary['shards_done']} of {summary['shards']} shards committed",
        f"  ended      {_ending(figures)}",
        f"  model      {summary['model']} · {summary['quantization']}: {summary['why']}",
        f"  rows       {summary['rows']:,} = {summary['answers']:,} answers + {_failures(figures)}{cut}",
        f"  cost       {facts.cost(summary)}",
        f"  output     {summary['read']} · {facts.counted(summary['objects'], 'object')}",
    ]
    if figures["replicas_lost"]:
        lines.insert(-2, f"  lost       {figures['replicas_lost']} replicas")
    if summary["changed"]:
        lines.insert(2, f"  refused    with this configuration, which has another {summary['changed']}")
    return _visible(lines)


def _visible(lines: list[str]) -> str:
    return "\n".join(map(visible, lines))


def _ending(figures: Figures) -> str:
    runs = figures["summary"]["runs"]
    if not runs:
        return "no invocation is on record"
    last = next((run for run in runs if run["id"] == figures["run"]), runs[-1])
    if last["state"] == "running":
        return (
            "without a word: it was killed, its machine was lost, or it couldn't write here any more "
            "(its own log says so); the same command goes on"
        )
    code = "" if last["exit_code"] is None or last["reason"] else f", exit code {last['exit_code']}"
    return f"{facts.ended(last)}{code}"


def changed(config: Config, plan: Plan) -> str:
    """The settings in which this configuration differs from the plan, as far as that is known without the model."""
    parts = ingredients(config, plan.ingredients["model"], Scheme.none)
    return differing(plan, parts, [name for name in parts if name not in ("quantization", "reuse")])


def _name(figures: Figures) -> str:
    return f"{figures['job']} · {figures['date']}" if figures["date"] else str(figures["job"])


def _failures(figures: Figures) -> str:
    codes = ", ".join(f"{count:,} {code}" for code, count in sorted(figures["failures_by_code"].items()))
    return f"{figures['failures']:,} failures" + (f" ({codes})" if codes else "")


def _eta(figures: Figures) -> str:
    left, spare = figures["seconds_left"], figures["seconds_to_spare"]
    if left is None:
        return "ETA -"
    met = "" if spare is None else ", in time" if spare >= 0 else f", late by {duration(-spare)}"
    return f"ETA {duration(left)}{met}"


def _ended(record: RunAccount | None) -> str | None:
    """When it last wrote its record, by its own clock; for people, nothing is decided by it."""
    if record is None:
        return None
    ended = datetime.fromisoformat(record.started) + timedelta(seconds=record.wall_seconds)
    return ended.isoformat(timespec="seconds")
