"""Receipts, records of invocations and prices -> all that a report says in numbers. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from batchq.account.cost import booked, price_list, spent, total, with_prices
from batchq.account.usage import PHASES, Rated, RunAccount
from batchq.config import PricingConfig
from batchq.records import Receipt, Usage


def summarise(
    receipts: Iterable[Receipt], runs: Iterable[RunAccount], pricing: PricingConfig, anew: bool = False
) -> dict[str, Any]:
    """Everything a report says in numbers, over all invocations of one output.

    The cost of all that was held (account/cost.py) is charged to all rows that came out, but those copied from another
    output. Each invocation costs what it was booked at; `pricing` is for those that were never booked, or for all of
    them where it is asked what they would cost `anew`. Tokens are prompt and output tokens together, cached ones
    included.
    """
    usage = Usage()
    labels: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    parts = reused = copied = copied_tokens = 0
    for receipt in receipts:
        usage += receipt.usage
        labels.update(receipt.labels)
        failures.update(receipt.failures)
        parts += 1
        reused += receipt.from_spill
        copied += receipt.from_reuse
        copied_tokens += receipt.from_reuse_tokens
    runs, beside = _by_verb(runs)
    replicas = [replica for run in runs for replica in run.replicas]
    phases = {p: round(sum(r.phases.get(p, 0.0) * r.devices for r in replicas), 3) for p in PHASES}
    engine = {p: sum(r.phases.get(p, 0.0) for r in replicas) for p in PHASES}
    cpu: dict[str, float] = {}
    for replica in replicas:
        for what, seconds in replica.cpu.items():
            cpu[what] = cpu.get(what, 0.0) + seconds
    priced = with_prices(runs, pricing, anew)
    held = [at for run, at in priced if run.replicas]
    prices = {rate.accelerator: rate.per_hour for at in held for rate in at.rates}
    costs, whole = spent(priced)
    cost = total(costs, whole)
    tokens = usage.prompt_tokens + usage.output_tokens - copied_tokens  # another run has paid for those
    asked = usage.rows - copied
    return {
        "rows": usage.rows,
        "answers": usage.answers,
        "failures": usage.failures,
        "failures_by_code": dict(failures),
        "labels": dict(labels),
        "parts": parts,
        "reused_rows": reused,
        "copied_rows": copied,
        "copied_tokens": copied_tokens,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
        "accuracy": usage.correct / usage.gold if usage.gold else None,
        "gold_rows": usage.gold,
        "gold_unknown_rows": usage.gold_unknown,
        "truncated": usage.truncated,
        "mean_label_mass": usage.mass / usage.answers if labels and usage.answers else None,
        "invocations": len(runs),
        "lost_replicas": sum(r.lost_replicas for r in runs),
        "wall_seconds": round(sum(r.wall_seconds for r in runs), 3),
        "device_seconds": phases,
        "cpu_seconds": {k: round(v, 3) for k, v in cpu.items()},
        "devices": {r.accelerator: max(x.devices for x in replicas) for r in replicas},
        "infer_seconds": round(engine["infer"], 3),
        "busy_share": _ratio(engine["infer"], engine["infer"] + engine["idle"]),
        "tokens_per_second": _ratio(tokens, engine["infer"]),
        "rows_per_second": _ratio(asked, engine["infer"]),
        "currency": " ".join(sorted(costs)) or (held[-1].currency if held else pricing.currency),
        "costs": costs,
        "prices_as_of": held[-1].as_of if held else pricing.as_of,
        "price_lists": sorted({price_list(at) for at in held}),
        "unbooked": 0 if anew else sum(1 for run in runs if run.replicas and run.rated is None),
        "prices": prices,
        "rates": {rate.accelerator: rate.key for at in held for rate in at.rates},
        "unpriced": sorted({rate.accelerator for at in held for rate in at.rates if rate.per_hour is None}),
        "cost": cost,
        "billed_tokens": tokens,
        "billed_rows": asked,
        "cost_per_million_tokens": None if cost is None else _ratio(cost * 1e6, tokens),
        "cost_per_thousand_rows": None if cost is None else _ratio(cost * 1e3, asked),
        **efficiency(runs),
        "runs": [_invocation(run, at) for run, at in priced],
        "beside": [_beside(verb, with_prices(members, pricing, anew)) for verb, members in sorted(beside.items())],
    }


STATES = {"refused": "refused by the gate", "running": "at work, or killed (status tells)", "complete": ""}


def state_words(left: int, shards: int, runs: Iterable[RunAccount]) -> str:
    """What has come of an output: how its last run ended, and shards that are left, of how many there are; none where
    nothing is planned."""
    if shards and not left:
        return "complete"
    last = [run.state for run in runs if run.verb == "run"][-1:]
    far = f"{left} of {shards} shards to go" if shards else "nothing planned"
    return ", ".join(filter(None, [*(STATES.get(state, state) for state in last), far]))


def _by_verb(accounts: Iterable[RunAccount]) -> tuple[list[RunAccount], dict[str, list[RunAccount]]]:
    """The runs, and by verb what other commands held for the same output: they label nothing that it holds."""
    runs: list[RunAccount] = []
    beside: dict[str, list[RunAccount]] = {}
    for each in accounts:
        (runs if each.verb == "run" else beside.setdefault(each.verb, [])).append(each)
    return runs, beside


def _beside(verb: str, priced: Sequence[tuple[RunAccount, Rated]]) -> dict[str, Any]:
    """What the invocations of another verb held and cost, together."""
    replicas = [replica for each, _ in priced for replica in each.replicas]
    return {
        "verb": verb,
        "invocations": len(priced),
        "device_seconds": round(sum(replica.device_seconds for replica in replicas), 3),
        "cost": total(*spent(priced)),
    }


def efficiency(runs: Iterable[RunAccount]) -> dict[str, Any]:
    """How well the accelerators were used while they inferred, over everything the engines answered.

    `mfu`: 2 x linear parameters x computed tokens, over the seconds in `infer` times the devices' dense peak.
    Attention, the embedding and the head are left out, so it is a lower bound. `mbu`, where text is generated: the
    bytes that decoding has read at least (the layers' weights once for as many tokens as can be in flight, and keys and
    values) over the same seconds times the devices' memory bandwidth. `joules_per_thousand_tokens`: what the devices
    took from when their engines were ready, waiting included, over prompt and output tokens, cached ones included, as
    in the cost. Each is None if a replica that inferred lacks a figure for it: the peak isn't known, there
    is no accelerator, or nothing counts its energy.
    """
    worked = [(run, r) for run in runs for r in run.replicas if r.phases.get("infer")]
    known = all(run.flop_per_token and run.peak_flops for run, _ in worked)
    done = sum(r.counters.computed_tokens * (run.flop_per_token or 0.0) for run, r in worked)
    could = sum(r.devices * r.phases["infer"] * (run.peak_flops or 0.0) for run, r in worked)
    decoding = all(run.weight_bytes_per_output_token and run.peak_bandwidth for run, _ in worked)
    moved = sum(
        r.counters.output_tokens * (run.weight_bytes_per_output_token or 0.0)
        + r.counters.kv_tokens_read * (run.kv_bytes_per_token or 0)
        for run, r in worked
    )
    could_move = sum(r.devices * r.phases["infer"] * (run.peak_bandwidth or 0.0) for run, r in worked)
    joules = [r.joules for _, r in worked if r.joules is not None]
    energy = sum(joules) if worked and len(joules) == len(worked) else None
    answered = sum(r.counters.tokens for _, r in worked)
    return {
        "tokens_answered": answered,
        "mfu": _ratio(done, could) if known else None,
        "mbu": _ratio(moved, could_move) if decoding else None,
        "joules": None if energy is None else round(energy, 3),
        "joules_per_thousand_tokens": None if energy is None else _ratio(energy * 1e3, answered),
    }


def _invocation(run: RunAccount, at: Rated) -> dict[str, Any]:
    """One line of the report: what this invocation held and what it cost."""
    return {
        "id": run.id,
        "state": run.state,
        "exit_code": run.exit_code,
        "reason": run.reason,
        "started": run.started,
        "wall_seconds": run.wall_seconds,
        "devices": {r.accelerator: max(x.devices for x in run.replicas) for r in run.replicas},
        "device_seconds": {p: round(sum(r.phases.get(p, 0.0) * r.devices for r in run.replicas), 3) for p in PHASES},
        "lost_replicas": run.lost_replicas,
        "cost": booked(run.replicas, at),
        "currency": at.currency,
        "prices_as_of": at.as_of,
        **efficiency([run]),
    }


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
