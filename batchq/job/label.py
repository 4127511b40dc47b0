"""Labels every shard that isn't committed yet, and shows how far it is."""

from __future__ import annotations

import dataclasses
import time

from batchq import capacity, estimate, forecast, progress
from batchq.budget import Budget
from batchq.config import Config, EngineKind, TaskKind, Unreadable
from batchq.errors import BatchqError, Stopped
from batchq.fit import Fit
from batchq.hardware import Hardware
from batchq.job.served import Served
from batchq.job.session import Session
from batchq.job.share import Share
from batchq.ledger import Work
from batchq.plan import sample
from batchq.plan.committed import Committed, read_committed
from batchq.pool import PoolSnapshot
from batchq.records import Plan
from batchq.worker.spec import WorkerSpec


def label(session: Session, plan: Plan, served: Served, before: Committed, budget: Budget) -> Committed:
    """Label what `before` leaves to do; returns what is committed then.

    Raises Stopped early if `session.stop` is set or the budget is spent.
    """
    config, invocation = session.config, session.invocation
    session.progress.step(
        f"labelling {len(before.remaining)} of {len(plan.shards)} shards; engines start (logs: {session.pool.logs})"
    )
    invocation.close("running")
    invocation.reached("checkpoint")
    session.pool.connect()
    invocation.reached("ray")
    invocation.work = work_of(config, session.hardware, served)
    watch = Watch(session, plan, before, budget)
    try:
        session.pool.label(
            worker_spec(session, plan, served),
            before.remaining,
            session.hardware,
            session.stop,
            watch.on_progress,
            session.progress.step,
        )
    except Stopped:
        if watch.budget_spent:
            raise Stopped(budget.words(invocation.account("stopped"))) from None
        raise
    estimate.remember(config, plan, session.hardware, invocation.account("complete").replicas, watch.rows)
    committed = read_committed(plan, session.output, before)
    if missing := len(committed.remaining):
        raise BatchqError(
            f"{session.output}: {missing} shards were labelled but aren't there; "
            "on several nodes output.path has to be an object store or a folder that all of them share"
        )
    return committed


class Watch:
    """Hears from the pool about once a second: keeps the record, the live line and the budget."""

    def __init__(self, session: Session, plan: Plan, before: Committed, budget: Budget) -> None:
        self.rows = 0  # answered by this invocation
        self.budget_spent = False
        self._session, self._before, self._budget = session, before, budget
        limit = session.config.input.limit
        self._share = Share(
            shards=len(plan.shards),
            shards_before=len(plan.shards) - len(before.remaining),
            rows_before=before.rows,
            expected_rows=sample.expected_rows(plan, limit),
            streams=any(shard.range.unit == "stream" for shard in plan.shards),
            limited=limit is not None,
        )
        self._first = 0.0  # when the first row was answered

    def on_progress(self, state: PoolSnapshot) -> None:
        session, invocation = self._session, self._session.invocation
        self.rows = state.counters.rows
        invocation.update(state.accounts, state.lost_replicas)
        for what, at in state.reached.items():
            invocation.reached(what, at)
        now = time.monotonic()
        if state.counters.rows and not self._first:
            self._first = now
        elapsed = now - self._first if self._first else 0.0
        share = self._share.now(state.counters.rows, state.committed_rows, state.committed_shards)
        account = invocation.account("running")
        left = state.committed_shards < len(self._before.remaining)
        if left and not session.stop.is_set() and self._budget.spent(account):
            session.progress.step("the budget is spent; rows in flight are finished and kept")
            self.budget_spent = True
            session.stop.set()
        line = progress.LabellingLine(
            rows=self._before.rows + state.counters.rows,
            failures=self._before.failures + state.counters.failures,
            share=share,
            seconds_left=self._share.seconds_left(share, elapsed),
            tokens_per_second=state.counters.tokens / elapsed if elapsed > 1 else None,
            phases=tuple(state.phases),
            cost=self._budget.so_far(account),
        )
        session.progress.update(line.words(), share)


def worker_spec(session: Session, plan: Plan, served: Served) -> WorkerSpec:
    """What each worker is sent."""
    config = session.config
    return WorkerSpec(
        plan=dataclasses.replace(plan, shards=()),
        task=config.task,
        engine=served.engine,
        output=session.output,
        chat_template=config.model.chat_template,
        in_flight=served.in_flight,
        spill_seconds=config.cluster.spill_seconds,
        stall_seconds=config.engine.stall_timeout_s,
        quarantine=config.input.unreadable is Unreadable.quarantine,
    )


def work_of(config: Config, there: Hardware, served: Served) -> Work:
    """What a token takes and what a device can do, for MFU and, where text is generated, MBU. Not of a model that came
    quantized: its matrices aren't told apart from their scales here, nor what they are multiplied in."""
    model = served.model
    if config.engine.kind is not EngineKind.vllm or model.quantized:
        return Work()
    fit, scheme, engine = Fit(model, there, config), served.scheme, served.engine
    work = Work(
        flop_per_token=2.0 * capacity.linear_parameters(fit.tensors, fit.shape),
        peak_flops=forecast.peak(there.accelerator, scheme),
    )
    if config.task.kind is TaskKind.generate and "speculative_config" not in engine.options:
        # A step reads the weights for one token of each row in flight. A speculated one may be worth several tokens.
        weights = capacity.linear_bytes(fit.tensors, fit.shape, scheme, fit.ignore, fit.group(scheme))
        element = 2 if engine.options.get("kv_cache_dtype", "auto") == "auto" else 1
        work.weight_bytes_per_output_token = weights / min(served.in_flight, engine.max_num_seqs)
        work.kv_bytes_per_token = capacity.kv_bytes_read(fit.shape, engine.max_model_len, element)
        work.peak_bandwidth = forecast.bandwidth(there.accelerator)
    return work
