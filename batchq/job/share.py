"""How much of a corpus is labelled, and how long the rest will take. Pure arithmetic."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

LEAST_SECONDS = 2.0  # of answers, before a rate says anything
LEAST_WINDOW = 60.0  # seconds
WINDOW = 1 / 3  # of the time since the first answer
SAMPLES = 300  # of all that time


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


class Pace:
    """How fast a share grows, from the last third of the time so far, LEAST_WINDOW at least.

    Replicas that start one after the other, join or are lost, and rows that were copied at once, are soon forgotten:
    where half of 8 replicas came after the first 30 minutes of a run, the mean over all of it is 23% of the run off at
    its half, this exact. A third is the shortest that steady noise of +-50% moves by less than 3% at a tenth.
    """

    def __init__(self, share: float) -> None:
        """`share` when the first answer came."""
        self._last = (0.0, share)  # seconds, share
        self._seen = deque([self._last])  # in the window; some hundred at most

    def note(self, elapsed: float, share: float | None) -> None:
        """`elapsed`: seconds since the first answer; `share`: of the corpus, None where it can't be told."""
        if share is None:
            return
        self._last = (elapsed, share)
        if elapsed - self._seen[-1][0] >= elapsed / SAMPLES:
            self._seen.append(self._last)
        begin = elapsed - max(LEAST_WINDOW, elapsed * WINDOW)
        while len(self._seen) > 1 and self._seen[1][0] <= begin:
            self._seen.popleft()

    def seconds_left(self) -> float | None:
        """Time to go at the pace so far; None where nothing is known yet."""
        (began, before), (elapsed, share) = self._seen[0], self._last
        if elapsed < LEAST_SECONDS or share <= before:
            return None
        return (1 - share) / (share - before) * (elapsed - began)
