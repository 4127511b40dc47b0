"""Summaries -> CSV in which no spreadsheet finds a formula, whichever separator it takes. Pure."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from batchq.account.usage import PHASES
from batchq.machine.progress import visible
from batchq.report.facts import Summary, devices
from batchq.report.survey import totals

# At the beginning, or after what a reader may take for a separator: spaces, quotes, and then what a formula begins
# with, wide and small forms included.
FORMULA = re.compile(r"((?:^|[;,|])[\s'\"]*)(?=[-=+@−＝＋－＠﹦﹢﹣﹫])")
SECONDS = tuple(f"{phase}_seconds" for phase in PHASES)
PRICED = ("currency", "prices_as_of", "cost", "cost_per_million_tokens", "cost_per_thousand_rows")
ANSWERED = (
    "truncated",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "tokens_answered",
    "billed_tokens",
    "billed_rows",
)
USED = ("mfu", "mbu", "joules", "joules_per_thousand_tokens")
COLUMNS = (
    *(
        "record",
        "job",
        "output",
        "model",
        "quantization",
        "invocation",
        "state",
        "exit_code",
        "reason",
        "started",
        "devices",
    ),
    *("wall_seconds", *SECONDS, "lost_replicas", "rows", "answers", "failures"),
    *ANSWERED,
    *(*USED, *PRICED),
)
SURVEY_COLUMNS = (
    *("record", "job", "output", "quantization", "state", "started", "outputs", "rows", "answers", "failures"),
    *ANSWERED,
    *("invocations", *USED, *PRICED, "error"),
)


def output_csv(s: Summary) -> str:
    """One output's costs: a line per invocation, and the total, which alone has rows and prices per unit: what was
    committed can't be told apart by invocations. Seconds by phase are device-seconds."""
    same = {name: s[name] for name in ("job", "output", "model", "quantization", "currency", "prices_as_of")}
    lines = [
        {**same, **run, "record": "invocation", "invocation": run["id"], "devices": devices(run), **_seconds(run)}
        for run in s["runs"]
    ]
    return _csv(COLUMNS, [*lines, {**s, "record": "total", "devices": devices(s), **_seconds(s)}])


def survey_csv(outputs: Sequence[Summary]) -> str:
    """What is below a prefix: a line per output, a line per job, and one for all jobs."""
    lines = [{"record": "unreadable" if "error" in s else "output", **s} for s in outputs]
    sums: list[dict[str, Any]] = [{"record": "job", **s} for s in totals(outputs)]
    if sums:
        sums[-1] |= {"record": "total", "job": ""}
    return _csv(SURVEY_COLUMNS, [*lines, *sums])


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
