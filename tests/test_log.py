"""What is logged, in text and in JSON, and that a stream which fails ends nothing."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchq.cli import main
from batchq.machine import log
from batchq.machine.log import LogSetting
from tests.helpers import rows_of, write_jsonl

ROOT = Path(__file__).parent.parent


def test_text_is_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    with log.configured(LogSetting()) as progress:
        progress.step("quantizing")
        logging.getLogger("batchq.x").warning("a heartbeat failed: %s", "no")
    assert capsys.readouterr().err == "[0:00] quantizing\nbatchq: a heartbeat failed: no\n"
    assert not log.ROOT.handlers


def test_json_carries_run_replica_and_shard(capsys: pytest.CaptureFixture[str]) -> None:
    with log.configured(LogSetting(format="json", run="r1", replica=2)) as progress:
        progress.step("one\ntwo")
        logging.getLogger("batchq.x").warning("late", extra={"shard": 7})
    step, late = map(json.loads, capsys.readouterr().err.splitlines())
    assert (step["level"], step["message"], step["shard"]) == ("info", "one\ntwo", None)
    assert (late["run"], late["replica"], late["shard"], late["level"]) == ("r1", 2, 7, "warning")


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_line_says_which_shard_and_replica_it_is_of(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    with log.configured(LogSetting(level="warning", format=format, run="r1")) as progress:
        progress.step("unsaid")
        progress.warn("replica 2 lost", replica=2)
        progress.warn("rows.jsonl: 4 rows may kill engines", replica=2, shard=0)
        logging.getLogger("batchq.x").error("ValueError", extra={"shard": 17})
    lines = capsys.readouterr().err.splitlines()
    if format == "text":
        lost, suspected, failed = lines
        assert lost.endswith("] replica 2 lost")
        assert suspected.endswith("] shard 0: rows.jsonl: 4 rows may kill engines")
        assert failed == "batchq: shard 17: ValueError"
        return
    found = [(r["level"], r["replica"], r["shard"]) for r in map(json.loads, lines)]
    assert found == [("warning", 2, None), ("warning", 2, 0), ("error", None, 17)]


def test_a_level_filters(capsys: pytest.CaptureFixture[str]) -> None:
    with log.configured(LogSetting(level="error")) as progress:
        progress.step("unsaid")
        logging.getLogger("batchq.x").error("said")
    assert capsys.readouterr().err == "batchq: said\n"


@pytest.mark.parametrize("format", ["text", "json"])
def test_what_ends_a_run_is_said_in_the_logs_format(
    format: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["job=mine", "engine=fake", f"log.format={format}", "log.level=error", "input.path=absent.jsonl"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    if format == "text":
        assert line.startswith("batchq: ") and "absent.jsonl" in line
        return
    record = json.loads(line)
    assert record["level"] == "error" and "absent.jsonl" in record["message"]
    assert record["run"], "the invocation that it ended"
    assert (record["code"], record["exit_code"]) == ("InputError", 2)


@pytest.mark.parametrize(("format", "begins"), [("text", "batchq: stopping"), ("json", '{"time": ')])
def test_a_signals_handler_says_so_in_the_logs_format(format: str, begins: str) -> None:
    assert log.formatted("stopping") == "batchq: stopping"
    with log.configured(LogSetting(format=format)):
        assert log.formatted("stopping").startswith(begins)


@pytest.mark.parametrize("streams", [">/dev/full 2>/dev/full", ">&- 2>&-", ""])
def test_a_run_outlives_its_standard_error_and_no_record_holds_a_row(
    streams: str, project: Path, tmp_path: Path
) -> None:
    write_jsonl(project / "rows.jsonl", [{**row, "text": "canary-of-a-row"} for row in rows_of(9)])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BATCHQ_CACHE": str(tmp_path / "own")}
    command = f"{sys.executable} -m batchq job=mine engine=fake log.format=json {streams}"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert bool(records) == (not streams) and all(r["message"] for r in records)
    logs = "".join(p.read_text() for p in (tmp_path / "own/logs").rglob("*.log"))
    assert "canary-of-a-row" not in done.stderr + logs


def test_on_a_cluster_a_replicas_output_is_in_its_file_and_where_ray_keeps_it(tmp_path: Path) -> None:
    """Its children's too, to the last line, though it is killed right after."""
    code = """
import os, signal, subprocess, sys
from batchq.machine.log import AS_SHIPPED, LogFile
from batchq.pool.replica import _log_to
_log_to(LogFile(sys.argv[1], AS_SHIPPED, shown=sys.argv[2] == "shown"))
print("of the replica", flush=True)
subprocess.run(["sh", "-c", "echo of its child >&2"])
os.kill(os.getpid(), signal.SIGKILL)
"""
    for how in ("shown", "alone"):
        file = tmp_path / f"{how}/replica-0.log"
        done = subprocess.run([sys.executable, "-c", code, str(file), how], capture_output=True, text=True)
        assert file.read_text().splitlines() == ["of the replica", "of its child"]
        assert done.stderr == ("of the replica\nof its child\n" if how == "shown" else "") and not done.stdout
