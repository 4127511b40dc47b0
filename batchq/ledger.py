"""One record an invocation, meta/runs/<id>.json, rewritten by its only owner while it works.

A driver that was killed leaves its last rewrite behind, so what it cost is not forgotten.
"""

from __future__ import annotations

import dataclasses
import os
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

from batchq import failpoint, storage
from batchq.account import ReplicaAccount, RunAccount, account_from_json
from batchq.errors import StorageError
from batchq.records import sealed, unsealed

REWRITE_SECONDS = 15.0


class Invocation:
    """This invocation's record. `update` may be called often; it writes only when a rewrite is due."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        self._began = time.monotonic()
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._written = float("-inf")
        self._replicas: tuple[ReplicaAccount, ...] = ()
        self._extra: tuple[ReplicaAccount, ...] = ()
        self._lost = 0
        self._reached = {"python": _age()}

    def reached(self, what: str, at: float | None = None) -> None:
        """Note when the start-up first came so far: `at`, on time.monotonic()'s clock, or now."""
        seconds = (time.monotonic() if at is None else at) - self._began
        self._reached.setdefault(what, round(seconds, 3))

    def spent(self, account: ReplicaAccount) -> None:
        """Devices held by something that is no replica, such as quantization."""
        self._extra += (account,)

    def update(self, replicas: tuple[ReplicaAccount, ...], lost: int) -> None:
        self._replicas, self._lost = replicas, lost
        if time.monotonic() - self._written > REWRITE_SECONDS:
            self.close("running")

    def close(self, state: str) -> None:
        account = self.account(state)
        failpoint.reach("ledger.close.before_put")
        storage.put(storage.join(self.output, f"meta/runs/{self.id}.json"), sealed(dataclasses.asdict(account)))
        failpoint.reach("ledger.close.after_put")
        self._written = time.monotonic()

    def account(self, state: str) -> RunAccount:
        wall = round(time.monotonic() - self._began, 3)
        return RunAccount(self.id, state, self._started, wall, self._extra + self._replicas, self._lost, self._reached)


def _age() -> float:
    """Seconds since this process began, the interpreter's own start and all imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return round(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 3)


def read_runs(output: str) -> list[RunAccount]:
    """All invocations' records of one output, oldest first. Raises StorageError for one that is damaged."""
    return [_read(s.uri) for s in storage.list_objects(storage.join(output, "meta/runs"))]


def _read(uri: str) -> RunAccount:
    try:
        return account_from_json(storage.read_checked(uri, unsealed))
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{uri}: damaged; without it the costs are incomplete. Move it away to go on") from error
