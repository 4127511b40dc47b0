"""One output's summary -> what its page draws: bars in shares of a width, each with its figure in words. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchq.report import facts
from batchq.report.facts import Summary, share

# What a phase is for a reader: its name, and whether it's paid for once however many rows there are.
WORK: Mapping[str, tuple[str, bool]] = {
    "infer": ("answering", False),
    "start": ("starting", False),
    "load": ("loading", False),
    "compile": ("compiling", False),
    "idle": ("waiting", False),
    "quantize": ("quantizing, once", True),
    "gate": ("quality gate, once", True),
}
BARS = 12  # of labels, or of failures; the rest is one bar


@dataclass(frozen=True, slots=True)
class Bar:
    """Where it begins and how long it is, of the width that there is; its kind decides its colour."""

    kind: str
    begins: str
    length: str


@dataclass(frozen=True, slots=True)
class Line:
    """A name, bars side by side, and figures in words; `whole` if it is the sum of the others."""

    name: str
    bars: Sequence[Bar]
    figure: str
    more: str = ""
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """One large figure and what it means."""

    name: str
    value: str
    unit: str
    more: str


def bar(kind: str, begins: float, length: float) -> Bar:
    """From shares of the width."""
    return Bar(kind, f"{begins:.2%}", f"{length:.2%}")


def part(value: float | None) -> str:
    """A share in whole percent, in which little isn't nothing."""
    return "<1%" if value is not None and 0 < value < 0.005 else share(value)


# ---- money ----


def decimals(value: float) -> int:
    """Digits after the point that show three digits of a value: two at least."""
    return 2 if not value or abs(value) >= 1 else 2 - math.floor(math.log10(abs(value)))


def money(value: float | None, like: float | None = None) -> str:
    """With three digits, or with as many after the point as another figure has that it is compared with."""
    if value is None:
        return "-"
    digits = decimals(value if like is None else like)
    least = 10.0**-digits
    return f"<{least:.{digits}f}" if 0 < value < least / 2 else f"{value:,.{digits}f}"


def costs(s: Summary) -> dict[str, float]:
    """What was paid for each phase: an invocation's cost in proportion to its device-seconds, so exact where its
    devices have one price. Empty if something has no price."""
    if s["cost"] is None:
        return {}
    runs = s.get("runs") or [s]
    found = dict.fromkeys(s["device_seconds"], 0.0)
    for run in runs:
        held = sum(run["device_seconds"].values())
        for phase, seconds in run["device_seconds"].items():
            found[phase] += (run["cost"] or 0.0) * seconds / held if held else 0.0
    return found


def once(by_phase: Mapping[str, float]) -> float:
    """What of it needn't be paid again for more rows."""
    return sum(value for phase, value in by_phase.items() if WORK.get(phase, ("", False))[1])


def waterfall(s: Summary) -> list[Line]:
    """What a million tokens cost, phase by phase, the sum last; of the run, where no token was answered."""
    paid, whole = costs(s), s["cost"]
    per = s["cost_per_million_tokens"] / whole if whole and s["cost_per_million_tokens"] else 1.0
    if not whole:
        return []
    lines, begins = [], 0.0
    for phase, (name, _) in WORK.items():
        if value := paid.get(phase, 0.0):
            kind = phase
            lines.append(
                Line(
                    name,
                    [bar(kind, begins / whole, value / whole)],
                    money(value * per, whole * per),
                    part(value / whole),
                )
            )
            begins += value
    return [*lines, Line("together", [bar("all", 0, 1)], money(whole * per), whole=True)]


def budget(s: Summary) -> list[Line]:
    """What was spent of it; nothing without one."""
    limit, spent = s["budget"], s["cost"]
    if limit is None or spent is None:
        return []
    scale = max(limit, spent)
    used = [bar("infer", 0, min(spent, limit) / scale)]
    if spent > limit:
        used.append(bar("bad", limit / scale, (spent - limit) / scale))
    figure = f"{money(spent, limit)} of {money(limit)}"
    return [Line("spent", [bar("track", 0, 1), *used], figure, part(spent / limit))]


# ---- time ----


def stack(seconds: Mapping[str, float], widest: float | None = None) -> list[Bar]:
    """Phases side by side, of `widest` seconds or of their sum."""
    whole, begins, bars = widest or sum(seconds.values()), 0.0, []
    for phase in [*WORK, *(set(seconds) - set(WORK))]:
        if whole and (value := seconds.get(phase, 0.0)):
            bars.append(bar(phase if phase in WORK else "other", begins / whole, value / whole))
            begins += value
    return bars


def phases(s: Summary) -> list[Line]:
    """Device-seconds by phase, those with none left out."""
    seconds = s["device_seconds"]
    whole = sum(seconds.values())
    return [
        Line(
            WORK.get(phase, (phase, False))[0],
            [bar(phase if phase in WORK else "other", 0, v / whole)],
            f"{v:,.1f} s",
            part(v / whole),
        )
        for phase, v in sorted(seconds.items(), key=lambda item: [*WORK, item[0]].index(item[0]))
        if v
    ]


def invocations(s: Summary) -> list[Line]:
    """A lane per invocation, as long as its devices were held."""
    held = [sum(run["device_seconds"].values()) for run in s["runs"]]
    widest = max(held, default=0.0)
    return [
        Line(
            facts.moment(run["started"]),
            stack(run["device_seconds"], widest),
            f"{seconds:,.1f} s",
            run["state"],
        )
        for run, seconds in zip(s["runs"], held, strict=True)
    ]


# ---- rows ----


def counted(counts: Mapping[str, int], of: int, kind: str) -> list[Line]:
    """Counts by name, most first, as shares of all rows."""
    found = facts.most_first(counts)
    shown = found if len(found) <= BARS else found[: BARS - 1]
    rest = found[len(shown) :]
    lines = [*shown, *([(f"{len(rest)} more", sum(n for _, n in rest))] if rest else [])]
    most = max((n for _, n in lines), default=0)
    return [
        Line(
            name,
            [bar("track", 0, 1), bar(kind, 0, n / most if most else 0)],
            f"{n:,}",
            share(n / of if of else None, 1),
        )
        for name, n in lines
    ]


def tokens(s: Summary) -> list[Line]:
    """By kind, since each takes another amount of work."""
    kinds = (
        ("prompt, computed", "label", s["prompt_tokens"] - s["cached_tokens"]),
        ("prompt, cached", "cached", s["cached_tokens"]),
        ("generated", "infer", s["output_tokens"]),
    )
    whole, begins, lines = s["prompt_tokens"] + s["output_tokens"], 0.0, []
    for name, kind, count in kinds:
        if count:
            lines.append(Line(name, [bar(kind, begins / whole, count / whole)], f"{count:,}", part(count / whole)))
            begins += count
    return lines


# ---- the head ----


def state_kind(state: str) -> str:
    """The colour of a state: good, bad, or in between."""
    if state == "complete":
        return "good"
    return "bad" if state.startswith(("refused", "failed", "killed", "nothing planned")) else "warn"


def chips(s: Summary) -> list[tuple[str, str]]:
    """(colour, words): its state, and whether its answers are a model's."""
    made_up = s["why"].startswith("NOT ASKED")
    return [(state_kind(s["state"]), s["state"]), *([("warn", "test run: no model was called")] if made_up else [])]


def figures(s: Summary) -> list[Figure]:
    """The four that are looked for first."""
    return [_per_million(s), _money(s), _answering(s), _quality(s)]


def _per_million(s: Summary) -> Figure:
    price, paid = s["cost_per_million_tokens"], costs(s)
    more = ""
    if price is not None and s["cost"]:
        single = price * once(paid) / s["cost"]
        more = (
            f"{money(price - single, price)} in every run + {money(single, price)} once"
            if single
            else "nothing of it is paid only once"
        )
    elif s["cost"] is None:
        more = f"no price for {', '.join(s['unpriced'])}"
    return Figure("a million tokens", money(price), s["currency"], more)


def _money(s: Summary) -> Figure:
    rows = f"{s['rows']:,} rows"
    if s["cost_per_thousand_rows"] is not None:
        rows += f", {money(s['cost_per_thousand_rows'])} per thousand"
    return Figure("the run", money(s["cost"]), s["currency"], rows)


def _answering(s: Summary) -> Figure:
    seconds = s["device_seconds"]
    whole = sum(seconds.values())
    held = f"of {whole:,.1f} device-seconds on {facts.devices(s)}" if whole else "no device was held"
    speed = f"{facts.number(s['tokens_per_second'])} tokens/s per engine while answering"
    return Figure("time spent answering", share(seconds["infer"] / whole if whole else None), held, speed)


def _quality(s: Summary) -> Figure:
    """The gate's last verdict where there is one, else accuracy, else failures."""
    accuracy = "" if s["accuracy"] is None else f"accuracy {s['accuracy']:.3f} on {s['gold_rows']:,} rows"
    if s["gate"] and "recovery" in (last := s["gate"][-1]):
        high = "?" if last["high"] is None else f"{last['high']:.1%}"
        kept = f"{last['recovery']:.1%} [{last['low']:.1%}, {high}]"
        rows = f"of {last['measure']}, {last['judged']:,} rows; {last['wanted']:.1%} wanted"
        word = {"pass": "kept", "fail": "lost", "undecided": "undecided"}.get(last["verdict"], "-")
        return Figure("quality kept", word, kept, rows)
    failed = f"{s['failures']:,} of {s['rows']:,} rows failed"
    if accuracy:
        return Figure("accuracy", f"{s['accuracy']:.1%}", f"on {s['gold_rows']:,} rows with gold", failed)
    return Figure(
        "rows answered", share(s["answers"] / s["rows"] if s["rows"] else None, 1), failed, "no gold to compare with"
    )
