"""status: at work or not, by the lease's beats on a clock of its own; how far; and how to wait for the end."""

from __future__ import annotations

import json
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchq.account.ledger import Invocation
from batchq.account.usage import Standing
from batchq.cli import main, status
from batchq.config import Config
from batchq.errors import StorageError
from batchq.job import session
from batchq.output import lease
from tests.helpers import rows_of, write_jsonl
from tests.jobs import OneWorker, planned

STANDING = Standing(
    rows=1_234_567,
    failures=12,
    truncated=0,
    share=0.31,
    seconds_left=18_753.0,
    tokens_per_second=51_234.0,
    rows_per_second=31.0,
    replicas=8,
    shards_done=1,
    failures_by_code={"too_long": 12},
    seconds_to_spare=-2400.0,
)


class Clock:
    """Time that passes when a test says so, or by a step at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def hold(output: Path, run: str = "") -> lease.Lease:
    return lease.Lease(str(output), lambda _: None, threading.Event(), threading.Event(), run)


def stop_heart(held: lease.Lease) -> None:
    held._over.set()
    held._thread.join()


# ---- at work, or not ----


@pytest.fixture
def beating(tmp_path: Path) -> lease.Lease:
    held = hold(tmp_path / "out")
    stop_heart(held)
    return held


def test_beats_that_rise_are_life_and_silence_is_death(beating: lease.Lease) -> None:
    clock = Clock()
    heart = lease.Heart(beating.folder, 1, clock)
    assert heart.look() is None and heart.watch_seconds == 8, "too early to tell"
    clock.now = 7.9
    assert heart.look() is None
    beating._write(over=False)
    assert heart.look() is True
    clock.now += 7.9
    assert heart.look() is True and heart.silent_seconds == pytest.approx(7.9)
    clock.now += 0.2
    assert heart.look() is False and not heart.over
    beating._write(over=False)
    assert heart.look() is True, "it was only suspended"
    beating._write(over=True)
    assert heart.look() is False and heart.over


def test_a_heart_that_never_beats_is_dead_after_four_beats(beating: lease.Lease) -> None:
    clock = Clock()
    heart = lease.Heart(beating.folder, 1, clock)
    assert heart.look() is None
    clock.now = 8.0
    assert heart.look() is False


def test_a_record_that_is_rewritten_is_a_sign_of_life_too(beating: lease.Lease) -> None:
    heart = lease.Heart(beating.folder, 1, Clock())
    assert heart.look(sign=15.0) is None and heart.look(sign=15.0) is None
    assert heart.look(sign=30.0) is True


def test_a_lease_that_was_forgotten_is_over(beating: lease.Lease) -> None:
    heart = lease.Heart(beating.folder, 1, Clock())
    assert heart.look() is None
    beating.close(forget=True)
    assert heart.look() is False and heart.over


# ---- what is said ----


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(status, "REDRAW_SECONDS", 0.01)
    monkeypatch.setattr(lease, "BEAT_SECONDS", (0.05, 0.05))


@pytest.fixture
def at_work(project: Path, compose: Callable[..., Config], quick: None) -> Iterator[tuple[lease.Lease, Invocation]]:
    """A driver that labels: its lease beats, and its record stands."""
    write_jsonl(project / "rows.jsonl", rows_of(60))
    planned(compose())
    invocation = Invocation(str(project / "out"), "mine")
    held = hold(project / "out", invocation.id)
    invocation.update((), 2, STANDING)
    yield held, invocation
    stop_heart(held)


ASKED = ["job=mine", "engine=fake"]


def test_a_run_at_work_says_how_far_it_is_and_when_it_is_done(
    at_work: tuple[lease.Lease, Invocation], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", *ASKED]) == 0
    said = capsys.readouterr().out
    assert " · running · 1 of 3 shards committed" in said and "not running" not in said
    assert "1,234,567 (31%), 12 failures (12 too_long)" in said
    assert "ETA 5:12:33, late by 40:00 · 31 rows/s · 51,234 tokens/s · 8 replicas" in said
    assert "lost       2 replicas" in said


FIELDS = {
    *("job", "date", "output", "running", "since", "run", "started", "driver", "heartbeat_seconds", "as_of_seconds"),
    *("shards", "shards_done", "rows", "failures", "failures_by_code", "truncated", "share", "seconds_left"),
    *("tokens_per_second", "rows_per_second", "replicas", "replicas_lost", "deadline", "seconds_to_spare"),
    *("cost", "currency", "exit_code", "reason"),
}


def figures(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_has_the_same_fields_at_work_and_afterwards(
    at_work: tuple[lease.Lease, Invocation], capsys: pytest.CaptureFixture[str]
) -> None:
    held, invocation = at_work
    assert main(["status", *ASKED, "--json"]) == 0
    found = figures(capsys)
    assert set(found) == FIELDS and found["running"] and found["since"] is None and found["exit_code"] is None
    assert (found["rows"], found["share"], found["seconds_to_spare"]) == (1_234_567, 0.31, -2400.0)
    assert found["run"] == invocation.id and found["heartbeat_seconds"] < 1
    invocation.complete(4)
    held.close()
    assert main(["status", *ASKED, "--json"]) == 0
    found = figures(capsys)
    assert set(found) == FIELDS and not found["running"] and found["since"]
    assert (found["exit_code"], found["rows"], found["shards_done"]) == (4, 0, 0), "only what is committed counts"


def test_each_field_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs/operations.md").read_text()
    assert not [field for field in FIELDS if f"`{field}`" not in page]


def test_a_driver_that_died_isnt_running(
    at_work: tuple[lease.Lease, Invocation], capsys: pytest.CaptureFixture[str]
) -> None:
    held, _ = at_work
    stop_heart(held)
    assert main(["status", *ASKED]) == 0
    said = capsys.readouterr()
    assert "· not running since 20" in said.out and " · running" not in said.out
    assert "ended      without a word: it was killed" in said.out
    assert said.err.startswith("batchq: watching up to 0 s whether process ")
    assert main(["status", *ASKED, "--wait"]) == 1
    assert "it didn't say how it ended" in capsys.readouterr().err


def test_a_configuration_that_the_next_run_would_be_refused_with(
    compose: Callable[..., Config], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(4))
    planned(compose())
    assert main(["status", *ASKED]) == 0
    assert "refused" not in capsys.readouterr().out
    assert main(["status", *ASKED, "task.system=Be strict.", "input.limit=2"]) == 0
    told = "refused    with this configuration, which has another task.prompt or task.system; input.path, input.limit"
    assert told in capsys.readouterr().out


def test_waiting_ends_with_the_runs_own_exit_code(
    at_work: tuple[lease.Lease, Invocation], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held, invocation = at_work
    looks = [0]

    def look_again(_: float) -> None:
        looks[0] += 1
        if looks[0] == 3:
            invocation.complete(4)
            held.close()

    monkeypatch.setattr(time, "sleep", look_again)
    monkeypatch.setattr(lease, "WATCH_BEATS", 400)
    assert main(["status", *ASKED, "--wait"]) == 4
    assert looks[0] == 3 and "ended      complete, exit code 4" in capsys.readouterr().out
    assert main(["status", *ASKED, "--wait", "--watch"]) == 4, "at once"


def test_watching_shows_a_line_each_time_and_ends_with_the_run(
    at_work: tuple[lease.Lease, Invocation], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held, invocation = at_work
    monkeypatch.setattr(lease, "WATCH_BEATS", 400)
    shown: list[str] = []

    def look_again(_: float) -> None:
        shown.extend(capsys.readouterr().out.splitlines())
        if len(shown) >= 3:
            invocation.complete(0)
            held.close()

    monkeypatch.setattr(time, "sleep", look_again)
    assert main(["status", *ASKED, "--watch"]) == 0
    assert all(line.startswith("1,234,567 rows (31%) · ETA 5:12:33, late by 40:00 · 12 failures") for line in shown)
    assert all(len(line) < 80 for line in shown)
    assert "· not running since" in capsys.readouterr().out


def test_watching_for_programs_is_an_object_a_line_and_leaving_is_no_exit_code_of_a_run(
    at_work: tuple[lease.Lease, Invocation], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease, "WATCH_BEATS", 400)
    looks: list[float] = []

    def leave(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 4:
            raise KeyboardInterrupt

    assert main(["status", *ASKED]) == 0, "it is known to be at work"
    capsys.readouterr()
    monkeypatch.setattr(time, "sleep", leave)
    monkeypatch.setattr(status, "POLL_SECONDS", 0.0)
    with pytest.raises(SystemExit) as left:
        main(["status", *ASKED, "--watch", "--wait", "--json"])
    assert left.value.code == 130
    assert all(set(json.loads(line)) == FIELDS for line in capsys.readouterr().out.splitlines())


def test_a_store_that_cannot_be_read_for_a_while_ends_no_wait(
    at_work: tuple[lease.Lease, Invocation], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held, invocation = at_work
    monkeypatch.setattr(lease, "WATCH_BEATS", 400)
    looks = [0]

    def look(self: status.Watcher, known: Callable[[status.Watcher], None] = status.Watcher.look) -> None:
        looks[0] += self.at_work is True
        if looks[0] in (1, 2):
            raise StorageError("the store doesn't answer")
        if looks[0] == 3:
            invocation.complete(0)
            held.close()
        known(self)

    monkeypatch.setattr(status.Watcher, "look", look)
    assert main(["status", *ASKED, "--wait"]) == 0
    assert capsys.readouterr().err.count("the store doesn't answer; trying again") == 2


def test_what_never_began_has_nothing_to_wait_for(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", *ASKED, "--wait"]) == 1
    assert "no run has been planned there yet" in capsys.readouterr().err
    assert main(["plan", *ASKED, "--wait"]) == 2
    assert "--wait: goes with status, not with plan" in capsys.readouterr().err


def test_the_pages_commands(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs/operations.md").read_text().replace("s3://bucket/labelled", "out")
    commands = [shlex.split(c, comments=True) for c in re.findall(r"^python -m batchq (.*)$", page, re.M)]
    assert len(commands) == 9
    mine = (project / "conf/job/mine.yaml").read_text()
    (project / "conf/job/tickets.yaml").write_text(mine.replace("name: mine", "name: tickets"))
    write_jsonl(project / "rows.jsonl", rows_of(5))
    monkeypatch.setattr(session, "Pool", OneWorker)
    for command in commands:  # `plan` and the run itself come first
        assert main([*command, *(["engine=fake"] if "job=tickets" in command else [])]) == 0, command
    said = capsys.readouterr().out
    assert "  deadline   06:00 Europe/Berlin, so " in said and said.count("· not running since") == 4


def test_a_run_leaves_its_exit_code_and_how_far_it_was(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(60))
    monkeypatch.setattr(session, "Pool", OneWorker)
    assert main(ASKED) == 0
    (path,) = (project / "out/meta/runs").glob("*.json")
    record = json.loads(path.read_text())
    assert (record["state"], record["exit_code"]) == ("complete", 0)
    assert (record["standing"]["rows"], record["standing"]["shards_done"]) == (60, 3)
    capsys.readouterr()
    assert main(["status", *ASKED, "--wait", "--json"]) == 0
    found = figures(capsys)
    assert (found["rows"], found["share"], found["run"]) == (60, 1.0, record["id"])
