"""A job without Ray and without a driver: planned, labelled by one worker on the fake engine, finished."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from batchq import storage
from batchq.account.usage import Counters, ReplicaAccount
from batchq.config import Config, Scheme
from batchq.engine.protocol import EngineSpec
from batchq.errors import Stopped
from batchq.machine.hardware import Hardware
from batchq.plan.committed import read_committed
from batchq.plan.draft import make_plan
from batchq.plan.stored import store_plan
from batchq.pool import Pool, PoolSnapshot
from batchq.pool.handles import Notify
from batchq.records import Plan, Receipt, Shard
from batchq.report.outcome import Result, finish
from batchq.worker.spec import WorkerSpec
from batchq.worker.worker import Worker


def planned(config: Config) -> Plan:
    """The job's plan, stored under its output."""
    return store_plan(make_plan(config, "model", Scheme.none, "model"), storage.normalize(config.output.path))


def worker(config: Config, fixed: Plan, stall: float = 600, **options: Any) -> Worker:
    """A worker on the fake engine; `options` order its faults."""
    spec = WorkerSpec(
        plan=dataclasses.replace(fixed, shards=()),
        task=config.task,
        engine=EngineSpec("fake", config.model.path, config.engine.max_model_len, 2048, 64, options=options),
        output=storage.normalize(config.output.path),
        chat_template={},
        in_flight=16,
        spill_seconds=3600,
        stall_seconds=stall,
    )
    return Worker(spec)


async def labelled(config: Config, fixed: Plan, **options: Any) -> list[Receipt]:
    """All shards on one worker, as a replica would be given them: the next while the last one drains."""
    made = worker(config, fixed, **options)
    await made.start()
    try:
        receipts = await asyncio.gather(*(made.label(shard) for shard in fixed.shards))
    finally:
        await made.close()
    return [receipt for each in receipts for receipt in each]


class OneWorker(Pool):
    """A pool without Ray: one worker in this process labels shard by shard, and the driver is told after each."""

    def connect(self) -> None:
        pass

    def label(
        self,
        spec: WorkerSpec,
        shards: Sequence[Shard],
        hardware: Hardware,
        stop: threading.Event,
        on_progress: Callable[[PoolSnapshot], None],
        notify: Notify,
    ) -> PoolSnapshot:
        state = PoolSnapshot(0, 0, Counters(), ["infer"], (), (), {})

        async def all_shards() -> None:
            made = Worker(spec)
            await made.start()
            state.reached["engine"] = time.monotonic()
            try:
                for shard in shards:
                    if stop.is_set():
                        break
                    state.committed_rows += sum(receipt.usage.rows for receipt in await made.label(shard))
                    state.committed_shards += 1
                    seen = made.snapshot()
                    state.counters = seen.counters
                    state.accounts = (ReplicaAccount("cpu_core", 1, seen.phases, seen.cpu, seen.counters),)
                    on_progress(state)
            finally:
                await made.close()

        asyncio.run(all_shards())
        if state.committed_shards < len(shards):
            raise Stopped("stopped before the end; the same command goes on from here")
        return state


def rows(config: Config) -> list[dict[str, Any]]:
    """What stands in a local output, by batchq_id."""
    table = pq.read_table(storage.join(storage.normalize(config.output.path), "data"))
    found: list[dict[str, Any]] = table.sort_by("batchq_id").to_pylist()
    return found


def finished(config: Config, fixed: Plan | None = None) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Plan, label on one worker, finish: (manifest, rows, exit code)."""
    result = completed(config, fixed)
    output = Path(storage.normalize(config.output.path))
    found = [r for p in sorted((output / "data").iterdir()) for r in pq.read_table(p).to_pylist()]
    return json.loads((output / "meta/manifest.json").read_text()), found, result.exit_code


def completed(config: Config, fixed: Plan | None = None) -> Result:
    """Plan, label on one worker, finish."""
    output = storage.normalize(config.output.path)
    fixed = fixed or planned(config)

    async def all_shards() -> None:
        made = worker(config, fixed)
        made.spec = dataclasses.replace(made.spec, quarantine=config.input.unreadable.value == "quarantine")
        await made.start()
        try:
            for shard in fixed.shards:
                await made.label(shard)
        finally:
            await made.close()

    asyncio.run(all_shards())
    committed = read_committed(fixed, output)
    assert not committed.remaining
    return finish(config, fixed, committed, [])
