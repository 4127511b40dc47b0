"""Summaries -> HTML pages without script, link or anything from elsewhere. Pure, but for reading templates/ once."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import jinja2

from batchq.machine.progress import visible
from batchq.report import facts, survey
from batchq.report.facts import Summary, number, share

FILES_NAMED = 1000  # files that a page names one by one

Cell = str | int | float | None
Row = Sequence[Cell]


def output_page(s: Summary) -> str:
    """One output's report."""
    phases, held = s["device_seconds"], sum(s["device_seconds"].values())
    return _render(
        "output.html.j2",
        title=facts.title(s),
        currency=s["currency"],
        lines=facts.summary_lines(s),
        labels=[(label, count, share(count / s["rows"], 1)) for label, count in facts.most_first(s["labels"])],
        failures=facts.most_first(s["failures_by_code"]),
        phases=[(phase, v, share(v / held if held else None, 1)) for phase, v in phases.items()],
        invocations=[_invocation(run) for run in s["runs"]],
        prices=[(name, None if price is None else f"{price:g}") for name, price in s["prices"].items()],
        quarantined=_first([(q["name"], q["why"], q["rows"]) for q in s["quarantined"]]),
        new_inputs=_first([(name,) for name in s["new_inputs"]]),
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


def _invocation(run: Summary) -> Row:
    seconds = sum(run["device_seconds"].values())
    return [
        *(run["started"], facts.ended(run), facts.devices(run), facts.efficiency(run)),
        *(run["wall_seconds"], seconds, run["tokens_answered"], number(run["cost"], 4)),
    ]


def _first(rows: Sequence[Row]) -> Sequence[Row]:
    if len(rows) <= FILES_NAMED:
        return rows
    return [*rows[:FILES_NAMED], [f"and {len(rows) - FILES_NAMED:,} more; meta/report.json names them"]]
