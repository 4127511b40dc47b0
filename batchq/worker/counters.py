"""What a worker has answered so far: counted row by row, and as it is told to the driver."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from batchq.account.usage import Counters, computed_tokens, kv_tokens_read
from batchq.records import Answer, Failure


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far a worker is; counts everything it answered, committed or not."""

    phase: str
    phases: dict[str, float]
    cpu: dict[str, float]
    counters: Counters
    lowered: int = 0  # rows that may be in flight since memory ran short; 0: as many as were asked for
    first: float | None = None  # seconds since the first answer
    joules: float | None = None  # that its GPUs took since the engine was ready, where that is counted
    in_flight: int = 0  # rows that the engine has at the moment


@dataclass(slots=True)
class Tally:
    """Counters in the making: adding up frozen ones for each row would take five times as long as this does."""

    rows: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # by code
    tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    kv_tokens_read: int = 0
    truncated: int = 0
    first: float | None = None  # when the first answer came, on time.monotonic()'s clock

    def answered(self, answer: Answer, truncated: bool) -> None:
        """Add what a row's answer took; `rows` is counted elsewhere, when the row is over."""
        prompt, cached, output = answer.prompt_tokens, answer.cached_tokens, answer.output_tokens
        if self.first is None:
            self.first = time.monotonic()
        self.truncated += truncated
        self.tokens += prompt + output
        self.cached_tokens += cached
        self.computed_tokens += computed_tokens(prompt, cached, output)
        self.output_tokens += output
        self.kv_tokens_read += kv_tokens_read(prompt, cached, output)

    def not_asked(self, outcome: Answer | Failure | None, truncated: bool = False) -> None:
        """Count a row that needs no engine: it failed before, or another attempt or run has answered it."""
        self.rows += 1
        if isinstance(outcome, Failure):
            self.failures[outcome.code] += 1
        self.truncated += truncated

    def counters(self) -> Counters:
        return Counters(
            rows=self.rows,
            failures=self.failures.total(),
            tokens=self.tokens,
            computed_tokens=self.computed_tokens,
            output_tokens=self.output_tokens,
            kv_tokens_read=self.kv_tokens_read,
            truncated=self.truncated,
            cached_tokens=self.cached_tokens,
            failures_by_code=dict(self.failures),
        )
