"""Summaries -> HTML pages without script, link or anything from elsewhere. Pure, but for reading templates/ once."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import jinja2

from batchq.machine.progress import visible
from batchq.report import drawing, facts, survey
from batchq.report.facts import Summary, number

WHY_NOTE = "Paid once: more rows of the same job with the same model don't pay for it again while it is cached."
FOOTER = (
    "Counted is every second that an engine, or the process that quantizes, held its devices, answers that were thrown "
    "away included. Not counted: the rest of the machine's time, storage, and the network. Times are UTC."
)
FILES_NAMED = 1000  # files that a page names one by one

Cell = str | int | float | None
Row = Sequence[Cell]


def output_page(s: Summary) -> str:
    """One output's report."""
    per_million = s["cost_per_million_tokens"] is not None
    return _render(
        "output.html.j2",
        title=facts.title(s),
        job=s["job"],
        chips=drawing.chips(s),
        head=_head(s),
        figures=drawing.figures(s),
        currency=s["currency"],
        why=f"Why {'a million tokens cost' if per_million else 'the run cost'} what it did, in {s['currency']}",
        waterfall=drawing.waterfall(s),
        why_note=WHY_NOTE if drawing.once(drawing.costs(s)) else "",
        phases=drawing.phases(s),
        stack=drawing.stack(s["device_seconds"]),
        tokens=drawing.tokens(s),
        budget_title=f"Budget, in {s['currency']}",
        budget=drawing.budget(s),
        labels=drawing.counted(s["labels"], s["rows"], "label"),
        failures=drawing.counted(s["failures_by_code"], s["rows"], "bad"),
        lanes=drawing.invocations(s) if len(s["runs"]) > 1 else [],
        lines=facts.summary_lines(s),
        invocations=[_invocation(run) for run in s["runs"]],
        prices=[
            (name, s["rates"].get(name, ""), None if price is None else f"{price:g}")
            for name, price in s["prices"].items()
        ],
        quarantined=_first([(q["name"], q["why"], q["rows"]) for q in s["quarantined"]]),
        new_inputs=_first([(name,) for name in s["new_inputs"]]),
        footer=FOOTER,
    )


def survey_page(outputs: Sequence[Summary], prefix: str) -> str:
    """The outputs below a prefix, and their sums."""
    return _render(
        "survey.html.j2",
        title=f"batchq · {prefix}",
        prices=survey.prices(outputs),
        totals=[(s["job"], s["outputs"], *survey.figures(s)) for s in survey.totals(outputs)],
        outputs=[
            (s["job"], survey.below(s["output"], prefix), s["state"], *survey.figures(s))
            for s in survey.readable(outputs)
        ],
        unreadable=[(s["output"], s["error"]) for s in survey.unreadable(outputs)],
    )


def as_shown(value: Any) -> Any:
    """What a template writes for a value, whatever the template asks for: a dash for None, a number in its digits, and
    text so that nothing hides in it. Jinja escapes it after this; what has been through it (a macro's result) says so
    by `__html__` and stays."""
    if hasattr(value, "__html__"):
        return value
    if value is None:
        return "-"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
    return visible(str(value))


@cache
def environment() -> jinja2.Environment:
    """The templates, compiled as they are first used. A name that a template lacks is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("batchq.report"),
        autoescape=True,
        finalize=as_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


@cache
def _style_digest() -> str:
    style = environment().get_template("style.css").render()
    return base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()


def _render(template: str, **values: Any) -> str:
    return environment().get_template(template).render(values, style_digest=_style_digest())


def _head(s: Summary) -> list[str]:
    """What ran, when and at which prices."""
    when = facts.period(s["runs"])
    dated = f"prices of {s['prices_as_of'] or 'no date'}"
    return [
        " · ".join(filter(None, [when, s["date"] or "", facts.devices(s), dated])),
        f"{s['model']} · {s['quantization']}: {s['why']}",
    ]


def _invocation(run: Summary) -> Row:
    seconds = sum(run["device_seconds"].values())
    return [
        *(facts.moment(run["started"]), facts.ended(run), facts.devices(run), facts.efficiency(run)),
        *(run["wall_seconds"], seconds, run["tokens_answered"], number(run["cost"], 4)),
    ]


def _first(rows: Sequence[Row]) -> Sequence[Row]:
    if len(rows) <= FILES_NAMED:
        return rows
    return [*rows[:FILES_NAMED], [f"and {len(rows) - FILES_NAMED:,} more; meta/report.json names them"]]
