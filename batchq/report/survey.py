"""The outputs below a prefix -> their sums, and a table of all for a terminal. Pure.

`outputs` are ledger.survey's summaries; one that can't be read has `output` and `error` alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from batchq.machine.progress import visible
from batchq.report.facts import Summary, costs, counted, money

SUMMED = (
    *("rows", "answers", "failures", "truncated", "prompt_tokens", "cached_tokens", "output_tokens"),
    *("billed_tokens", "billed_rows", "invocations"),
)
HEADS = ("job", "output", "state", "rows", "tokens", "cost", "per 1M tokens", "per 1,000 rows")


def readable(outputs: Sequence[Summary]) -> list[Summary]:
    return [s for s in outputs if "error" not in s]


def unreadable(outputs: Sequence[Summary]) -> list[Summary]:
    return [s for s in outputs if "error" in s]


def totals(outputs: Sequence[Summary]) -> list[dict[str, Any]]:
    """Sums by job, by name, and over all; what can't be read is left out. A sum lacks a cost if an output lacks it."""
    good = readable(outputs)
    jobs = sorted({s["job"] for s in good})
    groups = [(job, [s for s in good if s["job"] == job]) for job in jobs]
    return [_sum(job, members) for job, members in [*groups, ("all jobs", good)] if members]


def table(outputs: Sequence[Summary], prefix: str) -> str:
    """For a terminal: a line per output, then a line per job and one for all."""
    lines = [
        ["?", below(s["output"], prefix), "can't be read", *"-----"]
        if "error" in s
        else [s["job"], below(s["output"], prefix), s["state"], *figures(s)]
        for s in outputs
    ]
    sums = [[s["job"], "", counted(s["outputs"], "output"), *figures(s)] for s in totals(outputs)]
    text = _aligned([HEADS, *lines, *sums])
    text.insert(1 + len(lines), "")
    text += ["", visible(prices(outputs)), *(visible(s["error"]) for s in unreadable(outputs))]
    return "\n".join(text)


def figures(s: Summary) -> list[str]:
    """Cells of an output, or of a sum: rows, tokens, cost, cost per million tokens and per thousand rows."""
    per_unit = [money(s[name]) for name in ("cost_per_million_tokens", "cost_per_thousand_rows")]
    return [f"{s['rows']:,}", f"{s['prompt_tokens'] + s['output_tokens']:,}", costs(s), *per_unit]


def below(output: str, prefix: str) -> str:
    """An output's name as it is told from others below the prefix."""
    return output.removeprefix(prefix).strip("/") or output.rpartition("/")[2]


def prices(outputs: Sequence[Summary]) -> str:
    """What the money is counted in, and what has no price."""
    good = readable(outputs)
    if not good:
        return "nothing could be read"
    missing = sorted({name for s in good for name in s["unpriced"]})
    without = f"; no price for {', '.join(missing)}: add it under pricing.per_hour" if missing else ""
    currencies = sorted({currency for s in good for currency in s["costs"]}) or [good[0]["currency"]]
    lists = sorted({words for s in good for words in s["price_lists"]}) or ["none was needed"]
    unbooked = sum(s["unbooked"] for s in good)
    anew = f"; {counted(unbooked, 'run')} of before prices were booked, at today's list" if unbooked else ""
    return f"{' and '.join(currencies)}. Price list: {'; '.join(lists)}{anew}{without}"


def _sum(job: str, members: Sequence[Summary]) -> dict[str, Any]:
    sums: dict[str, Any] = {name: sum(s[name] for s in members) for name in SUMMED}
    booked: Counter[str] = Counter()
    for s in members:
        booked.update(s["costs"])
    unpriced = sorted({name for s in members for name in s["unpriced"]})
    whole = sum(booked.values()) if not unpriced and len(booked) < 2 else None
    as_of = sorted({s["prices_as_of"] for s in members})
    return {
        "job": job,
        "outputs": len(members),
        **sums,
        "currency": " ".join(sorted(booked)) or members[0]["currency"],
        "prices_as_of": " ".join(as_of),
        "costs": dict(booked),
        "unpriced": unpriced,
        "cost": whole,
        "cost_per_million_tokens": _per(whole, 1e6, sums["billed_tokens"]),
        "cost_per_thousand_rows": _per(whole, 1e3, sums["billed_rows"]),
    }


def _per(cost: float | None, unit: float, count: int) -> float | None:
    return None if cost is None or not count else cost * unit / count


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Words to the left, figures to the right."""
    shown = [[visible(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    sides = "<<<>>>>>"
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in shown
    ]
