"""The main path: plan -> quantize -> gate -> label -> account -> report, a call each."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
import types
from concurrent.futures import Future, wait

from batchq import (
    account,
    capacity,
    estimate,
    forecast,
    gate,
    hardware,
    ledger,
    models,
    outcome,
    plan,
    progress,
    quantize,
    sample,
    storage,
    tune,
)
from batchq.budget import Budget
from batchq.config import Config, EngineKind, KvCache, Scheme, Unreadable, check
from batchq.errors import BatchqError, ConfigError, GateRefused, Stopped
from batchq.fit import Choice, Fit, require_memory
from batchq.gate import Verdict
from batchq.hardware import Hardware
from batchq.lease import Lease
from batchq.models import Model
from batchq.outcome import Result, finish
from batchq.pool import Pool, State
from batchq.progress import Progress
from batchq.quantize import Checkpoint
from batchq.records import Plan
from batchq.scheme import FACTS, LADDER
from batchq.task import answers
from batchq.task.task import Task
from batchq.worker import WorkerSpec

MOMENT = 1.0  # seconds in which a model that is there already is found


def run(config: Config, stop: threading.Event | None = None) -> Result:
    """Do the job, or what is left of it. Set `stop` to end early with everything answered kept.

    Raises BatchqError (see errors.py) with one line for a person; nothing committed is lost by it.
    """
    check(config)
    output = storage.normalize(config.output.path)
    show = Progress()
    invocation = ledger.Invocation(output)
    stored = plan.load(output)
    reused = None if stored else plan.reused(config)
    with Pool(config.cluster, config.engine, models.cache_dir() / "logs" / config.job.name) as pool:
        if not stored:
            show.step(f"model {config.model.path}: fetched or converted, unless it is cached")
        model = models.resolve(config.model) if stored else resolved(config, pool)
        invocation.reached("model")
        new_inputs = resumable(stored, config, model, output) if stored else []
        if stored and not plan.standing(stored, output).remaining:
            show.step("all is committed; nothing to do")
            return finish(config, stored, model, "complete", output, new_inputs)

        if stored:
            plan.reused(config)  # has to be there still: without it every row would be asked
        here = pool.hardware()
        budget = Budget(config.pricing, output, here)
        if reused and (others := plan.differing(reused, ingredients(config, model, reused), plan.KEYED)):
            show.step(f"output.reuse: nothing can be reused of {config.output.reuse}, which has another {others}")
            reused = None
        choice = choose_again(config, reused, model, here) if reused else choose(config, stored, model, here)
        halt = stop or threading.Event()
        served = reused.checkpoint if reused else ""
        draft = stored or plan.make(config, model.digest, choice.scheme, served)  # before anything is written
        lease = Lease(output, show.step, halt, lost=halt)
        invocation.reached("plan")
        try:
            if not stored and (stored := plan.load(output)):  # by the driver that this one waited for
                new_inputs, reused = resumable(stored, config, model, output), None
                draft, choice = stored, choose(config, stored, model, here)
                if not plan.standing(stored, output).remaining:
                    show.step("all is committed by now; nothing to do")
                    result = finish(config, stored, model, "complete", output, new_inputs)
                    lease.close()
                    return result
            draft, checkpoint, verdicts = settle(
                config, stored, draft, model, choice, pool, here, invocation, halt, show
            )
            if reused and checkpoint.key != reused.checkpoint:
                raise ConfigError(
                    f"output.reuse={config.output.reuse}: its checkpoint {reused.checkpoint[:12]} isn't in "
                    f"quantization.cache any more, and the one made now, {checkpoint.key[:12]}, answers otherwise; "
                    "bring it back, or leave output.reuse out"
                )
            fixed = stored or plan.store(dataclasses.replace(draft, checkpoint=checkpoint.key), output)
            plan.refuse_other(fixed, draft, checkpoint.key, output)
            if not stored:
                outcome.note_verdicts(output, verdicts)
            label(config, fixed, model, checkpoint, pool, here, invocation, budget, halt, show)
            show.clear()
            invocation.close("complete")
            result = finish(config, fixed, model, "complete", output, new_inputs)
        except BaseException as error:
            show.clear()
            begun = plan.load(output) is not None  # without a plan there is no output to keep accounts of
            if begun:
                invocation.close("stopped" if isinstance(error, Stopped) else "failed")
            lease.close(forget=not begun)
            if isinstance(error, Stopped) and lease.taken_by:
                raise Stopped(f"{output}: {lease.taken_by} has taken over, so this one left; nothing is lost") from None
            raise
        lease.close()
        return result


def resolved(config: Config, pool: Pool) -> Model:
    """The job's model. While it is fetched or converted, which takes 22 s for the demo's on two cores, Ray starts."""
    found: Future[Model] = Future()

    def find() -> None:
        try:
            found.set_result(models.resolve(config.model))
        except BaseException as error:  # it is raised where the model is awaited
            found.set_exception(error)

    threading.Thread(target=find, name="batchq-model", daemon=True).start()
    wait([found], MOMENT)
    if not found.done():
        pool.connect()
    return found.result()


def resumable(stored: Plan, config: Config, model: Model, output: str) -> list[str]:
    """Refuse what isn't the stored run; returns names of inputs that appeared since it was planned."""
    plan.refuse_drift(stored, ingredients(config, model, stored), output)
    return plan.check_inputs(stored, config)


def ingredients(config: Config, model: Model, before: Plan) -> dict[str, str]:
    """What decides this run's answers if it serves the scheme that a run before it came to from the same settings."""
    asked, served = config.quantization.scheme, Scheme(before.quantization)
    fallen = config.gate.enabled and served in (config.gate.fallback or LADDER)
    return plan.ingredients(config, model.digest, served if asked is Scheme.auto or fallen else asked)


def choose_again(config: Config, reused: Plan, model: Model, here: Hardware) -> Choice:
    """The scheme of the run whose answers are reused, and no other. Raises ConfigError as `choose` does."""
    asked = dataclasses.replace(config.quantization, scheme=Scheme(reused.quantization))
    choice = choose(dataclasses.replace(config, quantization=asked), None, model, here)
    return dataclasses.replace(choice, why="as in the run whose answers are reused", fallback=())


def choose(config: Config, stored: Plan | None, model: Model, here: Hardware) -> Choice:
    """The scheme, why, and what is tried after it; a resume keeps the stored run's. Raises ConfigError if the model
    can't be served so, or doesn't fit."""
    auto = config.quantization.scheme is Scheme.auto
    if stored:
        return Choice(Scheme(stored.quantization), "as this run was planned", ())
    if config.engine.kind is EngineKind.fake and auto:
        return Choice(Scheme.none, "the fake engine reads no weights", ())
    if config.quantization.kv_cache is KvCache.fp8 and (here.capability or (0, 0)) < FACTS[Scheme.fp8].since:
        raise ConfigError("quantization.kv_cache=fp8: takes a GPU that computes in FP8; choose auto")
    fit = Fit(model, here, config)
    choice = fit.choose()
    if config.engine.kind is EngineKind.vllm:
        require_memory(fit.memory(choice.scheme), choice.scheme, here, config)
    return choice


def settle(
    config: Config,
    stored: Plan | None,
    draft: Plan,
    model: Model,
    choice: Choice,
    pool: Pool,
    here: Hardware,
    invocation: ledger.Invocation,
    stop: threading.Event,
    show: Progress,
) -> tuple[Plan, Checkpoint, list[Verdict]]:
    """Quantize and judge, rung by rung, until one keeps the wanted quality: (plan, what is served, all verdicts).

    Raises GateRefused when none does.
    """
    verdicts: list[Verdict] = []
    why = choice.why
    for scheme in (choice.scheme, *choice.fallback):
        if scheme is not choice.scheme:
            draft = plan.make(config, model.digest, scheme, checkpoint="")
        show.step(f"{len(draft.objects)} input objects in {len(draft.shards)} shards · {scheme.value}: {why}")
        checkpoint = quantized(config, draft, model, scheme, here, invocation, show, stop)
        if stored:
            return draft, checkpoint, []  # it was judged before it was planned
        verdict = gate.judged(config, draft, model, scheme, checkpoint, pool, here, invocation, stop, show)
        if verdict is None:
            return draft, checkpoint, verdicts
        verdicts.append(verdict)
        show.step(f"gate: {verdict.words()}")
        if verdict.accepts(config.gate.strict):
            return draft, checkpoint, verdicts
        pool.release()
        why = f"{scheme.value} costs too much quality"
    tried = "; ".join(f"{v.scheme} keeps {v.recovery:.1%} of {v.measure}" for v in verdicts)
    raise GateRefused(
        f"no scheme that fits keeps gate.recovery={config.gate.recovery}: {tried}. "
        "Lower it, name others in gate.fallback, or give the model more memory"
    )


def note_work(
    config: Config, fixed: Plan, model: Model, here: Hardware, spec: WorkerSpec, invocation: ledger.Invocation
) -> None:
    """Tell the record what a token takes and what a device can do, for MFU and, where text is generated, MBU. Not of a
    model that came quantized: its matrices aren't told apart from their scales here, nor what they are multiplied in.
    """
    if config.engine.kind is not EngineKind.vllm or model.quantized:
        return
    fit, scheme, engine = Fit(model, here, config), Scheme(fixed.quantization), spec.engine
    invocation.flop_per_token = 2.0 * capacity.linear_parameters(fit.tensors, fit.shape)
    invocation.peak_flops = forecast.peak(here.accelerator, scheme)
    if answers.of(config.task).decodes and "speculative_config" not in engine.options:
        # A step reads the weights for one token of each row in flight. A speculated one may be worth several tokens.
        weights = capacity.linear_bytes(fit.tensors, fit.shape, scheme, fit.ignore, fit.group(scheme))
        element = 2 if engine.options.get("kv_cache_dtype", "auto") == "auto" else 1
        invocation.bytes_per_generated = weights / min(spec.in_flight, engine.max_num_seqs)
        invocation.bytes_per_recalled = capacity.kv_bytes_read(fit.shape, engine.max_model_len, element)
        invocation.peak_bandwidth = forecast.bandwidth(here.accelerator)


def quantized(
    config: Config,
    draft: Plan,
    model: Model,
    scheme: Scheme,
    here: Hardware,
    invocation: ledger.Invocation | None,
    show: Progress,
    stop: threading.Event | None = None,
) -> Checkpoint:
    """The checkpoint that is served: the draft's, if it names one and the cache has it; otherwise the one that follows
    from the configuration, from the cache or made now; or the model as it is.

    Raises Stopped at the next layer after `stop` was set.
    """
    began = time.monotonic()
    if scheme is not Scheme.none:
        show.step(f"quantizing {model.name} to {scheme.value}, unless it is cached")
    log = models.cache_dir() / "logs" / config.job.name / "quantize.log"

    def prompts() -> list[list[int]]:
        task = Task(
            config.task, models.open_tokenizer(model.path, model.trusted), draft.columns, config.model.chat_template
        )
        return sample.calibration(config, draft, task)

    def on_progress(words: str) -> None:
        if stop and stop.is_set():
            raise Stopped("stopped while the model was quantized; nothing was labelled yet")
        show.update(words)

    if draft.checkpoint and (kept := quantize.kept(model, draft.checkpoint, config.quantization, show.update)):
        return kept  # not calibrated again on rows that may be others by now
    checkpoint = quantize.quantize(model, scheme, config.quantization, prompts, log, on_progress=on_progress)
    if invocation and not checkpoint.cached and scheme is not Scheme.none:
        devices = len(here.gpus) or len(here.cores)
        spent = {"quantize": round(time.monotonic() - began, 3)}
        invocation.spent(account.ReplicaAccount(here.accelerator, devices, spent))
    return checkpoint


def worker_spec(config: Config, fixed: Plan, checkpoint: Checkpoint, here: Hardware) -> WorkerSpec:
    config, _ = tune.settled(config, fixed, checkpoint.path, checkpoint.bytes, here)
    engine = capacity.engine_spec(config, checkpoint.path, checkpoint.bytes, here)
    return WorkerSpec(
        plan=dataclasses.replace(fixed, shards=()),
        task=config.task,
        engine=engine,
        output=storage.normalize(config.output.path),
        chat_template=config.model.chat_template,
        in_flight=config.engine.in_flight or 2 * engine.max_num_seqs,
        spill_seconds=config.cluster.spill_seconds,
        stall_seconds=config.engine.stall_timeout_s,
        quarantine=config.input.unreadable is Unreadable.quarantine,
    )


def label(
    config: Config,
    fixed: Plan,
    model: Model,
    checkpoint: Checkpoint,
    pool: Pool,
    here: Hardware,
    invocation: ledger.Invocation,
    budget: Budget,
    stop: threading.Event,
    show: Progress,
) -> None:
    """Label every shard that isn't committed yet. Raises Stopped early if `stop` is set or the budget is spent."""
    output = storage.normalize(config.output.path)
    before = plan.standing(fixed, output)
    show.step(f"labelling {len(before.remaining)} of {len(fixed.shards)} shards; engines start (logs: {pool.logs})")
    invocation.close("running")
    invocation.reached("checkpoint")
    pool.connect()
    invocation.reached("ray")
    rows_before = sum(r.usage.rows for r in before.receipts)
    failures_before = sum(r.usage.failures for r in before.receipts)
    expected = sample.expected_rows(fixed, config.input.limit)
    whole = any(shard.unit == "stream" for shard in fixed.shards)  # files, of as many rows as each happens to have
    by_rows = whole or config.input.limit is not None
    done_before = rows_before / max(1, expected or 0) if by_rows else 1 - len(before.remaining) / len(fixed.shards)
    first: list[float] = []  # when the first row was answered
    rows = 0  # answered by this invocation
    spent = False  # the budget

    def on_progress(state: State) -> None:
        nonlocal rows, spent
        rows = state.live_rows
        invocation.update(state.accounts, state.lost_replicas)
        for what, at in state.reached.items():
            invocation.reached(what, at)
        if state.live_rows and not first:
            first.append(time.monotonic())
        elapsed = time.monotonic() - first[0] if first else 0.0
        share: float | None = None
        if expected is not None and by_rows:
            share = min(0.99 if whole else 1.0, (rows_before + state.live_rows) / max(1, expected))
        elif expected is not None:
            shards_done = len(fixed.shards) - len(before.remaining) + state.committed_shards
            rows_of_shard = (rows_before + state.committed_rows) / max(1, shards_done) or expected / len(fixed.shards)
            share = min(1.0, done_before + state.live_rows / rows_of_shard / len(fixed.shards))
        now = invocation.account("running")
        if state.committed_shards < len(before.remaining) and not stop.is_set() and budget.spent(now):
            show.step("the budget is spent; rows in flight are finished and kept")
            spent = True
            stop.set()
        failures = failures_before + state.live_failures
        rows_now = rows_before + state.live_rows
        money = budget.so_far(now)
        line = progress.labelling(rows_now, failures, share, elapsed, state.live_tokens, state.phases, money)
        show.update(line + progress.eta(share, done_before, elapsed), share)

    spec = worker_spec(config, fixed, checkpoint, here)
    note_work(config, fixed, model, here, spec, invocation)
    try:
        pool.label(spec, before.remaining, here, stop, on_progress, show.step)
    except Stopped:
        if spent:
            raise Stopped(budget.words(invocation.account("stopped"))) from None
        raise
    estimate.remember(config, fixed, here, invocation.account("complete").replicas, rows)
    if missing := len(plan.standing(fixed, output).remaining):
        raise BatchqError(
            f"{output}: {missing} shards were labelled but don't stand there; "
            "on several nodes output.path has to be an object store or a folder that all of them share"
        )


def limited(config: Config, rows: int) -> Config:
    """The same job on its first rows."""
    limit = min(rows, config.input.limit or rows)
    return dataclasses.replace(config, input=dataclasses.replace(config.input, limit=limit))


def checkpoint_only(config: Config) -> str:
    """`batchq quantize`: make the checkpoint or find it; returns a line that says where it is."""
    check(config)
    show = Progress()
    model, here = models.resolve(config.model), hardware.detect()
    choice = choose(config, None, model, here)
    scheme, why = choice.scheme, choice.why
    draft = plan.make(config, model.digest, scheme, checkpoint="")
    made = quantized(config, draft, model, scheme, here, None, show)
    show.clear()
    before, after = capacity.stored_bytes(capacity.read_tensors(model.path)), made.bytes
    how = "as it is" if scheme is Scheme.none else "from the cache" if made.cached else f"made in {made.seconds:.0f} s"
    if scheme is not Scheme.none and (peaks := quantize.read_card(made).get("peak_bytes")):
        how += ", at most " + " and ".join(f"{capacity.gib(n)} of {where} memory" for where, n in peaks.items())
    return f"{scheme.value}: {why}\n{model.name}: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB, {how}\n{made.path}"


def tuned(config: Config, stop: threading.Event) -> str:
    """`batchq tune`: find this job's fastest engine settings and keep them; writes nothing to output.path."""
    check(config)
    show = Progress()
    stored = plan.load(storage.normalize(config.output.path))
    model = models.resolve(config.model)
    cluster = dataclasses.replace(config.cluster, max_attempts=1)  # settings that lose their engine have lost
    with Pool(cluster, config.engine, models.cache_dir() / "logs" / config.job.name) as pool:
        here = pool.hardware()
        choice = choose(config, stored, model, here)
        draft = stored or plan.make(config, model.digest, choice.scheme, checkpoint="")
        checkpoint = quantized(config, draft, model, choice.scheme, here, None, show, stop)
        return tune.sweep(config, draft, checkpoint, pool, here, stop, show)


class _Callable(types.ModuleType):
    """Lets `batchq.run(config)` work although `batchq.run` is also this module."""

    def __call__(self, config: Config, stop: threading.Event | None = None) -> Result:
        return run(config, stop)


sys.modules[__name__].__class__ = _Callable
