"""One attempt at a job in a process of its own, without Ray: what run.py does, until it dies where it was told to.

Processes are forked from a server that has imported everything, so that an attempt takes a fraction of a second.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import faulthandler
import functools
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchq import storage
from batchq.account import ledger
from batchq.cli.clean import clean
from batchq.config import Config, Scheme
from batchq.engine.protocol import EngineSpec
from batchq.errors import BatchqError, StorageError
from batchq.job.publish import publish
from batchq.job.run import check_resume
from batchq.model import tokenizer
from batchq.model.source import Model
from batchq.output import compaction, parts
from batchq.plan.committed import read_committed
from batchq.plan.draft import make_plan
from batchq.plan.stored import load_plan, store_plan
from batchq.records import Plan, Range, Receipt, Shard, Usage
from batchq.report.outcome import finish
from batchq.storage import failpoint
from batchq.worker.spec import WorkerSpec
from batchq.worker.worker import Worker

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["chaos.attempt", "chaos.preload"])
# Starting a process polls all others; two threads that poll the same one leave it with the exit code 255.
POLLED = threading.Lock()
OBJECT_BYTES, ROW_GROUP_BYTES = 25_000, 3_000  # of compacted objects
DIES_S = 60.0  # an attempt that takes longer hangs
HUNG = 75
SPARED = 76  # it would have been 0, but a fault that was ordered didn't strike


@dataclass(frozen=True)
class Order:
    """What an attempt is to do. `log` takes its output; it is appended to."""

    config: Config
    env: dict[str, str]
    log: Path
    failpoints: str = ""  # in the words of BATCHQ_FAILPOINT
    engine: dict[str, Any] = field(default_factory=dict)  # the fake engine's options
    skew_s: float = 0.0  # how far this process's clock is off
    hits: Path | None = None  # where to note which failpoints were reached, and how often


def start(order: Order, gate: Barrier | None = None, gate_at: str = "") -> ForkServerProcess:
    """Start an attempt; `gate`, if there is one, holds it the first time it reaches the failpoint `gate_at`."""
    process = FORKS.Process(target=attempt, args=(order, gate, gate_at), daemon=True)
    with POLLED:
        process.start()
    return process


def exit_code(process: ForkServerProcess) -> int:
    """Wait for it: batchq's exit code, HUNG, SPARED, or minus the signal that ended it."""
    if not multiprocessing.connection.wait([process.sentinel], DIES_S):
        process.kill()  # its log says where it was
        multiprocessing.connection.wait([process.sentinel])
        return HUNG
    with POLLED:
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def attempt(order: Order, gate: Barrier | None, gate_at: str) -> None:
    """Runs in the fork."""
    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(DIES_S - 10)
    os.environ.update(order.env)
    _skew(order.skew_s)
    tokenizer.open_tokenizer = functools.cache(tokenizer.open_tokenizer)  # the fork's parent has opened it already
    if gate is not None:
        _hold(gate, gate_at)
    counted: Counter[str] = Counter()
    if order.hits is not None:
        _count_hits(counted)
    failpoint.arm(order.failpoints)
    try:
        work(order)
    except BatchqError as error:
        print(f"batchq: {error}", flush=True)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = 70  # a defect
    else:
        code = SPARED if failpoint.armed() else 0
    if order.hits is not None:
        order.hits.write_text(json.dumps(counted))
    sys.stdout.flush()
    os._exit(code)  # a tokio runtime in a fork has nothing to say at exit


def work(order: Order) -> None:
    """plan -> label what is left -> account, as job.run does."""
    config = order.config
    output = storage.normalize(config.output.path)
    model = Model(path=config.model.path, name="tiny", digest="model", quantized=None)
    stored = load_plan(output)
    if stored is not None:
        check_resume(config, stored, model, output)
    fixed = stored or store_plan(make_plan(config, model.digest, Scheme.none, model.digest), output)
    remaining = read_committed(fixed, output).remaining
    if not remaining:
        end(order, fixed)
        return
    invocation = ledger.Invocation(output)
    invocation.write("running")
    spec = WorkerSpec(
        plan=dataclasses.replace(fixed, shards=()),
        task=config.task,
        engine=EngineSpec("fake", config.model.path, config.engine.max_model_len, 2048, 64, options=order.engine),
        output=output,
        chat_template={},
        in_flight=8,
        spill_seconds=config.cluster.spill_seconds,
        stall_seconds=config.engine.stall_timeout_s,
    )
    try:
        asyncio.run(label(spec, remaining))
    except BaseException:
        invocation.write("failed")
        raise
    invocation.write("complete")
    if read_committed(fixed, output).remaining:
        raise StorageError(f"{output}: shards were labelled but aren't there")
    end(order, fixed)


def end(order: Order, fixed: Plan) -> None:
    """Publish, account, and remove what nobody needs, as far as the job asks for it."""
    config = order.config
    compaction.MIB, compaction.GROUP_BYTES = OBJECT_BYTES, ROW_GROUP_BYTES  # the corpus has some KB
    publish(config, fixed, threading.Event(), print)
    finish(config, fixed, read_committed(fixed, storage.normalize(config.output.path)), [])
    if config.clean.parts:
        clean(config)


async def label(spec: WorkerSpec, shards: Sequence[Shard]) -> None:
    worker = Worker(spec)
    await worker.start()
    try:
        for ahead in range(0, len(shards), 2):  # as the pool hands them out: two at a time
            done = await asyncio.gather(*map(worker.label, shards[ahead : ahead + 2]), return_exceptions=True)
            for result in done:
                if isinstance(result, BaseException):
                    raise result
    finally:
        await worker.close()


def _skew(seconds: float) -> None:
    """Let every clock that tells the time of day lie. The monotonic one can't."""
    if not seconds:
        return
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)

    class Lying(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + datetime.timedelta(seconds=seconds)

    ledger.datetime = Lying  # type: ignore[attr-defined]


def _hold(gate: Barrier, at: str) -> None:
    reach = failpoint.reach
    first, passed = threading.Lock(), threading.Event()

    def held(name: str) -> None:
        if name == at:
            if first.acquire(blocking=False):  # never released
                gate.wait(DIES_S / 2)
                passed.set()
            passed.wait(DIES_S / 2)  # no other thread of this process slips by
        reach(name)

    failpoint.reach = held


def _count_hits(counted: Counter[str]) -> None:
    reach = failpoint.reach

    def noted(name: str) -> None:
        counted[name] += 1
        reach(name)

    failpoint.reach = noted


# ---- a writer that does nothing but commit ----

ROWS_PER_COMMIT = 20_000


def commit_forever(output: str, first: int, ready: Event) -> None:
    """Commit objects of about two MB, part-NNNNN from `first` on, until killed."""
    text = os.urandom(100).hex()
    ids = [f":{i}:{text[i % 100 :]}" for i in range(ROWS_PER_COMMIT)]
    for index in itertools.count(first):
        shard = Shard(index, 0, Range("rows"))
        receipt = Receipt(index, 0, True, "chaos", "chaos", Usage(rows=ROWS_PER_COMMIT))
        table = pa.table({"batchq_id": [f"{index}{i}" for i in ids]})
        ready.set()
        parts.commit(output, shard, receipt, table)


def ids_of(data: bytes) -> list[str]:
    table = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()
    found: list[str] = table.column("batchq_id").to_pylist()
    return found
