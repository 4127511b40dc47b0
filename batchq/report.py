"""Accounts -> what a person reads. Pure: takes numbers, returns text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LOW_MASS = 0.5  # below this the labels held less than half of the model's probability


def terminal(summary: Mapping[str, Any]) -> str:
    """A dozen lines for a terminal, from `run.finish`'s summary."""
    s = summary
    lines = [
        f"batchq · {s['job']} · {s['state']}",
        _line("model", f"{s['model']} · {s['quantization']}: {s['why']}"),
        _line(
            "rows",
            f"{s['rows']:,} = {s['answers']:,} answers + {s['failures']:,} failures{_codes(s['failures_by_code'])}",
        ),
    ]
    if s["labels"]:
        lines.append(
            _line("labels", " · ".join(f"{k} {v:,}" for k, v in sorted(s["labels"].items(), key=lambda kv: -kv[1])))
        )
    if s["accuracy"] is not None:
        lines.append(_line("accuracy", f"{s['accuracy']:.3f} against gold on {s['gold_rows']:,} rows"))
    if s["mean_label_mass"] is not None:
        warning = "; low: left to itself, the model would say something else" if s["mean_label_mass"] < LOW_MASS else ""
        lines.append(
            _line("label mass", f"{s['mean_label_mass']:.3f} of the model's probability was on the labels{warning}")
        )
    lines += [_line("gate", verdict["words"]) for verdict in s["gate"]]
    lines += [
        _line(
            "tokens",
            f"{s['prompt_tokens']:,} prompt ({s['cached_tokens']:,} cached) + {s['output_tokens']:,} generated",
        ),
        _line(
            "speed",
            f"{_number(s['tokens_per_second'])} tokens/s · {_number(s['rows_per_second'], 1)} rows/s an engine"
            f" · engine busy {_share(s['busy_share'])} of the time after start-up",
        ),
        _line(
            "seconds",
            " · ".join(f"{k} {v:,.1f}" for k, v in s["device_seconds"].items()) + f" (device-seconds on {_devices(s)})",
        ),
        _line("cost", cost(s)),
    ]
    if s["duplicate_ids"]:
        lines.append(
            _line("note", f"{s['duplicate_ids']:,} values of {s['id_column']} stand more than once in the input")
        )
    for bad in s["quarantined"][:3]:
        lines.append(_line("quarantine", f"{bad['why']}; {bad['rows']:,} rows of it were read and stand"))
    if len(s["quarantined"]) > 3:
        lines.append(_line("quarantine", f"and {len(s['quarantined']) - 3} more files; meta/manifest.json names them"))
    if s["new_inputs"]:
        lines.append(
            _line(
                "note",
                f"{len(s['new_inputs'])} input files appeared since the plan and are not part of it: "
                f"{', '.join(s['new_inputs'][:3])}",
            )
        )
    if s["invocations"] > 1 or s["lost_replicas"] or s["reused_rows"]:
        lines.append(
            _line(
                "resumed",
                f"{s['invocations']} invocations, {s['lost_replicas']} replicas lost, "
                f"{s['reused_rows']:,} answers taken over",
            )
        )
    if s["reuse"]:
        lines.append(_line("reused", f"{s['copied_rows']:,} answers of {s['reuse']}: copied, not asked, not billed"))
    lines.append(_line("output", f"{s['output']}/data · {s['parts']} objects · {s['output']}/meta/report.json"))
    return "\n".join(lines)


def cost(s: Mapping[str, Any]) -> str:
    """Money, or why there is none."""
    if s["cost"] is None:
        return f"unknown: pricing has no price for {', '.join(s['unpriced'])}; add it under pricing.per_hour"
    sign = s["currency"]
    return (
        f"{s['cost']:.4f} {sign} = {_number(s['cost_per_million_tokens'], 4)} per million tokens"
        f" = {_number(s['cost_per_thousand_rows'], 4)} per thousand rows (prices of {s['prices_as_of'] or 'no date'})"
    )


def _line(name: str, text: str) -> str:
    return f"  {name:<11}{text}"


def _codes(failures: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{code} {n:,}' for code, n in sorted(failures.items()))})" if failures else ""


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _devices(s: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} x {name}" for name, n in s["devices"].items()) or "none"
