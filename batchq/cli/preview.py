"""`batchq preview`: the first rows, prompt and answer side by side, from the real engine; labels nothing."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from batchq import input
from batchq.config import Config, Scheme
from batchq.engine.protocol import Completion, EngineSpec, Prompt
from batchq.errors import RowError
from batchq.job.scheme import choose_scheme
from batchq.job.served import serve
from batchq.job.session import Session, open_session
from batchq.model.scheme import SCHEMES
from batchq.model.source import resolve_for
from batchq.plan.draft import make_plan
from batchq.pool import SampleListener, SampleRequest
from batchq.records import Failure, Row
from batchq.task.task import Task, open_task
from batchq.worker.batch import too_long

ROWS = 5  # previewed unless input.limit says otherwise
LOG = "preview.log"


@dataclass(frozen=True, slots=True)
class Shown:
    """One row: what it asks, or why it can't be asked."""

    row: Row
    message: str
    prompt: Prompt
    failure: Failure | None


def preview(config: Config) -> str:
    """Ask the first rows; returns them in words. Shows row text, because that is what was asked for."""
    first = dataclasses.replace(config.input, limit=config.input.limit or ROWS)
    config = dataclasses.replace(config, input=first)
    with open_session(config, "preview") as session:
        model = resolve_for(config)
        scheme = choose_scheme(session, model).scheme
        # A look at the prompt isn't worth minutes of calibration.
        shown_scheme = Scheme.none if SCHEMES[scheme].calibrated else scheme
        drafted = make_plan(config, model.digest, shown_scheme, "")
        served = serve(session, drafted, model, shown_scheme)
        task = open_task(config, model.path, drafted)
        rows = [row for shard in drafted.shards for row in input.rows_of(drafted, shard, drafted.columns)]
        shown = [_shown(task, row, config.engine.max_model_len) for row in rows]
        asked = [each.prompt for each in shown if each.failure is None]
        session.progress.step(f"the engine starts (log: {session.pool.logs / LOG})")
        request = SampleRequest(asked, task.sampling, served.settings.in_flight, log=LOG)
        answers = iter(_ask(session, served.settings.engine, request) if asked else [])
    lines = [_words(task, each, each.failure or next(answers)) for each in shown]
    if shown_scheme is not scheme:
        lines.append(f"from the unquantized model; the run quantizes to {scheme.value}")
    return "\n\n".join(lines)


def _ask(session: Session, engine: EngineSpec, request: SampleRequest) -> list[Completion | Failure]:
    invocation = session.invocation
    listener = SampleListener(lambda _: None, session.progress.warn, invocation.hold, invocation.add)
    answers, _ = session.pool.answer_sample(engine, request, session.hardware, session.stop, listener)
    return answers


def _shown(task: Task, row: Row, max_model_len: int) -> Shown:
    try:
        if row.error:
            raise RowError(*row.error)
        message = task.render(row.columns)
    except RowError as error:
        return Shown(row, "", Prompt([]), Failure(error.code, error.message))
    longest = max_model_len - task.sampling.max_tokens
    if task.exceeds(message, longest):
        return Shown(row, "", Prompt([]), too_long(None, longest))
    prompt = task.encode([message], [row.id])[0]
    return Shown(row, message, prompt, too_long(len(prompt), longest) if len(prompt) > longest else None)


def _words(task: Task, shown: Shown, answer: Completion | Failure) -> str:
    head = f"── {shown.row.id} " + "─" * max(3, 76 - len(shown.row.id))
    try:
        if isinstance(answer, Failure):
            raise RowError(answer.code, answer.message)
        columns = task.answer(answer).columns
    except RowError as error:
        return f"{head}\n── no answer ({error.code})\n{error.message}"
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in columns.items()}
    words = json.dumps(rounded, ensure_ascii=False, default=lambda v: v)
    return f"{head}\n{task.framed(shown.message)}\n── answer ({len(shown.prompt)} prompt tokens)\n{words}"
