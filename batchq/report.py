"""Accounts -> what a person reads: lines for a terminal, one HTML page, CSV. Pure: takes numbers, returns text.

Reports are inert. Names and messages come from inputs, models and configurations of others, so no character of them
is obeyed by a terminal, a browser or a spreadsheet.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from batchq.account import PHASES
from batchq.progress import visible

LOW_MASS = 0.5  # below this the labels held less than half of the model's probability
MOST_NAMED = 1000  # files that a page names one by one
ADDED = (
    *("rows", "answers", "failures", "prompt_tokens", "cached_tokens", "output_tokens"),
    *("billed_tokens", "billed_rows", "invocations"),
)

Summary = Mapping[str, Any]  # of one output: outcome.summarise's, or ledger.survey's


def terminal(summary: Summary) -> str:
    """A dozen lines for a terminal, from `outcome.finish`'s summary."""
    head = f"batchq · {summary['job']} · {summary['state']}"
    return "\n".join([visible(head), *(f"  {name:<11}{visible(text)}" for name, text in facts(summary))])


def written(summary: Summary) -> dict[str, str]:
    """The same as files, by their ending."""
    return {
        "html": page(summary),
        "csv": spreadsheet(summary),
        "json": json.dumps(summary, indent=1, allow_nan=False),
    }


def written_of_many(found: Sequence[Summary], where: str) -> dict[str, str]:
    """What stands below a prefix, as files, by their ending."""
    return {
        "html": page_of_many(found, where),
        "csv": spreadsheet_of_many(found),
        "json": json.dumps({"outputs": list(found), "totals": totals(found)}, indent=1, allow_nan=False),
    }


def facts(s: Summary) -> list[tuple[str, str]]:
    """Name and words of what is worth a line."""
    lines = [
        ("model", f"{s['model']} · {s['quantization']}: {s['why']}"),
        ("rows", f"{s['rows']:,} = {s['answers']:,} answers + {s['failures']:,} failures{_codes(s)}"),
    ]
    if s["labels"]:
        lines.append(("labels", " · ".join(f"{label} {count:,}" for label, count in _falling(s["labels"]))))
    if s["accuracy"] is not None:
        lines.append(("accuracy", f"{s['accuracy']:.3f} against gold on {s['gold_rows']:,} rows"))
    if s["mean_label_mass"] is not None:
        warning = "; low: left to itself, the model would say something else" if s["mean_label_mass"] < LOW_MASS else ""
        lines.append(
            ("label mass", f"{s['mean_label_mass']:.3f} of the model's probability was on the labels{warning}")
        )
    lines += [("gate", verdict["words"]) for verdict in s["gate"]]
    lines += [
        (
            "tokens",
            f"{s['prompt_tokens']:,} prompt ({s['cached_tokens']:,} cached) + {s['output_tokens']:,} generated",
        ),
        (
            "speed",
            f"{_number(s['tokens_per_second'])} tokens/s · {_number(s['rows_per_second'], 1)} rows/s per engine"
            f" · engine busy {_share(s['busy_share'], 1)} of the time after start-up",
        ),
    ]
    if used := efficiency(s):
        lines.append(("efficiency", used))
    lines += [
        (
            "seconds",
            " · ".join(f"{k} {v:,.1f}" for k, v in s["device_seconds"].items())
            + f" (device-seconds on {_devices(s) or 'none'})",
        ),
        ("cost", cost(s)),
    ]
    if s["duplicate_ids"]:
        lines.append(("note", f"{s['duplicate_ids']:,} values of {s['id_column']} occur more than once in the input"))
    for bad in s["quarantined"][:3]:
        lines.append(("quarantine", f"{bad['why']}; {bad['rows']:,} rows of it were read and are in the output"))
    if len(s["quarantined"]) > 3:
        lines.append(("quarantine", f"and {len(s['quarantined']) - 3} more files; meta/manifest.json names them"))
    if s["new_inputs"]:
        lines.append(
            (
                "note",
                f"{len(s['new_inputs'])} input files appeared since the plan and are not part of it: "
                f"{', '.join(s['new_inputs'][:3])}",
            )
        )
    if s["invocations"] > 1 or s["lost_replicas"] or s["reused_rows"]:
        lines.append(
            (
                "resumed",
                f"{s['invocations']} invocations, {s['lost_replicas']} replicas lost, "
                f"{s['reused_rows']:,} answers taken over from earlier attempts",
            )
        )
    if s["reuse"]:
        lines.append(("reused", f"{s['copied_rows']:,} answers of {s['reuse']}: copied, not asked, not billed"))
    lines.append(("output", f"{s['output']}/data · {s['parts']} objects · {s['output']}/meta/report.html .csv .json"))
    return lines


def cost(s: Summary) -> str:
    """Money, or why there is none."""
    if s["cost"] is None:
        return f"unknown: pricing has no price for {', '.join(s['unpriced'])}; add it under pricing.per_hour"
    sign = s["currency"]
    return (
        f"{s['cost']:.4f} {sign} = {_number(s['cost_per_million_tokens'], 4)} per million tokens"
        f" = {_number(s['cost_per_thousand_rows'], 4)} per thousand rows (prices of {s['prices_as_of'] or 'no date'})"
    )


def efficiency(s: Summary) -> str:
    """What was made of the accelerators, as far as it is known; nothing on a CPU."""
    words = [f"{name.upper()} {_share(s[name])}" for name in ("mfu", "mbu") if s[name] is not None]
    if s["joules_per_thousand_tokens"] is not None:
        words.append(f"{s['joules_per_thousand_tokens']:,.1f} J per 1,000 tokens")
    return " · ".join(words)


# ---- many outputs ----


def table(found: Sequence[Summary], where: str) -> str:
    """What stands below a prefix, for a terminal: a line per output, then a line per job and one for all."""
    lines = [["job", "output", "state", "rows", "tokens", "cost", "per 1M tokens", "per 1,000 rows"]]
    lines += [
        [s["job"], _below(s["output"], where), s["state"], *_figures(s)]
        if "error" not in s
        else ["?", _below(s["output"], where), "can't be read", "-", "-", "-", "-", "-"]
        for s in found
    ]
    count = len(lines)
    lines += [[s["job"], "", f"{s['outputs']} outputs", *_figures(s)] for s in totals(found)]
    shown = [[visible(cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in shown) for i in range(len(lines[0]))]
    text = [
        "  ".join(f"{c:<{w}}" if i < 3 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in shown
    ]
    text.insert(count, "")
    text += ["", visible(_prices(found))]
    text += [visible(s["error"]) for s in found if "error" in s]
    return "\n".join(line.rstrip() for line in text)


def totals(found: Sequence[Summary]) -> list[dict[str, Any]]:
    """Sums by job, by name, and over all; what can't be read is left out. A cost is None where one has no price."""
    good = [s for s in found if "error" not in s]
    jobs = sorted({s["job"] for s in good})
    groups = [(job, [s for s in good if s["job"] == job]) for job in jobs]
    return [_sum(job, members) for job, members in [*groups, ("all jobs", good)] if members]


def _sum(job: str, members: Sequence[Summary]) -> dict[str, Any]:
    sums: dict[str, Any] = {name: sum(s[name] for s in members) for name in ADDED}
    costs = [s["cost"] for s in members]
    whole = None if None in costs else sum(costs)
    return {
        "job": job,
        "outputs": len(members),
        **sums,
        **{name: members[0][name] for name in ("currency", "prices_as_of")},
        "cost": whole,
        "cost_per_million_tokens": _per(whole, 1e6, sums["billed_tokens"]),
        "cost_per_thousand_rows": _per(whole, 1e3, sums["billed_rows"]),
    }


def _per(whole: float | None, unit: float, count: int) -> float | None:
    return None if whole is None or not count else whole * unit / count


def _figures(s: Summary) -> list[str]:
    money = [_number(s[name], 4) for name in ("cost", "cost_per_million_tokens", "cost_per_thousand_rows")]
    return [f"{s['rows']:,}", f"{s['prompt_tokens'] + s['output_tokens']:,}", *money]


def _below(output: str, where: str) -> str:
    return output.removeprefix(where).strip("/") or output.rpartition("/")[2]


def _prices(found: Sequence[Summary]) -> str:
    good = [s for s in found if "error" not in s]
    if not good:
        return "nothing could be read"
    missing = sorted({name for s in good for name in s["unpriced"]})
    without = f"; no price for {', '.join(missing)}: add it under pricing.per_hour" if missing else ""
    return f"{good[0]['currency']}, at prices of {good[0]['prices_as_of'] or 'no date'}{without}"


# ---- HTML ----

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


def page(s: Summary) -> str:
    """One output's report as one HTML page: no script, no link, nothing from elsewhere."""
    phases, held = s["device_seconds"], sum(s["device_seconds"].values())
    sections = [
        _table(None, [], facts(s)),
        _table(
            "Labels", ["label", "rows", "of all"], [[k, n, _share(n / s["rows"], 1)] for k, n in _falling(s["labels"])]
        ),
        _table("Failures", ["code", "rows"], _falling(s["failures_by_code"])),
        _table(
            "Device-seconds",
            ["phase", "seconds", "of all"],
            [[p, v, _share(v / held if held else None, 1)] for p, v in phases.items()],
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
                    *(r["started"], r["state"], _devices(r), r["wall_seconds"], sum(r["device_seconds"].values())),
                    *(r["tokens_answered"], efficiency(r), _number(r["cost"], 4)),
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


def page_of_many(found: Sequence[Summary], where: str) -> str:
    """What stands below a prefix as one HTML page."""
    heads = ["rows", "tokens", "cost", "per million tokens", "per thousand rows"]
    good = [s for s in found if "error" not in s]
    sections = [
        _table("By job", ["job", "outputs", *heads], [[s["job"], s["outputs"], *_figures(s)] for s in totals(found)]),
        _table(
            "By output",
            ["job", "output", "state", *heads],
            [[s["job"], _below(s["output"], where), s["state"], *_figures(s)] for s in good],
        ),
        _table("Can't be read", ["output", "why"], [[s["output"], s["error"]] for s in found if "error" in s]),
        _table(None, [], [["prices", _prices(found)]]),
    ]
    return _document(f"batchq · {where}", sections)


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


# ---- CSV ----

# At the beginning, or after what a reader may take for a separator: spaces, quotes, and then what a formula begins
# with, wide and small forms included.
FORMULA = re.compile(r"((?:^|[;,|])[\s'\"]*)(?=[-=+@−＝＋－＠﹦﹢﹣﹫])")
SECONDS = tuple(f"{phase}_seconds" for phase in PHASES)
COLUMNS = (
    *("record", "job", "output", "model", "quantization", "invocation", "state", "started", "devices"),
    *("wall_seconds", *SECONDS, "lost_replicas", "rows", "answers", "failures"),
    *("prompt_tokens", "cached_tokens", "output_tokens", "tokens_answered", "billed_tokens", "billed_rows"),
    *("mfu", "mbu", "joules", "joules_per_thousand_tokens"),
    *("currency", "prices_as_of", "cost", "cost_per_million_tokens", "cost_per_thousand_rows"),
)
MANY_COLUMNS = (
    *("record", "job", "output", "quantization", "state", "started", "outputs", *ADDED[:6], "tokens_answered"),
    *("billed_tokens", "billed_rows", "invocations", "mfu", "mbu", "joules", "joules_per_thousand_tokens"),
    *("currency", "prices_as_of", "cost", "cost_per_million_tokens", "cost_per_thousand_rows", "error"),
)


def spreadsheet(s: Summary) -> str:
    """One output's costs as CSV: a line per invocation, and the total, which alone has rows and prices per unit:
    what was committed can't be told apart by invocations. Seconds by phase are device-seconds."""
    same = {name: s[name] for name in ("job", "output", "model", "quantization", "currency", "prices_as_of")}
    lines = [{**s, "record": "total", "devices": _devices(s), **_seconds(s)}]
    for run in s["runs"]:
        lines.insert(
            -1,
            {**same, **run, "record": "invocation", "invocation": run["id"], "devices": _devices(run), **_seconds(run)},
        )
    return _csv(COLUMNS, lines)


def spreadsheet_of_many(found: Sequence[Summary]) -> str:
    """What stands below a prefix as CSV: a line per output, a line per job, and one for all jobs."""
    lines = [{"record": "unreadable" if "error" in s else "output", **s} for s in found]
    sums: list[dict[str, Any]] = [{"record": "job", **s} for s in totals(found)]
    if sums:
        sums[-1] |= {"record": "total", "job": ""}
    return _csv(MANY_COLUMNS, [*lines, *sums])


def _seconds(s: Summary) -> dict[str, float]:
    return dict(zip(SECONDS, s["device_seconds"].values(), strict=True))


def _csv(columns: Sequence[str], lines: Iterable[Summary]) -> str:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows([_inert(line.get(name)) for name in columns] for line in lines)
    return file.getvalue()


def _inert(value: Any) -> Any:
    """A number as it is; text so that no spreadsheet takes it for a formula: an apostrophe before what would begin
    one, also where a reader with another separator would begin a cell."""
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if value is None or isinstance(value, int):
        return value
    return FORMULA.sub(r"\1'", visible(str(value)))


# ---- words ----


def _falling(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


def _codes(s: Summary) -> str:
    failures = s["failures_by_code"]
    return f" ({', '.join(f'{code} {n:,}' for code, n in sorted(failures.items()))})" if failures else ""


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def _devices(s: Summary) -> str:
    return ", ".join(f"{n} x {name}" for name, n in s["devices"].items())
