"""What is held is on record however a run ends, and what it leaves is a report."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from batchq import storage
from batchq.account import ledger
from batchq.account.ledger import Invocation
from batchq.account.usage import ReplicaAccount, RunAccount
from batchq.cli import main
from batchq.output import layout
from batchq.pool.handles import EngineClock, SampleClock
from batchq.records import sealed
from tests.helpers import processes_below, rows_of, wait_for, write_jsonl

ROOT = Path(__file__).parent.parent
PRICED = ["job=mine", "engine=fake", "pricing.per_hour.cpu_core=36"]
DYING_SECONDS = 20.0


class Ticks:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def start(project: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "batchq", *PRICED, *overrides],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(done: Callable[[], bool], seconds: float = DYING_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)  # polling other processes; nothing here depends on how long


def runs(project: Path) -> list[RunAccount]:
    return ledger.read_runs(str(project / "out"))


def states(project: Path) -> list[str]:
    return [run.state for run in runs(project)]


def is_gone(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def record(output: str, run: RunAccount) -> None:
    storage.put(layout.run(output, run.id), sealed(dataclasses.asdict(run)))


def test_a_killed_driver_is_billed_until_its_engines_are_gone(project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(400))
    slow = ["output.rows_per_shard=40", "+engine.options.tokens_per_s=2000"]
    process = start(project, *slow)
    engines: list[int] = []

    def engine_is_there() -> bool:
        engines[:] = processes_below(process.pid, b"ray::Replica")
        return bool(engines)

    wait_for(process, engine_is_there)
    began = time.monotonic()
    wait_for(process, lambda: any(r.counters.rows for run in runs(project) for r in run.replicas))
    process.send_signal(signal.SIGKILL)
    until(lambda: all(map(is_gone, engines)))
    lived = time.monotonic() - began
    process.wait()

    until(lambda: states(project) == ["killed"])
    (killed,) = runs(project)
    (engine,) = killed.replicas
    # Part of `start` is over before the process can be seen: five seconds of it on a busy machine.
    assert sum(engine.phases.values()) >= lived - 2, "seconds of each device"
    assert sum(engine.phases.values()) - engine.phases["start"] <= lived + 2, "seconds of each device"
    assert engine.counters.rows > 0 and killed.exit_code is None and killed.reason.startswith("killed: ")

    assert main([*PRICED, *slow]) == 0
    assert states(project) == ["killed", "complete"]
    report = json.loads((project / "out/meta/report.json").read_text())
    held = sum(replica.device_seconds for run in runs(project) for replica in run.replicas)
    assert report["cost"] == pytest.approx(held / 100)
    assert "running" not in (project / "out/meta/report.html").read_text()


HOLDING = """
import os, signal, sys, time
from pathlib import Path
from batchq.account.ledger import Invocation
from batchq.account.usage import ReplicaAccount

output, logs = sys.argv[1:]
invocation = Invocation(output, "mine", "run")
invocation.logs = Path(logs)
invocation.hold(ReplicaAccount("cpu_core", 2, {}, phase="quantize"))
while '"quantize"' not in (Path(logs) / "witness.json").read_text():
    time.sleep(0.02)
began = time.monotonic()
time.sleep(2.5)
print(time.monotonic() - began, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_is_killed_before_it_has_a_replica_is_billed(tmp_path: Path) -> None:
    """Such as quantizing, which takes minutes on eight GPUs."""
    output, logs = str(tmp_path / "out"), tmp_path / "logs"
    logs.mkdir()
    (logs / "witness.json").write_text("{}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDING, output, str(logs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    until(lambda: [run.state for run in ledger.read_runs(output)] == ["killed"])
    (run,) = ledger.read_runs(output)
    (held,) = run.replicas
    assert held.devices == 2 and float(done.stdout) <= held.phases["quantize"] < float(done.stdout) + 4


def test_a_run_whose_machine_was_lost_is_closed_by_the_next(tmp_path: Path) -> None:
    """No witness was left either: it is counted until its next record was due, once."""
    output = str(tmp_path / "out")
    lost = RunAccount(
        id="20261101T000000-lost",
        state="running",
        started="2026-11-01T00:00:00+00:00",
        wall_seconds=100.0,
        replicas=(
            ReplicaAccount("NVIDIA H100", 8, {"load": 30.0, "infer": 60.0}, phase="infer"),
            ReplicaAccount("NVIDIA H100", 8, {"load": 5.0}),  # it had ended before
        ),
        number=3,
        rewritten_in=15.0,
    )
    record(output, lost)
    for name in ("first", "second"):
        Invocation(output, name).take_over()
    (closed,) = ledger.read_runs(output)
    assert (closed.state, closed.wall_seconds) == ("killed", 115.0)
    assert [sum(replica.phases.values()) for replica in closed.replicas] == [105.0, 5.0]


def test_runs_are_in_their_order_whatever_the_clock_says(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that resumes in 2020 is the last one all the same."""
    write_jsonl(project / "rows.jsonl", rows_of(20))
    assert main([*PRICED, "pricing.budget=1e-9"]) == 6
    assert "stopped, 1 of 1 shards to go" in capsys.readouterr().out
    (first,) = runs(project)
    later = dataclasses.replace(first, id="29991231T235959-later")  # its clock was ahead
    record(str(project / "out"), later)
    (project / "out/meta/runs" / f"{first.id}.json").unlink()

    assert main(PRICED) == 0
    assert [run.state for run in runs(project)] == ["stopped", "complete"]
    assert main(["status", *PRICED]) == 0
    assert "  ended      complete" in capsys.readouterr().out


def test_a_run_that_fails_leaves_its_report(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(40))
    assert main([*PRICED, "+engine.options.tokens_per_s={1: 5}"]) == 1  # an engine that doesn't start
    said = capsys.readouterr()
    assert said.out.startswith("batchq · mine · failed, 2 of 2 shards to go\n")
    assert "  cost       " in said.out and "doesn't start with so many tokens" in said.err
    (run,) = runs(project)
    assert run.replicas[0].phases["start"] > 0, "an engine that never said a word has held its devices"
    summary = json.loads((project / "out/meta/report.json").read_text())
    assert summary["cost"] > 0 and summary["runs"][0]["state"] == "failed"
    assert "doesn&#39;t start with so many tokens" in (project / "out/meta/report.html").read_text()


def test_an_engine_that_says_nothing_is_held_by_the_drivers_clock() -> None:
    ticks = Ticks()
    clock = EngineClock(ticks)
    ticks.now += 3
    clock.note({"start": 0.5, "load": 0.5}, "load")  # its process was up two seconds after it was asked for
    assert clock.seconds() == {"start": 2.5, "load": 0.5}
    ticks.now += 10  # and is too busy to say more
    assert clock.seconds() == {"start": 2.5, "load": 10.5}
    clock.note({"start": 0.5, "load": 9.0, "infer": 1.5}, "infer")
    ticks.now += 1
    clock.end()
    ticks.now += 50
    clock.note({"infer": 99.0}, "infer")
    assert clock.seconds() == {"start": 2.5, "load": 9.0, "infer": 2.5}
    assert sum(clock.seconds().values()) == 14


def test_engines_that_answer_a_sample_one_after_the_other_add_up() -> None:
    ticks = Ticks()
    sample = SampleClock("cpu_core", ticks)
    for _ in range(2):
        sample.begin(4)
        ticks.now += 2
        assert sample.account().phase == "start"
        sample.end()
        ticks.now += 5  # between the two nothing is held
    assert sample.account() == ReplicaAccount("cpu_core", 4, {"start": 4.0})
