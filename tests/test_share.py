"""share: how much of a corpus is labelled, and how long the rest takes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from batchq.job.share import Pace, Share

Rate = Callable[[float, float], float]  # of seconds and share: share per second


def left(seen: list[tuple[float, float | None]], before: float = 0.0) -> Any:
    """The forecast after these (seconds, share)."""
    pace = Pace(before)
    for elapsed, share in seen:
        pace.note(elapsed, share)
    return pace.seconds_left()


FRESH = Share(shards=10, shards_before=0, rows_before=0, expected_rows=1000, streams=False, limited=False)


@pytest.mark.parametrize(
    ("live", "committed", "shards", "share"),
    [(0, 0, 0, 0.0), (250, 0, 0, 0.25), (250, 200, 2, 0.25), (500, 400, 2, 0.25), (5000, 1000, 10, 1.0)],
    ids=["nothing", "by the expected rows", "by the rows of done shards", "shards twice as large", "never above 1"],
)
def test_shards_are_counted_and_what_is_under_way_by_their_rows(
    live: int, committed: int, shards: int, share: float
) -> None:
    assert FRESH.now(live, committed, shards) == pytest.approx(share)


def test_a_resume_begins_with_what_was_committed() -> None:
    resumed = dataclasses.replace(FRESH, shards_before=4, rows_before=400)
    assert resumed.at_start() == 0.4
    assert resumed.now(300, 200, 2) == pytest.approx(0.7)
    # 0.3 of the corpus in 30 s, and 0.3 is left: what stood before took none of this invocation's time
    assert left([(30.0, 0.7)], before=resumed.at_start()) == pytest.approx(30.0)


def test_whole_files_and_limits_are_counted_by_rows() -> None:
    limited = dataclasses.replace(FRESH, limited=True, rows_before=100)
    assert limited.at_start() == 0.1 and limited.now(200, 0, 0) == pytest.approx(0.3)
    streams = dataclasses.replace(FRESH, streams=True)
    assert streams.now(5000, 0, 0) == 0.99, "there may be more rows than the heads of the files made likely"


def test_what_cannot_be_told_is_none() -> None:
    unknown = dataclasses.replace(FRESH, expected_rows=None, streams=True)
    assert unknown.now(100, 0, 0) is None and left([(30.0, None)]) is None
    assert left([(30.0, 0.0)]) is None, "nothing was gained yet"
    assert left([(1.0, 0.5)]) is None, "a second of answers says nothing"
    assert left([(30.0, 1.0)]) == 0.0


def half_join_after(minutes: float) -> Rate:
    """Of a fleet that labels the corpus in two hours."""
    return lambda seconds, share: (1 if seconds > 60 * minutes else 0.5) / 7200


RUNS: dict[str, tuple[Rate, tuple[float, float, float]]] = {  # how far off at 10, 50 and 90%, in parts of the run
    "steady": (lambda seconds, share: 1 / 7200, (0.01, 0.01, 0.01)),
    "half of the replicas join after ten minutes": (half_join_after(10), (0.8, 0.01, 0.01)),
    "half of the replicas join after half an hour": (half_join_after(30), (0.9, 0.01, 0.01)),
    "half are lost at 30%": (lambda seconds, share: (1 if share < 0.3 else 0.5) / 7200, (0.45, 0.01, 0.01)),
    "a replica of two is away for five minutes": (
        lambda seconds, share: (0.5 if 3300 < seconds < 3600 else 1) / 7200,
        (0.03, 0.08, 0.01),
    ),
    "5% are copied at once": (lambda seconds, share: (10 if share < 0.05 else 1) / 7200, (0.01, 0.01, 0.01)),
    "rows get longer, twice at the end": (lambda seconds, share: 1 / (1 + share) / 7200, (0.3, 0.1, 0.02)),
    "the last 5% are one replica's": (lambda seconds, share: (1 if share < 0.95 else 0.4) / 7200, (0.08, 0.08, 0.07)),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("noise", [0.0, 0.5], ids=["even", "noisy"])
def test_a_forecast_against_the_truth_at_10_and_50_and_90_percent(name: str, noise: float) -> None:
    """What can't be foreseen (nodes that join, rows that get longer) is off by what it changes, and soon forgotten."""
    rate, bounds = RUNS[name]
    luck, pace = random.Random(0), Pace(0.0)
    seen: list[tuple[float, float | None]] = [(0.0, None)]
    seconds = share = 0.0
    while share < 1:
        seconds += 1.0
        share = min(1.0, share + rate(seconds, share) * luck.uniform(1 - noise, 1 + noise))
        pace.note(seconds, share)
        seen.append((seconds, pace.seconds_left()))
    assert len(pace._seen) < 200, "of a long run only some hundred samples are kept"
    for at, bound in zip((0.1, 0.5, 0.9), bounds, strict=True):
        now, forecast = seen[round(at * (len(seen) - 1))]
        assert forecast is not None
        assert abs(forecast - (seconds - now)) <= (bound + noise / 20) * seconds, f"at {at:.0%}"


def test_a_pace_that_stands_still_is_noticed_between_samples() -> None:
    seen: list[tuple[float, float | None]] = [(float(second), second / 20_000) for second in range(1, 10_001)]
    stuck: list[tuple[float, float | None]] = [(10_000.0 + second, 0.5) for second in range(1, 30)]
    assert left([*seen, *stuck]) > left(seen) + 50
