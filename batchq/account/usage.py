"""What one replica held and did, and the record of one invocation. Pure: no clock but the one passed in."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from batchq.records import restored

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
    """Rows and tokens that an engine worked on, committed or not. The counters of several engines add up."""

    rows: int = 0  # answers and failures
    failures: int = 0  # of these
    tokens: int = 0  # prompt and output
    computed_tokens: int = 0  # of these, what the model's layers had to compute: see `computed_tokens`
    output_tokens: int = 0
    kv_tokens_read: int = 0  # tokens whose keys and values were read for the output: see `kv_tokens_read`
    truncated: int = 0  # answers that were cut off
    cached_tokens: int = 0  # of prompts, that an engine's prefix cache held
    failures_by_code: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Counters) -> Counters:
        return Counters(
            rows=self.rows + other.rows,
            failures=self.failures + other.failures,
            tokens=self.tokens + other.tokens,
            computed_tokens=self.computed_tokens + other.computed_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            kv_tokens_read=self.kv_tokens_read + other.kv_tokens_read,
            truncated=self.truncated + other.truncated,
            failures_by_code=dict(Counter(self.failures_by_code) + Counter(other.failures_by_code)),
            cached_tokens=self.cached_tokens + other.cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class ReplicaAccount:
    """One engine's life. `devices`: accelerators that it held, or cores where there is none; each has its price."""

    accelerator: str
    devices: int
    phases: dict[str, float]  # seconds of wall clock
    cpu: dict[str, float] = field(default_factory=dict)  # seconds of reading, tokenising, writing beside it
    counters: Counters = Counters()
    joules: float | None = None  # that its devices took since its engine was ready; None where nothing counts them
    phase: str = ""  # that it is in, while it holds its devices; empty once it has ended

    def later(self, seconds: float) -> ReplicaAccount:
        """The same so many seconds later, if it still holds its devices."""
        if not self.phase:
            return self
        held = round(self.phases.get(self.phase, 0.0) + seconds, 3)
        return replace(self, phases={**self.phases, self.phase: held})

    @property
    def device_seconds(self) -> float:
        """What is paid for: every device, for as long as it was held."""
        return self.devices * sum(self.phases.values())


@dataclass(frozen=True, slots=True)
class Rate:
    """What an hour of one device of that name was booked at, and by which key of the price list; None: it had none."""

    accelerator: str
    key: str
    per_hour: float | None


@dataclass(frozen=True, slots=True)
class Rated:
    """The prices that an invocation was booked at, fixed when its record was last written."""

    at: str  # UTC, ISO 8601
    currency: str
    as_of: str  # date of the price list
    source: str
    rates: tuple[Rate, ...]


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a run is, as its record says while it works: when the record's `wall_seconds` were over."""

    rows: int  # answers and failures, those of earlier invocations too, committed or not
    failures: int
    truncated: int
    share: float | None  # of the corpus, 0 to 1; None where it can't be told
    seconds_left: float | None  # of labelling
    tokens_per_second: float | None
    rows_per_second: float | None
    replicas: int
    shards_done: int = 0
    failures_by_code: dict[str, int] = field(default_factory=dict)
    seconds_to_spare: float | None = None  # before the deadline, negative if it is missed; None without one


@dataclass(frozen=True, slots=True)
class RunAccount:
    """One invocation: meta/runs/<id>.json, rewritten by its only owner while it works.

    `state`: "running" (or killed since), "complete", "stopped", "refused" (by the gate), "failed" or "killed". `verb`:
    which command it was; what others than `run` cost is reported apart.
    """

    id: str
    state: str
    started: str  # UTC, ISO 8601; for people, nothing is decided by it
    wall_seconds: float
    replicas: tuple[ReplicaAccount, ...]
    lost_replicas: int = 0
    reached: dict[str, float] = field(default_factory=dict)  # what of the start-up, and seconds from the start
    flop_per_token: float | None = None  # of what was served; None where it isn't known
    peak_flops: float | None = None  # per second and device, dense, in the precision that it multiplies in
    weight_bytes_per_output_token: float | None = None  # read at least; None where no text is generated
    kv_bytes_per_token: int | None = None  # of keys and values
    peak_bandwidth: float | None = None  # bytes of memory per second and device
    verb: str = "run"
    job: str = ""
    output: str = ""
    exit_code: int | None = None  # None while it works, after a kill, and in records of before there was this field
    standing: Standing | None = (
        None  # None before the first row is asked, and in records of before there was this field
    )
    deadline: str | None = None  # the moment that run.deadline meant, UTC, ISO 8601
    reason: str = ""  # the line that was printed of the error that ended it
    number: int = (
        0  # of an output's runs, in their order; 0 for other verbs, and in records of before there was this field
    )
    rewritten_in: float = 0.0  # seconds from one rewrite to the next while it works
    rated: Rated | None = None  # None in records of before there was this field


def killed(run: RunAccount, seconds: float, reason: str) -> RunAccount:
    """What a run has come to that was killed so many seconds after its account was made: what it held then, it held
    until it died."""
    ended = tuple(replace(replica.later(seconds), phase="") for replica in run.replicas)
    wall = round(run.wall_seconds + seconds, 3)
    return replace(run, state="killed", wall_seconds=wall, replicas=ended, reason=reason)


def computed_tokens(prompt: int, cached: int, output: int) -> int:
    """Tokens of one answer that went through the layers: a cached one doesn't, nor does the last, which nothing
    follows."""
    return prompt - cached + max(0, output - 1)


def kv_tokens_read(prompt: int, cached: int, output: int) -> int:
    """Tokens whose keys and values are read to generate one answer, at least: for each output token after the first
    all tokens before it. Without cached ones, which may be read once for many rows."""
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
