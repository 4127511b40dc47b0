"""Labels every shard that isn't committed yet, and shows how far it is."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter

from batchq.account.budget import Budget
from batchq.account.events import Kind
from batchq.account.ledger import Work
from batchq.account.usage import RunAccount, Standing
from batchq.config import Config, EngineKind, Unreadable
from batchq.errors import BatchqError, LimitReached, Stopped
from batchq.job.deadline import Deadline, Risk
from batchq.job.metrics import known, of_pool
from batchq.job.served import Served
from batchq.job.session import Session
from batchq.job.share import Pace, Share
from batchq.machine import progress
from batchq.machine.hardware import Hardware
from batchq.model import kv_cache
from batchq.model.tensors import linear_parameters
from batchq.plan import sample
from batchq.plan.committed import Committed, read_committed
from batchq.pool import PoolSnapshot
from batchq.quantize.sizes import linear_bytes
from batchq.records import Plan
from batchq.sizing import estimate
from batchq.sizing.fit import Fit
from batchq.sizing.peaks import bandwidth, peak
from batchq.task import answers
from batchq.telemetry import metrics
from batchq.worker.spec import WorkerSpec


def label(
    session: Session, plan: Plan, served: Served, before: Committed, budget: Budget, deadline: Deadline
) -> Committed:
    """Label what `before` leaves to do; returns what is committed then.

    Raises Stopped early if `session.stop` is set, LimitReached if the budget is spent or the deadline has come.
    """
    config, invocation = session.config, session.invocation
    session.progress.step(
        f"labelling {len(before.remaining)} of {len(plan.shards)} shards; engines start (logs: {session.pool.logs})"
    )
    invocation.write("running")
    invocation.reached("checkpoint")
    session.pool.connect()
    invocation.reached("ray")
    invocation.work = work_of(config, session.hardware, served)
    watch = Watch(session, plan, before, budget, deadline)
    session.events.emit(Kind.started, shards=len(before.remaining), rows_before=before.rows)
    try:
        with session.traces.phase("label"):
            session.pool.label(
                worker_spec(session, plan, served),
                before.remaining,
                session.hardware,
                session.stop,
                watch.on_progress,
                session.progress.warn,
            )
    except Stopped:
        if watch.budget_spent:
            raise LimitReached(budget.words(invocation.account("stopped"))) from None
        if not deadline.reached:
            raise
        if watch.shards_left:
            raise LimitReached(deadline.words(watch.standing_words())) from None
    estimate.remember(config, plan, session.hardware, invocation.account("complete").replicas, watch.rows)
    committed = read_committed(plan, session.output, before)
    if missing := len(committed.remaining):
        raise BatchqError(
            f"{session.output}: {missing} shards were labelled but aren't there; "
            "on several nodes output.path has to be an object store or a folder that all of them share"
        )
    return committed


EVENT_SECONDS = 60.0  # between events of the kind progress
BUDGET_SHARES = (0.5, 0.8, 1.0)  # of which an event tells, each once


class Watch:
    """Told by the pool about once a second: updates the record and the live line, tells of events, and checks the
    budget and the deadline."""

    def __init__(self, session: Session, plan: Plan, before: Committed, budget: Budget, deadline: Deadline) -> None:
        self.rows = 0  # answered by this invocation
        self.shards_left = len(before.remaining)
        self.standing: Standing | None = None
        self.budget_spent = False
        self._session, self._before, self._budget, self._deadline = session, before, budget, deadline
        self._risk = Risk()
        limit = session.config.input.limit
        self._share = Share(
            shards=len(plan.shards),
            shards_before=len(plan.shards) - len(before.remaining),
            rows_before=before.rows,
            expected_rows=sample.expected_rows(plan, limit),
            streams=any(range.unit == "stream" for shard in plan.shards for _, range in shard.pieces),
            limited=limit is not None,
        )
        self._failures = Counter[str]()  # by code, of earlier invocations
        for receipt in before.receipts:
            self._failures.update(receipt.failures)
        self._pace = Pace(self._share.at_start())
        self._began, self._starting = time.monotonic(), True  # engines
        self._first = 0.0  # when the first row was answered
        self._told = time.monotonic()  # when the last event of the kind progress was told
        self._losses = 0  # that were told
        self._budget_shares = [share for share in BUDGET_SHARES if share > (budget.share() or 0.0)]

    def on_progress(self, state: PoolSnapshot) -> None:
        session, invocation = self._session, self._session.invocation
        self.rows = state.counters.rows
        self.shards_left = len(self._before.remaining) - state.committed_shards
        standing = self.standing = self._standing(state)
        invocation.update(state.accounts, len(state.losses), standing)
        for loss in state.losses[self._losses :]:
            session.events.emit(Kind.engine_lost, reason=loss)
        self._losses = len(state.losses)
        for what, at in state.reached.items():
            invocation.reached(what, at)
        if self._starting and "engine" in state.reached:
            self._starting = False
            session.traces.past("engines start", self._began, state.reached["engine"])
        account = invocation.account("running")
        self._tell_of_budget(account)
        if self.shards_left and not session.stop.is_set():
            self._look_at_deadline(standing)
            if self._budget.is_spent(account):
                session.progress.step("the budget is spent; rows in flight are finished and saved")
                self.budget_spent = True
                session.stop.set()
        line = progress.LabellingLine(
            rows=standing.rows,
            failures=standing.failures,
            truncated=standing.truncated,
            share=standing.share,
            seconds_left=standing.seconds_left,
            tokens_per_second=standing.tokens_per_second,
            phases=tuple(state.phases),
            cost=self._budget.so_far(account),
            to_spare=standing.seconds_to_spare,
        )
        session.progress.update(line.words(), standing.share)
        far = {
            metrics.SHARDS: self._share.shards,
            metrics.COMMITTED: self._share.shards_before + state.committed_shards,
            metrics.PROGRESS: standing.share,
            metrics.ETA: standing.seconds_left,
            metrics.SLACK: line.to_spare,
            metrics.BUDGET: self._budget.share(account),
        }
        session.pool.export(session.config.job.name, [*of_pool(state, session.config.pricing), *known(far)])
        if time.monotonic() - self._told >= EVENT_SECONDS:
            self._told = time.monotonic()
            session.events.emit(Kind.progress, **dataclasses.asdict(standing))

    def standing_words(self) -> str:
        """How far it is, for the line that ends a run early."""
        if self.standing is None:
            return "no row was asked by this invocation"
        share, left = self.standing.share, self.standing.seconds_left
        of = "" if share is None else f" ({share:.0%})"
        then = "" if left is None else f", about {progress.duration(left)} of labelling is left"
        return f"at least {self.standing.rows:,} rows{of} are committed or saved{then}"

    def _standing(self, state: PoolSnapshot) -> Standing:
        now, counters, before = time.monotonic(), state.counters, self._before
        if counters.rows and not self._first:
            self._first = now
        elapsed = now - self._first if self._first else 0.0
        share = self._share.now(counters.rows, state.committed_rows, state.committed_shards)
        self._pace.note(elapsed, share)
        left, needed = self._deadline.seconds_left(), self._pace.seconds_left()
        return Standing(
            rows=before.rows + counters.rows,
            failures=before.failures + counters.failures,
            truncated=before.truncated + counters.truncated,
            share=share,
            seconds_left=needed,
            tokens_per_second=counters.tokens / elapsed if elapsed > 1 else None,
            rows_per_second=counters.rows / elapsed if elapsed > 1 else None,
            replicas=len(state.phases),
            shards_done=self._share.shards_before + state.committed_shards,
            failures_by_code=dict(self._failures + Counter(counters.failures_by_code)),
            seconds_to_spare=None if left is None or needed is None else left - needed,
        )

    def _look_at_deadline(self, standing: Standing) -> None:
        """Tell if the forecast has put the run at risk, or no longer does."""
        session, needed, spare = self._session, standing.seconds_left, standing.seconds_to_spare
        if spare is None or needed is None or not self._risk.look(time.monotonic(), needed, needed + spare):
            return
        about, gap = f"run.deadline={self._deadline.asked}", progress.duration(abs(spare))
        if self._risk.at_risk:
            session.progress.warn(f"{about} is at risk: at this pace {gap} more is needed than there is")
        else:
            session.progress.step(f"{about} is no longer at risk: at this pace {gap} is to spare")
        session.events.emit(
            Kind.deadline_at_risk, at_risk=self._risk.at_risk, seconds_needed=needed, seconds_there_are=needed + spare
        )

    def _tell_of_budget(self, account: RunAccount) -> None:
        spent = self._budget.share(account) or 0.0
        while self._budget_shares and spent >= self._budget_shares[0]:
            self._session.events.emit(
                Kind.budget, percent=round(100 * self._budget_shares.pop(0)), spent=self._budget.total(account)
            )


def worker_spec(session: Session, plan: Plan, served: Served) -> WorkerSpec:
    """What each worker is sent."""
    config = session.config
    return WorkerSpec(
        plan=dataclasses.replace(plan, shards=()),
        task=config.task,
        engine=served.settings.engine,
        output=session.output,
        chat_template=config.model.chat_template,
        in_flight=served.settings.in_flight,
        spill_seconds=config.cluster.spill_seconds,
        stall_seconds=config.engine.stall_timeout_s,
        incremental=config.output.incremental,
        quarantine=config.input.unreadable is Unreadable.quarantine,
    )


def work_of(config: Config, hardware: Hardware, served: Served) -> Work:
    """What a token takes and what a device can do, for MFU and, where text is generated, MBU. Empty for a model that
    came quantized: its matrices can't be told from their scales here, nor the precision that they are multiplied in."""
    model = served.model
    if config.engine.kind is not EngineKind.vllm or model.quantized:
        return Work()
    fit, scheme, engine = Fit(model, hardware, config), served.scheme, served.settings.engine
    work = Work(
        flop_per_token=2.0 * linear_parameters(fit.shape),
        peak_flops=peak(hardware.accelerator, scheme),
    )
    if answers.of(config.task).decodes and "speculative_config" not in engine.options:
        # A step reads the weights for one token of each row in flight. A speculated one may be worth several tokens.
        weights = linear_bytes(fit.shape, fit.quantization(scheme))
        element = 2 if engine.options.get("kv_cache_dtype", "auto") == "auto" else 1
        work.weight_bytes_per_output_token = weights / min(served.settings.in_flight, engine.max_num_seqs)
        work.kv_bytes_per_token = kv_cache.bytes_read(fit.shape.config, engine.max_model_len, element)
        work.peak_bandwidth = bandwidth(hardware.accelerator)
    return work
