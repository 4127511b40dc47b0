"""One output's summary -> words: the lines of a terminal, and how figures are written everywhere. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from batchq.machine.progress import visible

LOW_MASS = 0.5  # below this the labels held less than half of the model's probability
FILES_NAMED = 3  # of each kind in a terminal's lines; the manifest has all

Summary = Mapping[str, Any]  # of one output: outcome.summarise's, or ledger.survey's
Line = tuple[str, str]  # a name and its words


def terminal_text(summary: Summary) -> str:
    """A dozen lines for a terminal, from `outcome.summarise`'s summary."""
    lines = [f"  {name:<11}{visible(words)}" for name, words in summary_lines(summary)]
    return "\n".join([visible(title(summary)), *lines])


def title(s: Summary) -> str:
    """The job and what has come of it."""
    return " · ".join(["batchq", s["job"], *([s["date"]] if s.get("date") else []), s["state"]])


def summary_lines(s: Summary) -> list[Line]:
    """What is worth a line, in the order in which it is read."""
    return [
        ("model", f"{s['model']} · {s['quantization']}: {s['why']}"),
        ("rows", f"{s['rows']:,} = {s['answers']:,} answers + {s['failures']:,} failures{_codes(s)}"),
        *_quality(s),
        *_usage(s),
        ("cost", cost(s)),
        *_input(s),
        *_history(s),
        ("output", f"{s['read']} · {counted(s['objects'], 'object')} · {s['output']}/meta/report.html .csv .json"),
    ]


def cost(s: Summary) -> str:
    """Money, or why there is none."""
    if s["cost"] is None and not s["unpriced"]:
        return f"{costs(s)}: booked in more than one currency. Price lists: {'; '.join(s['price_lists'])}"
    if s["cost"] is None:
        return f"unknown: pricing has no price for {', '.join(s['unpriced'])}; add it under pricing.per_hour"
    lists = f"Price list: {'; '.join(s['price_lists']) or 'none was needed'}"
    if s["unbooked"]:
        lists += f"; {counted(s['unbooked'], 'run')} of before prices were booked, at today's list"
    if not s["billed_rows"]:
        return f"{money(s['cost'])} {s['currency']} so far; nothing committed yet. {lists}"
    return (
        f"{money(s['cost'])} {s['currency']} in total: {money(s['cost_per_million_tokens'])} per million tokens, "
        f"{money(s['cost_per_thousand_rows'])} per 1,000 rows. {lists}"
    )


def costs(s: Summary) -> str:
    """What something cost, in each currency that it was booked in; a dash where a part has no price."""
    if s["cost"] is not None or s["unpriced"]:
        return money(s["cost"])
    return " + ".join(f"{money(amount)} {currency}" for currency, amount in sorted(s["costs"].items()))


def efficiency(s: Summary) -> str:
    """How well the accelerators were used, as far as it is known; empty on a CPU."""
    words = [f"{name.upper()} {share(s[name])}" for name in ("mfu", "mbu") if s[name] is not None]
    if s["joules_per_thousand_tokens"] is not None:
        words.append(f"{s['joules_per_thousand_tokens']:,.1f} J per 1,000 tokens")
    return " · ".join(words)


def ended(run: Summary) -> str:
    """How an invocation ended, and why, where an error ended it."""
    if not run["reason"]:
        return str(run["state"])
    code = "" if run["exit_code"] is None else f", exit code {run['exit_code']}"
    return f"{run['state']}{code}: {run['reason']}"


# ---- how figures are written ----


def number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def money(value: float | None) -> str:
    """Four decimals, and as many more as a small amount needs for three digits that tell."""
    if not value:
        return "-" if value is None else "0.0000"
    return f"{value:,.{max(4, 2 - math.floor(math.log10(abs(value))))}f}"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def share(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def moment(written: str) -> str:
    """A time of a record, for people; as it is where it is none."""
    try:
        return f"{datetime.fromisoformat(written).astimezone(UTC):%-d %b %Y, %H:%M}"
    except ValueError:
        return written


def period(runs: Sequence[Summary]) -> str:
    """From the first run's start to the last one's end, UTC; empty if there was none."""
    try:
        first, last = (datetime.fromisoformat(run["started"]).astimezone(UTC) for run in (runs[0], runs[-1]))
    except IndexError:
        return ""
    except ValueError:
        return str(runs[0]["started"])
    end = last + timedelta(seconds=runs[-1]["wall_seconds"])
    day = "" if end.date() == first.date() else f"{end:%-d %b %Y, }"
    return f"{first:%-d %b %Y, %H:%M}–{day}{end:%H:%M} UTC"


def devices(s: Summary) -> str:
    """Accelerators, or cores, of an output or of one of its invocations."""
    return ", ".join(f"{count} x {name}" for name, count in s["devices"].items())


def most_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


# ---- lines by what they are about ----


def _codes(s: Summary) -> str:
    failures = s["failures_by_code"]
    return f" ({', '.join(f'{code} {n:,}' for code, n in sorted(failures.items()))})" if failures else ""


def _quality(s: Summary) -> list[Line]:
    lines = []
    if s["labels"]:
        lines.append(("labels", " · ".join(f"{label} {count:,}" for label, count in most_first(s["labels"]))))
    lines += _accuracy(s)
    if s["truncated"]:
        cut = f"{s['truncated']:,} of {s['answers']:,} answers ({share(s['truncated'] / s['answers'], 1)})"
        lines.append(("cut off", f"{cut} have no end: task.max_tokens or engine.max_model_len was reached before"))
    if s["mean_label_mass"] is not None:
        warning = "; low: left to itself, the model would say something else" if s["mean_label_mass"] < LOW_MASS else ""
        words = f"{s['mean_label_mass']:.3f} of the model's probability was on the labels{warning}"
        lines.append(("label mass", words))
    return lines + [("gate", verdict["words"]) for verdict in s["gate"]]


def _accuracy(s: Summary) -> list[Line]:
    """Against gold, and what of gold says nothing: that is never passed over in silence."""
    unknown = s["gold_unknown_rows"]
    passed = f"passed over: {unknown:,} rows whose gold value is none of the labels" if unknown else ""
    if s["accuracy"] is not None:
        words = f"{s['accuracy']:.3f} against gold on {s['gold_rows']:,} rows"
        return [("accuracy", f"{words}; {passed}" if passed else words)]
    if s["gold_column"] is None or not s["answers"]:
        return []
    return [("accuracy", f"unknown: {passed or 'no answered row has a value in task.gold=' + s['gold_column']}")]


def _usage(s: Summary) -> list[Line]:
    prompt = f"{s['prompt_tokens']:,} prompt ({s['cached_tokens']:,} cached)"
    speed = f"{number(s['tokens_per_second'])} tokens/s · {number(s['rows_per_second'], 1)} rows/s per engine"
    busy = f"engine busy {share(s['busy_share'], 1)} of the time after start-up"
    seconds = " · ".join(f"{phase} {seconds:,.1f}" for phase, seconds in s["device_seconds"].items())
    used = efficiency(s)
    return [
        ("tokens", f"{prompt} + {s['output_tokens']:,} generated"),
        ("speed", f"{speed} · {busy}"),
        *([("efficiency", used)] if used else []),
        ("seconds", f"{seconds} (device-seconds on {devices(s) or 'none'})"),
    ]


def _input(s: Summary) -> list[Line]:
    """What was wrong with the input, or has been added to it."""
    lines = []
    if s["duplicate_ids"]:
        lines.append(("note", f"{s['duplicate_ids']:,} values of {s['id_column']} occur more than once in the input"))
    for bad in s["quarantined"][:FILES_NAMED]:
        lines.append(("quarantine", f"{bad['why']}; {bad['rows']:,} rows of it were read and are in the output"))
    if (more := len(s["quarantined"]) - FILES_NAMED) > 0:
        lines.append(("quarantine", f"and {more} more files; meta/manifest.json names them"))
    if s["new_inputs"]:
        appeared = f"{len(s['new_inputs'])} input files appeared since the plan and are not part of it"
        lines.append(("note", f"{appeared}: {', '.join(s['new_inputs'][:FILES_NAMED])}"))
    return lines


def _history(s: Summary) -> list[Line]:
    """Earlier invocations and earlier outputs that the answers come from."""
    lines = []
    if s["invocations"] > 1 or s["lost_replicas"] or s["reused_rows"]:
        lost = f"{s['invocations']} invocations, {s['lost_replicas']} replicas lost"
        lines.append(("resumed", f"{lost}, {s['reused_rows']:,} answers taken over from earlier attempts"))
    if s["runs"] and s["runs"][-1]["reason"]:
        lines.append(("last run", ended(s["runs"][-1])))
    if s["reuse"]:
        lines.append(("reused", f"{s['copied_rows']:,} answers of {s['reuse']}: copied, not asked, not billed"))
    if s["beside"]:
        lines.append(("beside", beside(s)))
    return lines


def beside(s: Summary) -> str:
    """What other commands held for this job, which the cost of the run leaves out."""
    verbs = ", ".join(f"{each['verb']} {each['invocations']}" for each in s["beside"])
    known = [each["cost"] for each in s["beside"]]
    amount = "" if None in known else f" = {money(sum(known))} {s['currency']}"
    seconds = sum(each["device_seconds"] for each in s["beside"])
    return f"{verbs}: {seconds:,.1f} device-seconds{amount}, not in the cost above"
