"""One record per invocation, meta/runs/<id>.json, rewritten by its only owner while it works; queries over many runs.

What a driver held that is killed is recorded by its witness (witness.py). Where the whole machine is lost, its last
rewrite is left, and whoever takes the output over closes that.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from batchq import storage
from batchq.account.cost import rated
from batchq.account.summary import state_words, summarise
from batchq.account.usage import ReplicaAccount, RunAccount, Standing, account_from_json, killed
from batchq.account.witness import Witness
from batchq.config import PricingConfig
from batchq.errors import Changed, NotFound, OtherDriver, OutputTaken, StorageError, exit_code_of, words_of
from batchq.machine.cache import cache_dir
from batchq.machine.digests import digest_of
from batchq.output import layout
from batchq.plan.committed import read_committed
from batchq.plan.stored import load_plan
from batchq.records import PLAN, RUNS, sealed, unsealed
from batchq.storage import failpoint

logger = logging.getLogger(__name__)

# Between two rewrites of a record: in a folder, and in a store, where each is a request (240 an hour), and a version
# where a bucket keeps them. So much at most isn't known of what a run held whose machine was lost.
REWRITE_SECONDS, REWRITE_REMOTE_SECONDS = 2.0, 15.0
LOST = "killed, or its machine was lost, without a word: what it held is counted until its next record was due"


class Invocation:
    """This invocation's record. `update` and `hold` may be called often: it is a thread that rewrites it, when due.

    A run's record is written under its output as soon as it holds a device, even if it never stores a plan. Another
    verb's record is written there too if a run has been planned there, and otherwise to this machine's cache: a preview
    makes no output.
    """

    def __init__(self, output: str, job: str = "", verb: str = "run") -> None:
        self.output, self.job, self.verb = output, job, verb
        self.id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        self.work = Work()  # filled in once it is known what is served
        self.deadline: datetime | None = None  # that of the run
        self.logs: Path | None = None  # where a witness leaves its log, and what it needs; without one there is none
        self.pricing: PricingConfig | None = None  # what it is booked at
        self._began = time.monotonic()
        self._started = _now()
        self._written = float("-inf")
        self._rewritten_in = REWRITE_REMOTE_SECONDS if storage.is_remote(output) else REWRITE_SECONDS
        self._number = 0
        self._where = ""  # where the record is, once that is known
        self._witness: Witness | None = None
        self._writing = threading.RLock()  # by the thread that rewrites, and by whoever says how it ended
        self._replicas: tuple[ReplicaAccount, ...] = ()
        self._updated = self._began  # when these were told
        self._extra: tuple[ReplicaAccount, ...] = ()
        self._held: tuple[float, ReplicaAccount] | None = None  # since when it is so, and what is held
        self._lost = 0
        self._standing: Standing | None = None
        self._reached = {"python": _age()}
        self._state = ""
        self._exit_code: int | None = None
        self._reason = ""

    def reached(self, what: str, at: float | None = None) -> None:
        """Note when the start-up first reached this step: `at`, on time.monotonic()'s clock, or now."""
        seconds = (time.monotonic() if at is None else at) - self._began
        self._reached.setdefault(what, round(seconds, 3))

    def watch(self) -> None:
        """From here on until `close` the record is rewritten when that is due, and a process of its own records what
        was held if this one is killed."""
        if self._witness is None and self.logs is not None:
            self._witness = Witness(self.logs, self._tick)

    def close(self) -> None:
        """Nothing is held any more."""
        if self._witness is not None:
            self._witness.close()

    def take_over(self) -> None:
        """This run's place after those before it; what was left by those that were killed is closed. The caller holds
        the output's lease, so nobody else is at work on it. Raises StorageError for a record that is damaged."""
        before = [run for run in read_runs(self.output) if run.verb == "run"]
        self._number = 1 + max((run.number for run in before), default=0)
        for run in before:
            if run.state == "running":
                closed = killed(run, run.rewritten_in, LOST)
                storage.put(layout.run(self.output, run.id), sealed(dataclasses.asdict(closed)))

    def hold(self, account: ReplicaAccount) -> None:
        """What something that is no replica holds at this moment, such as quantization; until `add` says what it came
        to."""
        self._held = (time.monotonic(), account)
        self.watch()

    def add(self, account: ReplicaAccount) -> None:
        """What was held by something that is no replica."""
        self._held = None
        self._extra += (account,)

    def update(self, replicas: tuple[ReplicaAccount, ...], lost: int, standing: Standing) -> None:
        self._lost, self._standing = lost, standing
        self._replicas, self._updated = replicas, time.monotonic()
        self._rewrite()

    def end(self, state: str) -> None:
        """Write how it ended, unless that is done or there is nothing to put on record: no device was held."""
        if self._state == "running" or (not self._state and (self._extra or self._replicas)):
            self.write(state)

    @property
    def recorded(self) -> bool:
        """Whether its record is written, and so is in reports."""
        return self._state != ""

    def complete(self, exit_code: int) -> None:
        """Write that all is labelled, and what that ends in; the report is made of this too."""
        self._exit_code = exit_code
        self.write("complete")

    def fail(self, state: str, error: BaseException) -> None:
        """`end`, with the error that ended it, also where all was labelled and the report couldn't be written. A run
        that had held no device yet is put on record too where it was to go on with a plan, unless that is another
        run's or another driver's, or its input is another."""
        self._exit_code, self._reason = exit_code_of(error), words_of(error)
        if self._state == "complete":
            self.write(state)
        self.end(state)
        if self._state or self.verb != "run" or isinstance(error, (OutputTaken, Changed, OtherDriver)):
            return
        try:
            if storage.exists(layout.plan(self.output)):
                self._number = self._number or 1 + max((run.number for run in read_runs(self.output)), default=0)
                self.write(state)
        except StorageError as unwritten:
            logger.warning("how this run ended isn't on record: %s", unwritten)

    def write(self, state: str) -> None:
        """The record as it is now; the state "running" is no end."""
        with self._writing:
            account, folder = self.account(state), self._folder()
            failpoint.reach("ledger.close.before_put")
            try:
                storage.put(storage.join(folder, f"{self.id}.json"), sealed(dataclasses.asdict(account)))
            except StorageError as error:
                if folder == layout.runs(self.output):
                    raise
                logger.warning("what %s held isn't on record: %s", self.verb, error)  # the cache is read-only
            failpoint.reach("ledger.close.after_put")
            self._written, self._state = time.monotonic(), state

    def _tick(self) -> dict[str, Any] | None:
        """Rewrite the record if that is due. What the witness needs to write it in this process's place; None once it
        is written how it ended."""
        with self._writing:
            if self._state not in ("", "running"):
                return None
            if self._extra or self._held or self._replicas:
                self._rewrite()
            record = dataclasses.asdict(self.account("running"))
            return {"uri": storage.join(self._folder(), f"{self.id}.json"), "at": time.monotonic(), "run": record}

    def _rewrite(self) -> None:
        """If it is due. One that the store doesn't take may be followed by one that it takes; only the last has to."""
        if time.monotonic() - self._written < self._rewritten_in:
            return
        try:
            self.write("running")
        except StorageError as error:
            self._written = time.monotonic()
            logger.warning("what this run holds couldn't be recorded: %s", error)

    def account(self, state: str) -> RunAccount:
        now = time.monotonic()
        held = () if self._held is None else (self._held[1].later(now - self._held[0]),)
        replicas = tuple(replica.later(now - self._updated) for replica in self._replicas)
        everything = self._extra + held + replicas
        if state != "running":
            everything = tuple(dataclasses.replace(replica, phase="") for replica in everything)
        return RunAccount(
            id=self.id,
            state=state,
            started=self._started,
            wall_seconds=round(now - self._began, 3),
            replicas=everything,
            lost_replicas=self._lost,
            reached=self._reached,
            verb=self.verb,
            job=self.job,
            output=self.output,
            exit_code=self._exit_code,
            reason=self._reason,
            standing=self._standing,
            deadline=self.deadline.isoformat(timespec="seconds") if self.deadline else None,
            number=self._number,
            rewritten_in=self._rewritten_in,
            rated=rated(self._extra + self._replicas, self.pricing, _now()) if self.pricing else None,
            **dataclasses.asdict(self.work),
        )

    def _folder(self) -> str:
        if not self._where:
            beside = self.verb == "run" or storage.exists(layout.plan(self.output))
            self._where = layout.runs(self.output) if beside else storage.join(_elsewhere(), digest_of(self.output))
        return self._where


@dataclass(slots=True)
class Work:
    """What a token takes of what is served and what a device can do, as in RunAccount."""

    flop_per_token: float | None = None
    peak_flops: float | None = None
    weight_bytes_per_output_token: float | None = None
    kv_bytes_per_token: int | None = None
    peak_bandwidth: float | None = None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _age() -> float:
    """Seconds since this process began, the interpreter's own start and all imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return round(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 3)


def read_runs(output: str) -> list[RunAccount]:
    """All invocations' records of one output, in the order in which its runs took it over, whatever their clocks said;
    those in this machine's cache included. Raises StorageError for one that is damaged."""
    places = layout.runs(output), storage.join(_elsewhere(), digest_of(output))
    found = (_read(stat.uri) for place in places for stat in storage.list_objects(place))
    return sorted(found, key=lambda each: (each.number, each.id))


def _elsewhere() -> str:
    """The folder of the records of verbs that ran before any plan was stored; it has a folder for each output."""
    return str(cache_dir() / "spent")


def _read(uri: str) -> RunAccount:
    try:
        return account_from_json(storage.read_checked(uri, unsealed))
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{uri}: damaged; without it the costs are incomplete. Move it away to go on") from error


# ---- many runs ----

AT_ONCE = 4  # outputs that are read; the receipts of each are read side by side too


def survey(prefix: str, pricing: PricingConfig, anew: bool = False) -> list[dict[str, Any]]:
    """What every output below a folder or prefix holds and was booked at, by name: account.summarise's figures from
    receipts and records, without the lines of single invocations, and what the output is. One that can't be read has
    `output` and `error` alone. `anew`: at this list instead of what was booked.

    Raises NotFound if there is none.
    """
    where = storage.normalize(prefix)
    marks = re.compile(rf"(.*)/(?:{re.escape(PLAN)}|{re.escape(RUNS)}/[^/]+\.json)")
    outputs = {mark[1] for stat in storage.list_objects(where) if (mark := marks.fullmatch(stat.uri))}
    for stat in storage.list_objects(_elsewhere()):
        if f"{(output := _read(stat.uri).output)}/".startswith(f"{where}/"):
            outputs.add(output)
    if not outputs:
        raise NotFound(f"{where}: no run has been planned there or below yet, and none has held a device")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(partial(_look, pricing=pricing, anew=anew), sorted(outputs)))


def _look(output: str, pricing: PricingConfig, anew: bool) -> dict[str, Any]:
    try:
        planned, runs = load_plan(output), read_runs(output)
        committed = read_committed(planned, output) if planned else None
    except StorageError as error:
        return {"output": output, "error": str(error)}
    left, shards = (len(committed.remaining), len(planned.shards)) if planned and committed else (0, 0)
    summary = summarise(committed.receipts if committed else (), runs, pricing, anew)
    del summary["runs"]
    return {
        "job": planned.job if planned else runs[-1].job,
        "output": output,
        "state": state_words(left, shards, runs),
        "quantization": planned.quantization if planned else "",
        "started": runs[0].started if runs else None,
        "outputs": 1,
        **summary,
    }
