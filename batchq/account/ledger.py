"""One record per invocation, meta/runs/<id>.json, rewritten by its only owner while it works; queries over many runs.

A driver that was killed leaves its last rewrite behind, so what it cost is not forgotten.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from batchq import storage
from batchq.account.summary import summarise
from batchq.account.usage import ReplicaAccount, RunAccount, Standing, account_from_json
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

REWRITE_SECONDS = 15.0


class Invocation:
    """This invocation's record. `update` may be called often; it writes only when a rewrite is due.

    A run's record is written under its output as soon as it holds a device, even if it never stores a plan. Another
    verb's record is written there too if a run has been planned there, and otherwise to this machine's cache: a preview
    makes no output.
    """

    def __init__(self, output: str, job: str = "", verb: str = "run") -> None:
        self.output, self.job, self.verb = output, job, verb
        self.id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        self.work = Work()  # filled in once it is known what is served
        self.deadline: datetime | None = None  # that of the run
        self._began = time.monotonic()
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._written = float("-inf")
        self._replicas: tuple[ReplicaAccount, ...] = ()
        self._extra: tuple[ReplicaAccount, ...] = ()
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

    def add(self, account: ReplicaAccount) -> None:
        """What was held by something that is no replica, such as quantization."""
        self._extra += (account,)

    def update(self, replicas: tuple[ReplicaAccount, ...], lost: int, standing: Standing) -> None:
        self._replicas, self._lost, self._standing = replicas, lost, standing
        if time.monotonic() - self._written > REWRITE_SECONDS:
            self.write("running")

    def end(self, state: str) -> None:
        """Write how it ended, unless that is done or there is nothing to put on record: no device was held."""
        if self._state == "running" or (not self._state and self._extra):
            self.write(state)

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
                self.write(state)
        except StorageError as unwritten:
            logger.warning("how this run ended isn't on record: %s", unwritten)

    def write(self, state: str) -> None:
        """The record as it is now; the state "running" is no end."""
        account, folder = self.account(state), self._folder()
        failpoint.reach("ledger.close.before_put")
        try:
            storage.put(storage.join(folder, f"{self.id}.json"), sealed(dataclasses.asdict(account)))
        except StorageError as error:
            if folder == layout.runs(self.output):
                raise
            logger.warning("what %s held isn't on record: %s", self.verb, error)  # a preview's; the cache is read-only
        failpoint.reach("ledger.close.after_put")
        self._written, self._state = time.monotonic(), state

    def account(self, state: str) -> RunAccount:
        return RunAccount(
            id=self.id,
            state=state,
            started=self._started,
            wall_seconds=round(time.monotonic() - self._began, 3),
            replicas=self._extra + self._replicas,
            lost_replicas=self._lost,
            reached=self._reached,
            verb=self.verb,
            job=self.job,
            output=self.output,
            exit_code=self._exit_code,
            reason=self._reason,
            standing=self._standing,
            deadline=self.deadline.isoformat(timespec="seconds") if self.deadline else None,
            **dataclasses.asdict(self.work),
        )

    def _folder(self) -> str:
        if self.verb == "run" or storage.exists(layout.plan(self.output)):
            return layout.runs(self.output)
        return storage.join(_elsewhere(), digest_of(self.output))


@dataclass(slots=True)
class Work:
    """What a token takes of what is served and what a device can do, as in RunAccount."""

    flop_per_token: float | None = None
    peak_flops: float | None = None
    weight_bytes_per_output_token: float | None = None
    kv_bytes_per_token: int | None = None
    peak_bandwidth: float | None = None


def _age() -> float:
    """Seconds since this process began, the interpreter's own start and all imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return round(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 3)


def read_runs(output: str) -> list[RunAccount]:
    """All invocations' records of one output, oldest first, those in this machine's cache included. Raises StorageError
    for one that is damaged."""
    places = layout.runs(output), storage.join(_elsewhere(), digest_of(output))
    return sorted(
        (_read(stat.uri) for place in places for stat in storage.list_objects(place)), key=lambda each: each.id
    )


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


def survey(prefix: str, pricing: PricingConfig) -> list[dict[str, Any]]:
    """What every output below a folder or prefix holds and cost at these prices, by name: account.summarise's figures
    from receipts and records, without the lines of single invocations, and what the output is. One that can't be read
    has `output` and `error` alone.

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
        return list(pool.map(partial(_look, pricing=pricing), sorted(outputs)))


def _look(output: str, pricing: PricingConfig) -> dict[str, Any]:
    try:
        planned, runs = load_plan(output), read_runs(output)
        committed = read_committed(planned, output) if planned else None
    except StorageError as error:
        return {"output": output, "error": str(error)}
    state = f"nothing planned, {runs[-1].state}" if runs else "planned"
    if planned and committed:
        to_go = f"{len(committed.remaining)} of {len(planned.shards)} shards to go"
        state = to_go if committed.remaining else "complete"
    summary = summarise(committed.receipts if committed else (), runs, pricing)
    del summary["runs"]
    return {
        "job": planned.job if planned else runs[-1].job,
        "output": output,
        "state": state,
        "quantization": planned.quantization if planned else "",
        "started": runs[0].started if runs else None,
        "outputs": 1,
        **summary,
    }
