"""share: how much of a corpus is labelled, and how long the rest takes."""

from __future__ import annotations

import dataclasses

import pytest

from batchq.job.share import Share

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
    assert resumed.seconds_left(0.7, 30.0) == pytest.approx(30.0)


def test_whole_files_and_limits_are_counted_by_rows() -> None:
    limited = dataclasses.replace(FRESH, limited=True, rows_before=100)
    assert limited.at_start() == 0.1 and limited.now(200, 0, 0) == pytest.approx(0.3)
    streams = dataclasses.replace(FRESH, streams=True)
    assert streams.now(5000, 0, 0) == 0.99, "there may be more rows than the heads of the files made likely"


def test_what_cannot_be_told_is_none() -> None:
    unknown = dataclasses.replace(FRESH, expected_rows=None, streams=True)
    assert unknown.now(100, 0, 0) is None and unknown.seconds_left(None, 30.0) is None
    assert FRESH.seconds_left(0.0, 30.0) is None, "nothing was gained yet"
    assert FRESH.seconds_left(0.5, 1.0) is None, "a second of answers says nothing"
    assert FRESH.seconds_left(1.0, 30.0) == 0.0
