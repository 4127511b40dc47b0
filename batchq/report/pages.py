"""Summaries -> HTML pages without script, link or anything from elsewhere. Pure."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

from batchq.progress import visible
from batchq.report.facts import Summary, devices, efficiency, most_first, number, share, summary_lines
from batchq.report.survey import below, figures, prices, readable, totals, unreadable

MOST_NAMED = 1000  # files that a page names one by one

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2em auto; max-width: 64em }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse; width: 100% }
th, td { border-bottom: 1px solid #ddd; padding: .3em .8em .3em 0; text-align: left; vertical-align: top }
td { overflow-wrap: anywhere }
th { font-weight: 600 } td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
"""
# Nothing is fetched, run, sent or framed; the one style is known by its digest.
POLICY = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'"
)

Cell = str | int | float | None


def output_page(s: Summary) -> str:
    """One output's report as one HTML page: no script, no link, nothing from elsewhere."""
    phases, held = s["device_seconds"], sum(s["device_seconds"].values())
    sections = [
        _table(None, [], summary_lines(s)),
        _table(
            "Labels", ["label", "rows", "of all"], [[k, n, share(n / s["rows"], 1)] for k, n in most_first(s["labels"])]
        ),
        _table("Failures", ["code", "rows"], most_first(s["failures_by_code"])),
        _table(
            "Device-seconds",
            ["phase", "seconds", "of all"],
            [[p, v, share(v / held if held else None, 1)] for p, v in phases.items()],
        ),
        _table(
            "Invocations",
            [
                "started",
                "state",
                "devices",
                "wall seconds",
                "device-seconds",
                "tokens answered",
                "efficiency",
                s["currency"],
            ],
            [
                [
                    *(r["started"], r["state"], devices(r), r["wall_seconds"], sum(r["device_seconds"].values())),
                    *(r["tokens_answered"], efficiency(r), number(r["cost"], 4)),
                ]
                for r in s["runs"]
            ],
        ),
        _table(
            "Prices",
            ["per device-hour of", s["currency"]],
            [[name, None if price is None else f"{price:g}"] for name, price in s["prices"].items()],
        ),
        _table(
            "Quarantined",
            ["file", "why", "rows in the output"],
            _some([[q["name"], q["why"], q["rows"]] for q in s["quarantined"]]),
        ),
        _table("Files that appeared since the plan", ["file"], _some([[name] for name in s["new_inputs"]])),
    ]
    return _document(f"batchq · {s['job']} · {s['state']}", sections)


def survey_page(outputs: Sequence[Summary], prefix: str) -> str:
    """What is below a prefix as one HTML page."""
    heads = ["rows", "tokens", "cost", "per million tokens", "per thousand rows"]
    sections = [
        _table("By job", ["job", "outputs", *heads], [[s["job"], s["outputs"], *figures(s)] for s in totals(outputs)]),
        _table(
            "By output",
            ["job", "output", "state", *heads],
            [[s["job"], below(s["output"], prefix), s["state"], *figures(s)] for s in readable(outputs)],
        ),
        _table("Can't be read", ["output", "why"], [[s["output"], s["error"]] for s in unreadable(outputs)]),
        _table(None, [], [["prices", prices(outputs)]]),
    ]
    return _document(f"batchq · {prefix}", sections)


def _document(title: str, sections: Iterable[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{_text(title)}</h1>\n"
        + "".join(sections)
        + "</body>\n</html>\n"
    )


def _table(title: str | None, heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A section with one table; nothing where there are no rows."""
    if not rows:
        return ""
    head = f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in heads)}</tr>\n" if heads else ""
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return (f"<h2>{_text(title)}</h2>\n" if title else "") + f"<table>\n{head}{body}</table>\n"


def _cell(value: Cell) -> str:
    if isinstance(value, int | float):
        value = f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
        return f'<td class="n">{value}</td>'
    return f"<td>{_text('-' if value is None else value)}</td>"


def _text(text: str) -> str:
    return escape(visible(text))


def _some(rows: list[list[Cell]]) -> list[list[Cell]]:
    if len(rows) <= MOST_NAMED:
        return rows
    return [*rows[:MOST_NAMED], [f"and {len(rows) - MOST_NAMED:,} more; meta/report.json names them"]]
