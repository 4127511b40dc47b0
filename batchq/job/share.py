"""How much of a corpus is labelled, and how long the rest will take. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_SECONDS = 2.0  # of answers, before a rate says anything


@dataclass(frozen=True, slots=True)
class Share:
    """What was committed when an invocation began, and what the corpus is like.

    `expected_rows`: about how many rows the whole corpus has, None where nobody can tell. `streams`: some shards are
    whole files, of as many rows as each happens to have. `limited`: input.limit cuts the corpus to a number of rows.
    """

    shards: int
    shards_before: int  # committed by earlier invocations
    rows_before: int
    expected_rows: int | None
    streams: bool
    limited: bool

    @property
    def by_rows(self) -> bool:
        """Whether rows are counted rather than shards: where shards aren't of about equal size."""
        return self.streams or self.limited

    def at_start(self) -> float:
        """The share that was committed when this invocation began, 0 to 1."""
        if self.by_rows:
            return self.rows_before / max(1, self.expected_rows or 0)
        return self.shards_before / max(1, self.shards)

    def now(self, live_rows: int, committed_rows: int, committed_shards: int) -> float | None:
        """The share now, 0 to 1; None where it can't be told. All three counts are of this invocation alone;
        `live_rows`: answered, committed or not."""
        if self.expected_rows is None:
            return None
        if self.by_rows:
            most = 0.99 if self.streams else 1.0  # a file may hold more rows than its head made likely
            return min(most, (self.rows_before + live_rows) / max(1, self.expected_rows))
        shards_done = self.shards_before + committed_shards
        rows_per_shard = self.expected_rows / max(1, self.shards)
        if shards_done:
            rows_per_shard = (self.rows_before + committed_rows) / shards_done or rows_per_shard
        return min(1.0, self.at_start() + live_rows / max(1.0, rows_per_shard) / max(1, self.shards))

    def seconds_left(self, share_now: float | None, elapsed: float) -> float | None:
        """Time to go at the speed so far; None where nothing is known yet. `elapsed`: seconds since the first answer of
        this invocation."""
        if share_now is None:
            return None
        gained = share_now - self.at_start()
        if gained <= 0 or elapsed < LEAST_SECONDS:
            return None
        return (1 - share_now) / gained * elapsed
