"""The main path: plan -> quantize and gate -> label -> account -> report."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass

from batchq import input
from batchq.account.budget import Budget
from batchq.account.events import Kind
from batchq.config import Config, Scheme
from batchq.errors import BatchqError, Changed, ConfigError, OtherDriver, OutputTaken, Stopped, StorageError, words_of
from batchq.job.deadline import deadline_of
from batchq.job.label import label
from batchq.job.publish import is_due, publish
from batchq.job.scheme import choose_checkpoint, choose_scheme
from batchq.job.served import Served, serve
from batchq.job.session import Session, open_session, state_after
from batchq.model.scheme import fallback_after
from batchq.model.source import Model, resolve_for
from batchq.output import layout
from batchq.output.lease import Lease
from batchq.plan import draft, warnings
from batchq.plan.committed import Committed, read_committed
from batchq.plan.draft import make_plan
from batchq.plan.inputs import check_inputs, left_out_words, obeyed
from batchq.plan.source import Source, last_source, named_source, where, with_reuse
from batchq.plan.stored import KEYED, differing, load_plan, refuse_drift, refuse_other, store_plan
from batchq.records import Plan
from batchq.report.outcome import Result, exit_code, finish, unfinished
from batchq.sizing.fit import Choice

CACHED_WITHIN_SECONDS = 1.0  # seconds; a model that is cached resolves within that


def run(config: Config, stop: threading.Event | None = None) -> Result:
    """Do the job, or what is left of it. Set `stop` to end early; every answer is saved.

    Raises BatchqError (see errors.py) with one line for a person; nothing committed is lost by it.
    """
    with open_session(config, "run", stop) as session, deadline_of(session) as deadline:
        with session.traces.phase("model"):
            model = resolve_model(session)
        resume = find_resume(session, model)
        if resume and resume.complete:
            return nothing_to_do(session, resume)
        budget = Budget(config.pricing, session.output, session.hardware)
        deadline.require()
        session, source = find_source(session, model, resume)
        # What can be refused is refused before anything is written.
        with session.traces.phase("plan"):
            new = None if resume else plan_new(session, model, source)
        session.invocation.reached("plan")
        with only_driver(session), deadline.obeyed():
            if new:
                resume = find_resume(session, model)  # another driver may have planned it while this one waited
            if resume and resume.complete:
                publish(config, resume.plan, session.stop, session.progress.step)
                return nothing_to_do(session, resume)
            plan, served = go_on(session, model, resume) if resume else start_new(session, model, new)
            before = resume.committed if resume else read_committed(plan, session.output)
            session.events.emit(
                Kind.planned,
                inputs=len(plan.objects),
                shards=len(plan.shards),
                shards_left=len(before.remaining),
                scheme=plan.quantization,
                resumed=resume is not None,
            )
            committed = label(session, plan, served, before, budget, deadline)
            publish(config, plan, session.stop, session.progress.step)
            session.progress.clear()
            session.invocation.complete(exit_code(config, plan, committed))
            return completed(session, plan, committed, resume.new_inputs if resume else [])


@dataclass(frozen=True, slots=True)
class New:
    """A run that isn't stored yet. `draft` names a checkpoint where it has to be the one of a run that is reused."""

    draft: Plan
    choice: Choice


@dataclass(frozen=True, slots=True)
class Resume:
    """The run that this output holds: its plan, what is committed of it, and input files that appeared since."""

    plan: Plan
    committed: Committed
    new_inputs: list[str]

    @property
    def complete(self) -> bool:
        return not self.committed.remaining


def find_resume(session: Session, model: Model) -> Resume | None:
    """The run to go on with, if one is stored. Raises as `check_resume`."""
    plan = load_plan(session.output)
    if plan is None:
        return None
    new_inputs = check_resume(session.config, plan, model, session.output)
    return Resume(obeyed(plan, session.config), read_committed(plan, session.output), new_inputs)


def check_resume(config: Config, plan: Plan, model: Model, output: str) -> list[str]:
    """Names of input files that appeared since the plan. Raises OutputTaken or Changed if this isn't the stored run."""
    if config.output.incremental:  # what it reuses was chosen when it was planned
        config = with_reuse(config, plan.reuse)
    refuse_drift(plan, ingredients_after(config, model, plan), output)
    return check_inputs(plan, config)


def nothing_to_do(session: Session, resume: Resume) -> Result:
    if is_due(session.config, resume.plan):  # killed between the last commit and this, or asked for since
        with only_driver(session):
            publish(session.config, resume.plan, session.stop, session.progress.step)
    session.progress.step("all is committed; nothing to do")
    return completed(session, resume.plan, resume.committed, resume.new_inputs)


def completed(session: Session, plan: Plan, committed: Committed, new_inputs: list[str]) -> Result:
    """Account for it, and tell."""
    with session.traces.phase("report"):
        result = finish(session.config, plan, committed, new_inputs)
    counts = {name: result.summary[name] for name in ("rows", "answers", "failures", "cost", "currency")}
    report = layout.report(session.output, "html")
    session.events.emit(Kind.completed, exit_code=int(result.exit_code), **counts, report=report)
    return result


def find_source(session: Session, model: Model, resume: Resume | None) -> tuple[Session, Source | None]:
    """The run whose answers can be reused, if any; what output.incremental chose is output.reuse from then on.

    Raises ConfigError for an output.reuse that names no finished run; what output.incremental chose when a stored run
    was planned may be gone by now, which a warning says.
    """
    config, warn = session.config, session.progress.warn
    if not config.output.incremental:
        source = named_source(config)
    elif resume:
        config = with_reuse(config, resume.plan.reuse)
        try:
            source = named_source(config)
        except (ConfigError, StorageError) as error:
            warn(f"{error}. This run began with its answers; what is left of it is asked")
            source = None
        return dataclasses.replace(session, config=config), source
    else:
        source = last_source(config, warn)
        if source is None:
            none = f"no finished run of job {config.job.name} is in {where(config)}"
            session.progress.step(f"output.incremental: nothing to take over, {none}; all rows are asked")
    field = "incremental" if config.output.incremental else "reuse"
    if source and (others := differing(source.plan, ingredients_after(config, model, source.plan), KEYED)):
        warn(f"output.{field}: nothing can be reused of {source.output}, which has another {others}")
        source = None
    if config.output.incremental:
        session = dataclasses.replace(session, config=with_reuse(config, source.output if source else ""))
    return session, source


def plan_new(session: Session, model: Model, source: Source | None) -> New:
    """A draft of a new run. If it can reuse the answers of another run, it serves the same checkpoint as that one."""
    config = session.config
    if source is None:
        choice = choose_scheme(session, model)
        drafted = make_plan(config, model.digest, choice.scheme, checkpoint="")
        if left_out := left_out_words(drafted):
            session.progress.step(f"left out of the input: {left_out}")
        for warning in warnings.of_words(config, drafted):
            session.progress.warn(warning)
        return New(drafted, choice)
    former = source.plan
    same = dataclasses.replace(config.quantization, scheme=Scheme(former.quantization))
    asked = dataclasses.replace(session, config=dataclasses.replace(config, quantization=same))
    choice = choose_scheme(asked, model)
    fallback = choice.fallback if config.output.incremental else ()
    choice = dataclasses.replace(choice, why="as in the run whose answers are reused", fallback=fallback)
    drafted = make_plan(config, model.digest, choice.scheme, former.checkpoint)
    return New(dataclasses.replace(drafted, date=former.date or drafted.date), choice)


def start_new(session: Session, model: Model, new: New | None) -> tuple[Plan, Served]:
    """Quantize, judge, and store the plan; from then on the run can be resumed.

    Raises GateRefused, ConfigError if the checkpoint of the reused run can't be served any more, OutputTaken if another
    driver stored another plan meanwhile.
    """
    assert new is not None, "a run that isn't resumed was planned"
    if dialect := input.dialect_words(new.draft.objects):
        session.progress.step(f"csv: {dialect}")
    drafted, served, verdicts = choose_checkpoint(session, new.draft, model, new.choice)
    key = served.checkpoint.key
    if new.draft.checkpoint not in ("", key):
        config = session.config
        gone = f"its checkpoint {new.draft.checkpoint[:12]} isn't served any more"
        if drafted.quantization == new.draft.quantization:
            gone = f"its checkpoint {new.draft.checkpoint[:12]} isn't in quantization.cache any more"
        if not config.output.incremental:
            raise ConfigError(
                f"output.reuse={config.output.reuse}: {gone}, and the one made now, {key[:12]}, answers otherwise; "
                "bring it back, or leave output.reuse out"
            )
        session.progress.warn(
            f"output.incremental: nothing can be reused of {config.output.reuse}: {gone}; all rows are asked"
        )
        drafted = draft.without_reuse(drafted)
    judged = tuple(dataclasses.asdict(verdict) for verdict in verdicts)
    plan = store_plan(dataclasses.replace(drafted, checkpoint=key, verdicts=judged), session.output)
    refuse_other(plan, drafted, key, session.output)
    return plan, served


def go_on(session: Session, model: Model, resume: Resume) -> tuple[Plan, Served]:
    """What serves a stored run: its own checkpoint, which was judged before it was planned.

    Raises OutputTaken if that can't be had any more.
    """
    plan, scheme = resume.plan, Scheme(resume.plan.quantization)
    objects, shards = len(plan.objects), len(plan.shards)
    session.progress.step(f"{objects} input objects in {shards} shards · {scheme.value}: as this run was planned")
    served = serve(session, plan, model, scheme)
    refuse_other(plan, plan, served.checkpoint.key, session.output)
    return plan, served


def ingredients_after(config: Config, model: Model, before: Plan) -> dict[str, str]:
    """The ingredients of this run if it serves the scheme that an earlier run with the same settings came to."""
    asked, served = config.quantization.scheme, Scheme(before.quantization)
    may_have_fallen_back = config.gate.enabled and served in fallback_after(asked, config.gate.fallback)
    scheme = served if asked is Scheme.auto or may_have_fallen_back else asked
    return draft.ingredients(config, model.digest, scheme)


@contextmanager
def only_driver(session: Session) -> Iterator[None]:
    """Hold the lease on the output. Raises OtherDriver if another one has it, or takes it over meanwhile.

    If no plan was stored in the end, the lease is deleted: this driver leaves only the record of what it held, and the
    report.
    """
    invocation = session.invocation
    lease = Lease(session.output, session.progress.step, session.stop, lost=session.stop, run=invocation.id)
    try:
        invocation.take_over()
        if invocation.verb == "run":
            invocation.watch()
        yield
    except BaseException as error:
        session.progress.clear()
        ending = error
        if isinstance(error, Stopped) and lease.taken_by:
            ending = OtherDriver(
                f"{session.output}: {lease.taken_by} has taken over, so this one left; nothing is lost"
            )
        # Before the lease is over: who waits for that finds how it ended.
        invocation.fail(state_after(ending), ending)
        if (
            invocation.verb == "run"
            and invocation.recorded
            and not isinstance(ending, (OutputTaken, Changed, OtherDriver))
        ):
            report_early_end(session, ending)
        lease.close(forget=load_plan(session.output) is None)
        if ending is not error:
            raise ending from None
        raise
    lease.close()


def report_early_end(session: Session, ending: BaseException) -> None:
    """Leave the report of a run that ends early; who prints the error prints that too."""
    try:
        result = unfinished(session.config)
    except (BatchqError, OSError) as error:
        session.progress.warn(f"this run leaves no report: {words_of(error)}")
        return
    if isinstance(ending, BatchqError):
        ending.report = result.text


def resolve_model(session: Session) -> Model:
    """The job's model. While it is fetched or converted, which takes 22 s for the demo's on two cores, Ray starts."""
    fetched: Future[Model] = Future()

    def fetch() -> None:
        try:
            fetched.set_result(resolve_for(session.config))
        except BaseException as error:  # it is raised where the model is awaited
            fetched.set_exception(error)

    threading.Thread(target=fetch, name="batchq-model", daemon=True).start()
    wait([fetched], CACHED_WITHIN_SECONDS)
    if not fetched.done():
        session.progress.step(f"model {session.config.model.path}: fetched or converted, unless it is cached")
        session.pool.connect()
    while not wait([fetched], CACHED_WITHIN_SECONDS).done:
        if session.stop.is_set():
            raise Stopped("stopped while the model was fetched; nothing was labelled yet")
    model = fetched.result()
    session.invocation.reached("model")
    return model
