"""How long a job will label and what that will cost, before it runs: by what the last run reached here, by what `tune`
measured, or by a forecast."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from batchq.account.cost import cost, price
from batchq.account.usage import ReplicaAccount
from batchq.config import Config, Scheme, deadline_after
from batchq.errors import ConfigError
from batchq.machine import local_cache
from batchq.machine.hardware import Hardware
from batchq.machine.progress import duration
from batchq.plan import sample
from batchq.plan.sample import Lengths
from batchq.records import Plan, restored
from batchq.sizing import forecast, replicas, tuned
from batchq.sizing.fit import Fit
from batchq.task import answers

LEAST = 5.0  # seconds that a replica has to have worked to say something about its speed
ROWS = 2000.0  # per second and replica, about, at most: one process's Python around vLLM's queue (135M model, one H200)


@dataclass(frozen=True, slots=True)
class Throughput:
    """What a run reached: tokens/s of one replica, prompts and answers together, and mean tokens per answer."""

    rate: float
    answer: float
    date: str


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens/s of one replica, tokens of an answer, and where both come from."""

    rate: float
    answer: float
    source: str


@dataclass(frozen=True, slots=True)
class Labelling:
    """How long labelling will take: seconds on so many devices at so many tokens/s of all of them; `rows`: of the whole
    corpus, None where nobody can count them, and then the seconds are those of a thousand."""

    seconds: float
    rate: float
    devices: int
    rows: int | None
    source: str


def words(config: Config, draft: Plan, fit: Fit, scheme: Scheme, lengths: Lengths, left: float) -> str:
    """Time and money for the share of the shards that is `left`, or why they aren't known.

    Start-up, quantizing and the gate come on top; the report counts them too.
    """
    expected = labelling(config, draft, fit, scheme, lengths, left)
    if isinstance(expected, str):
        return expected
    seconds, devices, rows = expected.seconds, expected.devices, expected.rows
    an_hour = price(fit.hardware.accelerator, config.pricing)
    money = ""
    if an_hour is not None:
        dated = f"prices of {config.pricing.as_of}" if config.pricing.as_of else "prices without a date"
        spent = cost(seconds * devices, an_hour)
        money = f" and {spent:,.{2 if spent >= 1 else 4}f} {config.pricing.currency} ({dated})"
    what = "a thousand rows" if rows is None else "what is left" if left < 1 else "the whole"
    on = f"{devices} x {fit.hardware.accelerator}" if fit.hardware.gpus else f"{devices} cores"
    rate, source = expected.rate, expected.source
    return f"about {duration(seconds)} of labelling{money} for {what}: {rate:,.0f} tokens/s on {on}, {source}"


def labelling(config: Config, draft: Plan, fit: Fit, scheme: Scheme, lengths: Lengths, left: float) -> Labelling | str:
    """How long the share of the shards that is `left` will take, or in words why that isn't known."""
    best = speed(config, draft, fit, scheme, lengths)
    if best is None:
        return "how fast isn't known here yet: `tune` or a first run tells"
    if not lengths.tokens:
        return "none of the sampled rows can be asked"
    try:
        placed = replicas.require(config.cluster, fit.hardware)
    except ConfigError as error:  # a run would end with it; the rest of the plan is worth reading all the same
        return str(error)
    rate, rows = best.rate * len(placed.slots), sample.expected_rows(draft, config.input.limit)
    counted = 1000 if rows is None else math.ceil(rows * left)
    seconds = counted * (lengths.mean + best.answer) / rate
    return Labelling(seconds, rate, placed.devices, rows, best.source)


def deadline_words(config: Config, expected: Labelling | str, start: datetime) -> str:
    """Whether `run.deadline` would be met by a run that started at `start`, with the margin; honest where nobody knows.

    A run has until `cluster.grace_seconds` before it; start-up, quantizing and the gate aren't in the forecast.
    """
    asked = config.run.deadline or ""
    there = (deadline_after(asked, start) - start).total_seconds() - config.cluster.grace_seconds
    about = f"{asked}, so {duration(max(0.0, there))} until nothing new is asked"
    if there <= 0:
        return f"{asked} has passed, or is less than cluster.grace_seconds away: a run would end at once"
    if isinstance(expected, str) or expected.rows is None:
        why = expected if isinstance(expected, str) else "only reading tells how many rows there are"
        return f"{about}; whether it is met can't be told: {why}"
    if expected.seconds > there:
        return f"{about}; missed by about {duration(expected.seconds - there)} by that estimate; a resume goes on"
    spare = duration(there - expected.seconds)
    return f"{about}; met with about {spare} to spare, from which start-up, quantizing and the gate take theirs"


def speed(config: Config, draft: Plan, fit: Fit, scheme: Scheme, lengths: Lengths) -> Speed | None:
    """The best that is known of one replica; None if nothing is."""
    hardware = fit.hardware
    if last := recall(config, draft, hardware):
        return Speed(last.rate, last.answer, f"as a run reached on {last.date}")
    if answers.of(config.task).decodes:
        return None  # that depends on how long the answers are
    if config.tune.use and (measured := tuned.recall(config, draft, hardware)):
        return Speed(measured.rate, 1.0, f"as `tune` measured on {measured.date}")
    gpus = config.cluster.tensor_parallel_size * config.cluster.pipeline_parallel_size
    rate = forecast.of_scheme(fit, scheme, gpus)
    if rate is None:
        return None
    return Speed(min(rate, ROWS * (lengths.mean + 1)), 1.0, "a forecast")


def remember(config: Config, plan: Plan, hardware: Hardware, accounts: Iterable[ReplicaAccount], rows: int) -> None:
    """Cache what a run's replicas reached, for the next one's estimate; `accounts` with those of the gate.

    An engine that the gate asked has what it read of those rows in its cache: of a short run that isn't the speed.
    """
    accounts = tuple(accounts)
    gate = sum(r.phases.get("gate", 0.0) for r in accounts)
    worked = [(r, r.phases.get("infer", 0.0) + r.phases.get("idle", 0.0)) for r in accounts if r.counters.tokens]
    seconds = sum(time for _, time in worked)
    if not rows or seconds < max(LEAST, 10 * gate):
        return
    rate = sum(r.counters.tokens for r, _ in worked) / seconds
    answer = sum(r.counters.output_tokens for r, _ in worked) / rows
    reached = Throughput(round(rate, 1), round(answer, 2), f"{datetime.now(UTC):%Y-%m-%d}")
    local_cache.write("throughput", tuned.key(config, plan, hardware), dataclasses.asdict(reached))


def recall(config: Config, draft: Plan, hardware: Hardware) -> Throughput | None:
    """What the last run on this kind of machine reached with that model and scheme, if there was one."""
    return local_cache.read(
        "throughput", tuned.key(config, draft, hardware), lambda stored: restored(stored, Throughput)
    )
