"""Phase timings, receipts and prices -> usage and money. Pure: no clock but the one passed in."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from batchq.config import PricingConfig
from batchq.records import Receipt, Usage, restored

# What an accelerator-second held can be, exactly one of these at a time.
PHASES = ("start", "load", "compile", "quantize", "gate", "infer", "idle")


class PhaseClock:
    """Which phase a replica is in, and for how long it was in each. Measured, never subtracted."""

    def __init__(self, phase: str = "start", now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._phase = phase
        self._since = now()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def enter(self, phase: str) -> None:
        now = self._now()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def move(self, source: str, target: str, seconds: float) -> None:
        """Reassign seconds that a later measurement showed to be another phase's."""
        seconds = min(seconds, self._seconds[source])
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    @property
    def phase(self) -> str:
        return self._phase

    def seconds(self) -> dict[str, float]:
        """Seconds by phase up to now, the current one included."""
        total = dict(self._seconds)
        total[self._phase] += self._now() - self._since
        return {phase: round(seconds, 3) for phase, seconds in total.items()}


@contextmanager
def timed(cpu: dict[str, float], what: str, now: Callable[[], float] = time.thread_time) -> Iterator[None]:
    """Add the CPU seconds that this thread spends inside to `cpu[what]`."""
    began = now()
    try:
        yield
    finally:
        cpu[what] += now() - began


@dataclass(frozen=True, slots=True)
class Counters:
    """What an engine was asked and what that took, of all its rows, committed or not. Adds up over engines."""

    rows: int = 0  # answers and failures
    failures: int = 0  # of these
    tokens: int = 0  # prompt and output
    computed_tokens: int = 0  # of these, what the model's layers had to compute: see `computed_tokens`
    output_tokens: int = 0
    kv_tokens_read: int = 0  # tokens whose keys and values were read for the output: see `kv_tokens_read`

    def __add__(self, other: Counters) -> Counters:
        return Counters(
            rows=self.rows + other.rows,
            failures=self.failures + other.failures,
            tokens=self.tokens + other.tokens,
            computed_tokens=self.computed_tokens + other.computed_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            kv_tokens_read=self.kv_tokens_read + other.kv_tokens_read,
        )


@dataclass(frozen=True, slots=True)
class ReplicaAccount:
    """One engine's life. `devices`: accelerators it held, or cores where there is none."""

    accelerator: str
    devices: int
    phases: dict[str, float]  # seconds of wall clock
    cpu: dict[str, float] = field(default_factory=dict)  # seconds of reading, tokenising, writing beside it
    counters: Counters = Counters()
    joules: float | None = None  # that its devices took since its engine was ready; None where nothing counts them


@dataclass(frozen=True, slots=True)
class RunAccount:
    """One invocation: meta/runs/<id>.json, rewritten by its only owner while it works.

    `state`: "running" (or killed since), "complete", "stopped", "refused" (by the gate) or "failed". `verb`: which
    command it was; what others than `run` cost is reported apart.
    """

    id: str
    state: str
    started: str  # UTC, ISO 8601; for people, nothing is decided by it
    wall_seconds: float
    replicas: tuple[ReplicaAccount, ...]
    lost_replicas: int = 0
    reached: dict[str, float] = field(default_factory=dict)  # what of the start-up, and seconds from the start
    flop_per_token: float | None = None  # of what was served; None where it isn't known
    peak_flops: float | None = None  # a second and device, dense, in the precision that it multiplies in
    weight_bytes_per_output_token: float | None = None  # read at least; None where no text is generated
    kv_bytes_per_token: int | None = None  # of keys and values
    peak_bandwidth: float | None = None  # bytes of memory a second and device
    verb: str = "run"
    job: str = ""
    output: str = ""


def computed_tokens(prompt: int, cached: int, output: int) -> int:
    """Tokens of one answer that went through the layers: a cached one doesn't, nor does the last, which nothing
    follows."""
    return prompt - cached + max(0, output - 1)


def kv_tokens_read(prompt: int, cached: int, output: int) -> int:
    """Tokens whose keys and values are read to generate one answer, at least: for each output token after the first
    all that stand before it. Without cached ones, which may be read once for many rows."""
    return max(0, output - 1) * (2 * (prompt - cached) + output) // 2


# Fields of meta/runs/*.json as they were called before, and as they are now.
RENAMED_RUN = {"bytes_per_generated": "weight_bytes_per_output_token", "bytes_per_recalled": "kv_bytes_per_token"}
RENAMED_COUNTERS = {
    "tokens": "tokens",
    "computed": "computed_tokens",
    "generated": "output_tokens",
    "recalled": "kv_tokens_read",
}


def account_from_json(data: Mapping[str, Any]) -> RunAccount:
    """A record of meta/runs/, also one of before its counters were a record of their own. Raises ValueError."""
    return restored({**data, "replicas": [*map(_with_counters, data["replicas"])]}, RunAccount, RENAMED_RUN)


def _with_counters(replica: Mapping[str, Any]) -> dict[str, Any]:
    flat = {RENAMED_COUNTERS[name]: value for name, value in replica.items() if name in RENAMED_COUNTERS}
    return {"counters": flat, **replica}


def price(accelerator: str, pricing: PricingConfig) -> float | None:
    """Price of one device-hour: the longest key of the price list that the name contains."""
    keys = [k for k in pricing.per_hour if k.lower() in accelerator.lower()]
    return pricing.per_hour[max(keys, key=len)] if keys else None


def summarise(receipts: Iterable[Receipt], runs: Iterable[RunAccount], pricing: PricingConfig) -> dict[str, Any]:
    """Everything a report says in numbers, over all invocations of one output.

    cost = sum over replicas of devices x seconds held / 3600 x price; charged to all rows that
    came out, but those copied from another output. Tokens are prompt and output tokens together, cached ones included.
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
    held: dict[str, float] = {}
    for replica in replicas:
        for what, seconds in replica.cpu.items():
            cpu[what] = cpu.get(what, 0.0) + seconds
        seconds = replica.devices * sum(replica.phases.values())
        held[replica.accelerator] = held.get(replica.accelerator, 0.0) + seconds
    prices = {name: price(name, pricing) for name in held}
    cost = cost_of(replicas, pricing)
    tokens = usage.prompt_tokens + usage.output_tokens - copied_tokens  # what another run paid for makes none cheaper
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
        "currency": pricing.currency,
        "prices_as_of": pricing.as_of,
        "prices": prices,
        "unpriced": sorted(name for name, per_hour in prices.items() if per_hour is None),
        "cost": cost,
        "billed_tokens": tokens,
        "billed_rows": asked,
        "cost_per_million_tokens": None if cost is None else _ratio(cost * 1e6, tokens),
        "cost_per_thousand_rows": None if cost is None else _ratio(cost * 1e3, asked),
        **efficiency(runs),
        "runs": [_invocation(run, pricing) for run in runs],
        "beside": [_beside(verb, members, pricing) for verb, members in sorted(beside.items())],
    }


def _by_verb(accounts: Iterable[RunAccount]) -> tuple[list[RunAccount], dict[str, list[RunAccount]]]:
    """The runs, and by verb what other commands held for the same output: they label nothing that it holds."""
    runs: list[RunAccount] = []
    beside: dict[str, list[RunAccount]] = {}
    for each in accounts:
        (runs if each.verb == "run" else beside.setdefault(each.verb, [])).append(each)
    return runs, beside


def _beside(verb: str, accounts: Sequence[RunAccount], pricing: PricingConfig) -> dict[str, Any]:
    """What the invocations of another verb held and cost, together."""
    replicas = [replica for each in accounts for replica in each.replicas]
    held = sum(replica.devices * sum(replica.phases.values()) for replica in replicas)
    return {
        "verb": verb,
        "invocations": len(accounts),
        "device_seconds": round(held, 3),
        "cost": cost_of(replicas, pricing),
    }


def cost_of(replicas: Iterable[ReplicaAccount], pricing: PricingConfig) -> float | None:
    """Price of the accelerator-seconds that were held; None if one of the accelerators has no price."""
    cost = 0.0
    for replica in replicas:
        per_hour = price(replica.accelerator, pricing)
        if per_hour is None:
            return None
        cost += replica.devices * sum(replica.phases.values()) / 3600 * per_hour
    return cost


def efficiency(runs: Iterable[RunAccount]) -> dict[str, Any]:
    """How well the accelerators were used while they inferred, over everything the engines answered.

    `mfu`: 2 x linear parameters x computed tokens, over the seconds in `infer` times the devices' dense peak.
    Attention, the embedding and the head are left out, so it is a lower bound. `mbu`, where text is generated: the
    bytes that decoding has read at least (the layers' weights once for as many tokens as can be in flight, and keys and
    values) over the same seconds times the devices' memory bandwidth. `joules_per_thousand_tokens`: what the devices
    took from when their engines were ready, waiting included, over prompt and output tokens, cached ones included, as
    in the cost. Each is None if a replica that inferred lacks what it takes: the peak isn't known, there
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


def _invocation(run: RunAccount, pricing: PricingConfig) -> dict[str, Any]:
    """One line of the report: what this invocation held and what it cost."""
    return {
        "id": run.id,
        "state": run.state,
        "started": run.started,
        "wall_seconds": run.wall_seconds,
        "devices": {r.accelerator: max(x.devices for x in run.replicas) for r in run.replicas},
        "device_seconds": {p: round(sum(r.phases.get(p, 0.0) * r.devices for r in run.replicas), 3) for p in PHASES},
        "lost_replicas": run.lost_replicas,
        "cost": cost_of(run.replicas, pricing),
        **efficiency([run]),
    }


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
