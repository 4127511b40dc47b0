"""run.deadline: which moment it means, who is told when it is at risk, and what ends when it comes."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from batchq.cli import main
from batchq.config import Config, deadline_after
from batchq.job import run, session
from batchq.job.deadline import Risk
from batchq.sizing import estimate
from tests.helpers import rows_of, write_jsonl
from tests.jobs import OneWorker

BERLIN = "Europe/Berlin"


@pytest.mark.parametrize(
    ("deadline", "start", "moment"),
    [
        (f"06:00 {BERLIN}", "2026-11-30T23:00Z", "2026-12-01T05:00Z"),
        (f"06:00 {BERLIN}", "2026-11-30T05:00Z", "2026-12-01T05:00Z"),  # it is six just now: the next time
        (f"06:00 {BERLIN}", "2026-11-30T04:59:59Z", "2026-11-30T05:00Z"),
        (f"06:00 {BERLIN}", "2026-03-28T20:00Z", "2026-03-29T04:00Z"),  # summer time begins in that night
        (f"06:00 {BERLIN}", "2026-10-24T20:00Z", "2026-10-25T05:00Z"),  # and ends in that
        (f"02:30 {BERLIN}", "2026-03-28T20:00Z", "2026-03-29T01:00Z"),  # the clock skips it
        (f"02:30 {BERLIN}", "2026-10-24T20:00Z", "2026-10-25T00:30Z"),  # the clock shows it twice
        (f"02:30 {BERLIN}", "2026-10-25T00:30Z", "2026-10-25T01:30Z"),
        (f"02:30 {BERLIN}", "2026-10-25T01:30Z", "2026-10-26T01:30Z"),
        ("0:15 Asia/Kathmandu", "2026-03-28T20:00Z", "2026-03-29T18:30Z"),
        ("12:00 Pacific/Apia", "2011-12-29T23:00Z", "2011-12-30T10:00Z"),  # the day that Samoa left out
        ("06:00 UTC", "2026-11-30T23:00-05:00", "2026-12-01T06:00Z"),
        ("2026-12-01T06:00+01:00", "2026-11-30T23:00Z", "2026-12-01T05:00Z"),
        ("2026-12-01 06:00:30Z", "2030-01-01T00:00Z", "2026-12-01T06:00:30Z"),
        ("8h", "2026-03-28T20:00Z", "2026-03-29T04:00Z"),
        ("1d2h3m4s", "2026-03-28T20:00Z", "2026-03-29T22:03:04Z"),
    ],
)
def test_a_deadline_is_a_moment(deadline: str, start: str, moment: str) -> None:
    assert deadline_after(deadline, datetime.fromisoformat(start)) == datetime.fromisoformat(moment)


@pytest.mark.parametrize(
    ("deadline", "said"),
    [
        ("06:00", "whose clock? Say 06:00 UTC, or a zone"),
        ("25:00 UTC", "a clock shows 00:00 to 23:59"),
        ("06:00 Europe/Berln", "no time zone Europe/Berln; did you mean Europe/Berlin?"),
        ("06:00 ../../etc/passwd", "no time zone ../../etc/passwd; zones are called as"),
        ("2026-12-01T06:00", "its offset is missing, as in 2026-12-01T06:00+01:00"),
        ("2026-13-01T06:00Z", "month must be in 1..12; say HH:MM ZONE"),
        ("8 hours", "say HH:MM ZONE as 06:00 Europe/Berlin, a moment with its offset"),
        ("0h", "must be above 0"),
        ("99999999999999d", "below a century"),
        ("", "say HH:MM ZONE"),
    ],
)
def test_what_is_no_deadline_is_refused_in_one_line(
    deadline: str, said: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "job=mine", f'run.deadline="{deadline}"']) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"batchq: run.deadline={deadline}".rstrip()) and said in line


def test_a_deadline_needs_no_quotes_but_the_shells(compose: Callable[..., Config]) -> None:
    for deadline in (f"06:00 {BERLIN}", "2026-12-01T06:00+01:00", "8h", "90m"):
        assert compose(f"run.deadline={deadline}").run.deadline == deadline


# ---- at risk, or no longer ----


def changes(needed: Callable[[float], float | None], seconds: int, there: float) -> list[tuple[int, bool]]:
    """(when, whether at risk) of each change within so many seconds, looked at once a second."""
    risk, found = Risk(), []
    for now in range(seconds):
        if risk.look(float(now), needed(now), there - now):
            found.append((now, risk.at_risk))
    return found


def test_a_forecast_that_stays_late_is_told_once() -> None:
    assert changes(lambda now: 10_000 - now / 2, 5000, there=8000) == [(30, True)]


def test_a_risk_that_goes_is_told_too_once_there_is_some_to_spare() -> None:
    def needed(now: float) -> float:  # half as fast between 1,000 and 2,000 s
        return (7000 - now) * (2 if 1000 <= now < 2000 else 1)

    assert changes(needed, 5000, there=8000) == [(1030, True), (2030, False)]


def test_a_moment_of_noise_and_a_forecast_at_the_border_are_not_told_again_and_again() -> None:
    assert changes(lambda now: 20_000 if 1000 <= now < 1025 else 7000 - now, 5000, there=8000) == []
    luck = random.Random(0)
    border = changes(lambda now: (8000 - now) * luck.uniform(0.97, 1.03), 7900, there=8000)
    assert len(border) <= 1, border
    assert changes(lambda now: None, 5000, there=8000) == [], "where there is no forecast, nobody is told"


def test_a_short_run_is_told_sooner() -> None:
    assert changes(lambda now: 100, 50, there=60) == [(6, True)]


# ---- what `plan` says ----


def planned(config: Config, expected: Any) -> str:
    return estimate.deadline_words(config, expected, datetime(2026, 11, 30, 23, tzinfo=UTC))


def test_a_plan_says_whether_it_is_met_and_by_how_much(compose: Callable[..., Config]) -> None:
    """Six hours until six in Berlin, less 25 s."""
    config = compose(f"run.deadline=06:00 {BERLIN}")
    four = estimate.Labelling(4 * 3600.0, 1000.0, 1, 1000, "a forecast")
    assert "so 5:59:35 until nothing new is asked; met with about 1:59:35 to spare" in planned(config, four)
    seven = estimate.Labelling(7 * 3600.0, 1000.0, 1, 1000, "a forecast")
    assert "missed by about 1:00:25" in planned(config, seven)
    assert "whether it is met can't be told: how fast isn't known" in planned(config, "how fast isn't known here yet")
    uncounted = estimate.Labelling(7.0, 1000.0, 1, None, "a forecast")
    assert "can't be told: only reading tells how many rows" in planned(config, uncounted)
    assert "has passed" in planned(compose("run.deadline=2026-11-30T22:00Z"), four)


def test_the_plan_shows_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    assert main(["plan", "job=mine", "engine=fake", "run.deadline=8h"]) == 0
    assert "  deadline   8h, so 7:59:3" in capsys.readouterr().out


# ---- when it comes ----

SLOW = ["job=mine", "engine=fake", "cluster.grace_seconds=1", "+engine.options.tokens_per_s=3000"]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "Pool", OneWorker)


@pytest.mark.usefixtures("without_ray")
def test_a_deadline_cuts_a_run_and_the_same_command_goes_on(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(600))
    assert main([*SLOW, "run.deadline=3s"]) == 6
    told = capsys.readouterr().err
    assert "UTC, in 0:0" in told, "the moment that it means"
    last = told.splitlines()[-1]
    assert last.startswith("batchq: run.deadline=3s: its time has come; ") and " are committed or saved" in last
    assert "the same command with a later one, or with run.deadline=null, goes on" in last
    (record,) = (json.loads(path.read_text()) for path in (project / "out/meta/runs").glob("*.json"))
    assert (record["state"], record["exit_code"]) == ("stopped", 6) and record["deadline"]
    assert 0 < record["standing"]["rows"] < 600

    assert main(["job=mine", "engine=fake", "run.deadline=8h"]) == 0
    assert "600 = 600 answers" in capsys.readouterr().out
    assert main(["verify", "job=mine", "engine=fake"]) == 0
    assert main(["job=mine", "engine=fake", "run.deadline=2020-01-01T00:00Z"]) == 0, "what is done is reported"


@pytest.mark.usefixtures("without_ray")
def test_a_deadline_that_has_passed_starts_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    for deadline in ("2020-01-01T00:00Z", "1s"):
        assert main([*SLOW, f"run.deadline={deadline}"]) == 6
        assert "nothing was labelled by this invocation" in capsys.readouterr().err
    assert not (project / "out/meta/plan.json").exists()


@pytest.mark.usefixtures("without_ray")
def test_a_sweep_has_one_deadline(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(400))
    assert main([*SLOW, "run.deadline=2s", "-m", "output.path=one,two,three"]) == 6
    # The second and the third; on a busy machine two seconds are over before the first has asked a row.
    assert capsys.readouterr().err.count("nothing was labelled by this invocation") >= 2


@pytest.mark.usefixtures("without_ray")
def test_a_deadline_holds_while_the_model_is_fetched(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    over = threading.Event()
    monkeypatch.setattr(run, "CACHED_WITHIN_SECONDS", 0.05)
    monkeypatch.setattr(run, "resolve_for", lambda config: over.wait(60))
    assert main([*SLOW, "run.deadline=2s"]) == 6
    over.set()
    assert "nothing was labelled by this invocation" in capsys.readouterr().err
