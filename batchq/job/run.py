"""The main path: plan -> quantize and gate -> label -> account -> report."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass

from batchq import models
from batchq.budget import Budget
from batchq.config import Config, Scheme
from batchq.errors import ConfigError, Stopped
from batchq.fit import Choice
from batchq.job.label import label
from batchq.job.scheme import choose_checkpoint, choose_scheme
from batchq.job.served import Served
from batchq.job.session import Session, open_session
from batchq.models import Model
from batchq.outcome import Result, finish
from batchq.output.lease import Lease
from batchq.plan import draft
from batchq.plan.committed import Committed, read_committed, source_plan
from batchq.plan.draft import make_plan
from batchq.plan.stored import KEYED, check_inputs, differing, load_plan, refuse_drift, refuse_other, store_plan
from batchq.records import Plan
from batchq.scheme import LADDER

MOMENT = 1.0  # seconds in which a model that is there already is found


def run(config: Config, stop: threading.Event | None = None) -> Result:
    """Do the job, or what is left of it. Set `stop` to end early with everything answered kept.

    Raises BatchqError (see errors.py) with one line for a person; nothing committed is lost by it.
    """
    with open_session(config, "run", stop) as session:
        model = resolve_model(session)
        resume = find_resume(session, model)
        if resume and resume.complete:
            session.progress.step("all is committed; nothing to do")
            return finish(config, resume.plan, resume.committed, model.name, resume.new_inputs)
        budget = Budget(config.pricing, session.output, session.hardware)
        # What can be refused is refused before anything is written.
        source = source_plan(config)
        choice, drafted = (None, resume.plan) if resume else plan_new(session, model, source)
        session.invocation.reached("plan")
        with only_driver(session):
            if resume is None and (resume := find_resume(session, model)):  # of the driver that this one waited for
                drafted, choice = resume.plan, None
                if resume.complete:
                    session.progress.step("all is committed by now; nothing to do")
                    return finish(config, resume.plan, resume.committed, model.name, resume.new_inputs)
            choice = choice or choose_scheme(session, model, resume.plan if resume else None)
            drafted, served, verdicts = choose_checkpoint(session, drafted, model, choice, judge=resume is None)
            judged = tuple(dataclasses.asdict(verdict) for verdict in verdicts)
            made = dataclasses.replace(drafted, checkpoint=served.checkpoint.key, verdicts=judged)
            if resume is None:
                refuse_other_source(config, source, served)
            plan = resume.plan if resume else store_plan(made, session.output)
            refuse_other(plan, drafted, served.checkpoint.key, session.output)
            before = resume.committed if resume else read_committed(plan, session.output)
            committed = label(session, plan, served, before, budget)
            session.progress.clear()
            session.invocation.close("complete")
            return finish(config, plan, committed, model.name, resume.new_inputs if resume else [])


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
    return Resume(plan, read_committed(plan, session.output), new_inputs)


def check_resume(config: Config, plan: Plan, model: Model, output: str) -> list[str]:
    """Names of input files that appeared since the plan. Raises OutputTaken or Changed if this isn't the stored run."""
    refuse_drift(plan, ingredients_after(config, model, plan), output)
    return check_inputs(plan, config)


def plan_new(session: Session, model: Model, source: Plan | None) -> tuple[Choice, Plan]:
    """A draft of a new run, which serves what the run served whose answers are reused, if they can be."""
    config, reuse = session.config, session.config.output.reuse
    if source and (others := differing(source, ingredients_after(config, model, source), KEYED)):
        session.progress.step(f"output.reuse: nothing can be reused of {reuse}, which has another {others}")
        source = None
    if source is None:
        choice = choose_scheme(session, model, None)
        return choice, make_plan(config, model.digest, choice.scheme, checkpoint="")
    same = dataclasses.replace(config.quantization, scheme=Scheme(source.quantization))
    asked = dataclasses.replace(session, config=dataclasses.replace(config, quantization=same))
    choice = choose_scheme(asked, model, None)
    choice = dataclasses.replace(choice, why="as in the run whose answers are reused", fallback=())
    return choice, make_plan(config, model.digest, choice.scheme, source.checkpoint)


def refuse_other_source(config: Config, source: Plan | None, served: Served) -> None:
    """Raises ConfigError if the checkpoint that answered the reused run can't be served any more."""
    if source and served.checkpoint.key != source.checkpoint:
        raise ConfigError(
            f"output.reuse={config.output.reuse}: its checkpoint {source.checkpoint[:12]} isn't in "
            f"quantization.cache any more, and the one made now, {served.checkpoint.key[:12]}, answers otherwise; "
            "bring it back, or leave output.reuse out"
        )


def ingredients_after(config: Config, model: Model, before: Plan) -> dict[str, str]:
    """What decides this run's answers if it serves the scheme that a run before it came to from the same settings."""
    asked, served = config.quantization.scheme, Scheme(before.quantization)
    fallen = config.gate.enabled and served in (config.gate.fallback or LADDER)
    return draft.ingredients(config, model.digest, served if asked is Scheme.auto or fallen else asked)


@contextmanager
def only_driver(session: Session) -> Iterator[None]:
    """Hold the lease on the output. Raises Stopped if another driver has it, or takes it over meanwhile.

    Without a plan in the end, the lease is forgotten: this driver leaves no trace but what it held.
    """
    lease = Lease(session.output, session.progress.step, session.stop, lost=session.stop)
    try:
        yield
    except BaseException as error:
        session.progress.clear()
        lease.close(forget=load_plan(session.output) is None)
        if isinstance(error, Stopped) and lease.taken_by:
            raise Stopped(
                f"{session.output}: {lease.taken_by} has taken over, so this one left; nothing is lost"
            ) from None
        raise
    lease.close()


def resolve_model(session: Session) -> Model:
    """The job's model. While it is fetched or converted, which takes 22 s for the demo's on two cores, Ray starts."""
    fetched: Future[Model] = Future()

    def fetch() -> None:
        try:
            fetched.set_result(models.resolve(session.config.model))
        except BaseException as error:  # it is raised where the model is awaited
            fetched.set_exception(error)

    threading.Thread(target=fetch, name="batchq-model", daemon=True).start()
    wait([fetched], MOMENT)
    if not fetched.done():
        session.progress.step(f"model {session.config.model.path}: fetched or converted, unless it is cached")
        session.pool.connect()
    model = fetched.result()
    session.invocation.reached("model")
    return model
