"""How long a job will label and what that will cost, before it runs: by what the last run reached here, by what `tune`
found, or by a forecast."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from batchq import findings, forecast, settings
from batchq.account import ReplicaAccount, price
from batchq.config import Config, Scheme, TaskKind
from batchq.fit import Fit
from batchq.hardware import Hardware
from batchq.plan import sample
from batchq.plan.sample import Lengths
from batchq.progress import duration
from batchq.records import Plan

LEAST = 5.0  # seconds of work of a replica that say something about its speed
ROWS = 2000.0  # a second and replica, about, at most: one process's Python around vLLM's queue (135M model, one H200)


@dataclass(frozen=True, slots=True)
class Reached:
    """What a run came to: tokens/s of prompts and answers of one replica, and tokens of an answer in the mean."""

    rate: float
    answer: float
    date: str


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens/s of one replica, tokens of an answer, and where both come from."""

    rate: float
    answer: float
    source: str


def words(config: Config, draft: Plan, fit: Fit, scheme: Scheme, lengths: Lengths, left: float) -> str:
    """Time and money for the share of the shards that is `left`, or why they aren't known.

    Start-up, quantizing and the gate come on top; the report counts them too.
    """
    found = speed(config, draft, fit, scheme, lengths)
    if found is None:
        return "how fast isn't known here yet: `tune` or a first run tells"
    if not lengths.tokens:
        return "none of the sampled rows can be asked"
    replicas, devices = layout(config, fit.hardware)
    rate = found.rate * replicas
    rows = sample.expected_rows(draft, config.input.limit)
    counted = 1000 if rows is None else math.ceil(rows * left)
    seconds = counted * (lengths.mean + found.answer) / rate
    an_hour = price(fit.hardware.accelerator, config.pricing)
    money = ""
    if an_hour is not None:
        dated = f"prices of {config.pricing.as_of}" if config.pricing.as_of else "prices without a date"
        spent = seconds / 3600 * devices * an_hour
        money = f" and {spent:,.{2 if spent >= 1 else 4}f} {config.pricing.currency} ({dated})"
    what = "a thousand rows" if rows is None else "what is left" if left < 1 else "the whole"
    on = f"{devices} x {fit.hardware.accelerator}" if fit.hardware.gpus else f"{devices} cores"
    return f"about {duration(seconds)} of labelling{money} for {what}: {rate:,.0f} tokens/s on {on}, {found.source}"


def speed(config: Config, draft: Plan, fit: Fit, scheme: Scheme, lengths: Lengths) -> Speed | None:
    """The best that is known of one replica; None if nothing is."""
    here = fit.hardware
    scored = config.task.kind is TaskKind.classify
    if last := recall(config, draft, here):
        return Speed(last.rate, last.answer, f"as a run reached on {last.date}")
    if not scored:
        return None  # it hangs on how long the answers are
    if config.tune.use and (tuned := settings.recall(config, draft, here)):
        return Speed(tuned.rate, 1.0, f"as `tune` found on {tuned.date}")
    gpus = config.cluster.tensor_parallel_size * config.cluster.pipeline_parallel_size
    rate = forecast.of_scheme(fit, scheme, gpus)
    if rate is None:
        return None
    return Speed(min(rate, ROWS * (lengths.mean + 1)), 1.0, "a forecast")


def layout(config: Config, here: Hardware) -> tuple[int, int]:
    """Replicas on a machine like this one, and the devices that they take: GPUs, or cores."""
    cluster = config.cluster
    if here.gpus:
        each = cluster.tensor_parallel_size * cluster.pipeline_parallel_size
        replicas = cluster.replicas or max(1, len(here.gpus) // each)
    else:
        each = cluster.cpus_per_replica or max(1, len(here.cores) // (cluster.replicas or 1))
        replicas = cluster.replicas or max(1, len(here.cores) // each)
    return replicas, replicas * each


def remember(config: Config, fixed: Plan, here: Hardware, replicas: Iterable[ReplicaAccount], rows: int) -> None:
    """Keep what a run's replicas reached, for the next one's estimate; `replicas` with those of the gate.

    An engine that the gate asked has what it read of those rows in its cache: of a short run that isn't the speed.
    """
    replicas = tuple(replicas)
    gate = sum(r.phases.get("gate", 0.0) for r in replicas)
    worked = [(r, r.phases.get("infer", 0.0) + r.phases.get("idle", 0.0)) for r in replicas if r.counters.tokens]
    seconds = sum(time for _, time in worked)
    if not rows or seconds < max(LEAST, 10 * gate):
        return
    rate = sum(r.counters.tokens for r, _ in worked) / seconds
    answer = sum(r.counters.output_tokens for r, _ in worked) / rows
    reached = Reached(round(rate, 1), round(answer, 2), f"{datetime.now(UTC):%Y-%m-%d}")
    findings.keep("reached", settings.key(config, fixed, here), dataclasses.asdict(reached))


def recall(config: Config, draft: Plan, here: Hardware) -> Reached | None:
    """What the last run on this kind of machine reached with that model and scheme, if there was one."""
    return findings.recall("reached", settings.key(config, draft, here), lambda kept: Reached(**kept))
