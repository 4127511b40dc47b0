"""One record an invocation, meta/runs/<id>.json, rewritten by its only owner while it works; queries over many runs.

A driver that was killed leaves its last rewrite behind, so what it cost is not forgotten.
"""

from __future__ import annotations

import dataclasses
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from batchq import account, failpoint, plan, storage
from batchq.account import ReplicaAccount, RunAccount, account_from_json
from batchq.config import PricingConfig
from batchq.errors import NotFound, StorageError
from batchq.output import layout
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
        self.flop_per_token: float | None = None  # these as in RunAccount; for whoever knows what is served
        self.peak_flops: float | None = None
        self.weight_bytes_per_output_token: float | None = None
        self.kv_bytes_per_token: int | None = None
        self.peak_bandwidth: float | None = None

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
        storage.put(layout.run(self.output, self.id), sealed(dataclasses.asdict(account)))
        failpoint.reach("ledger.close.after_put")
        self._written = time.monotonic()

    def account(self, state: str) -> RunAccount:
        wall = round(time.monotonic() - self._began, 3)
        return RunAccount(
            self.id,
            state,
            self._started,
            wall,
            self._extra + self._replicas,
            self._lost,
            self._reached,
            flop_per_token=self.flop_per_token,
            peak_flops=self.peak_flops,
            weight_bytes_per_output_token=self.weight_bytes_per_output_token,
            kv_bytes_per_token=self.kv_bytes_per_token,
            peak_bandwidth=self.peak_bandwidth,
        )


def _age() -> float:
    """Seconds since this process began, the interpreter's own start and all imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return round(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 3)


def read_runs(output: str) -> list[RunAccount]:
    """All invocations' records of one output, oldest first. Raises StorageError for one that is damaged."""
    return [_read(s.uri) for s in storage.list_objects(layout.runs(output))]


def _read(uri: str) -> RunAccount:
    try:
        return account_from_json(storage.read_checked(uri, unsealed))
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{uri}: damaged; without it the costs are incomplete. Move it away to go on") from error


# ---- many runs ----

AT_ONCE = 4  # outputs that are looked at; the receipts of each are read side by side too


def survey(prefix: str, pricing: PricingConfig) -> list[dict[str, Any]]:
    """What every output below a folder or prefix holds and cost at these prices, by name: account.summarise's figures
    from receipts and records, without the lines of single invocations, and what the output is. One that can't be read
    has `output` and `error` alone.

    Raises NotFound if there is none.
    """
    where = storage.normalize(prefix)
    mark = f"/{layout.PLAN}"
    outputs = [s.uri.removesuffix(mark) for s in storage.list_objects(where) if s.uri.endswith(mark)]
    if not outputs:
        raise NotFound(f"{where}: no run has been planned there or below yet")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(partial(_look, pricing=pricing), outputs))


def _look(output: str, pricing: PricingConfig) -> dict[str, Any]:
    try:
        fixed = plan.load(output)
        if fixed is None:
            raise NotFound(f"{output}: went away while it was looked at")
        standing, runs = plan.standing(fixed, output), read_runs(output)
    except StorageError as error:
        return {"output": output, "error": str(error)}
    to_go = f"{len(standing.remaining)} of {len(fixed.shards)} shards to go"
    summary = account.summarise(standing.receipts, runs, pricing)
    del summary["runs"]
    return {
        "job": fixed.job,
        "output": output,
        "state": to_go if standing.remaining else "complete",
        "quantization": fixed.quantization,
        "started": runs[0].started if runs else None,
        "outputs": 1,
        **summary,
    }
