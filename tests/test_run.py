"""The whole path by its real entry, with real Ray: rows in, committed Parquet and a report out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from batchq.cli import compose as compose_job
from batchq.cli import main
from batchq.config import Config, Scheme
from batchq.errors import Stopped
from batchq.job.label import work_of
from batchq.job.served import served_on
from batchq.machine.hardware import Gpu, Hardware
from batchq.model.source import resolve
from batchq.model.tokenizer import open_tokenizer
from batchq.output import lease
from batchq.plan.draft import make_plan
from batchq.plan.stored import load_plan, store_plan
from batchq.quantize.checkpoint import Checkpoint
from tests.helpers import processes_below, rows_of, wait_for, write_jsonl
from tests.jobs import labelled
from tests.s3 import S3
from tests.tiny import make_tiny_model

ROOT = Path(__file__).parent.parent


def start(project: Path, *overrides: str, failpoint: str = "") -> subprocess.Popen[str]:
    """The command line as a process of its own, in its own group."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BATCHQ_FAILPOINT": failpoint}
    command = [sys.executable, "-m", "batchq", "job=mine", "engine=fake", *overrides]
    return subprocess.Popen(
        command,
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def stamps(data: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in data.glob("*.parquet")}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rows(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "data").to_pylist()  # type: ignore[no-any-return]


def test_run_then_rerun(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(90))
    assert main(["job=mine", "engine=fake", "input.id=id"]) == 0
    first = capsys.readouterr()
    assert "90 = 90 answers + 0 failures" in first.out
    for word in ("accuracy", "tokens/s", "per million tokens", "infer", "label mass"):
        assert word in first.out
    assert sorted(r["id"] for r in rows(project / "out")) == list(range(90))
    before = stamps(project / "out/data")
    assert main(["job=mine", "engine=fake", "input.id=id"]) == 0
    assert "all is committed" in capsys.readouterr().err
    assert stamps(project / "out/data") == before
    report = json.loads((project / "out/meta/report.json").read_text())
    assert (report["rows"], report["invocations"], report["duplicate_ids"]) == (90, 1, 0)
    assert json.loads((project / "out/meta/manifest.json").read_text())["answers"] == 90
    assert main(["status", "job=mine", "engine=fake"]) == 0
    assert f"{len(before)} of {len(before)} shards committed" in capsys.readouterr().out
    assert sorted(p.name for p in project.iterdir()) == ["conf", "out", "rows.jsonl"]


def test_drift_is_refused_and_nothing_is_written(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(10))
    assert main(["job=mine", "engine=fake"]) == 0
    before = everything(project / "out")
    capsys.readouterr()
    changes = {
        "task.prompt='Other {{ text }}'": "task.prompt",
        "task.labels=[good,bad]": "task.labels",
        "engine.max_model_len=300": "engine.max_model_len",
        f"model.path={make_tiny_model(project / 'another', seed=1)}": "model.path",
    }
    for override, named in changes.items():
        assert main(["job=mine", "engine=fake", override]) == 2
        assert named in capsys.readouterr().err
    write_jsonl(project / "rows.jsonl", rows_of(11))
    assert main(["job=mine", "engine=fake"]) != 0
    assert "is not the file that was planned" in capsys.readouterr().err
    assert everything(project / "out") == before


def test_too_many_failures_end_in_four(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", [*rows_of(8), *({"id": i, "text": "", "gold": None} for i in (8, 9))])
    assert main(["job=mine", "engine=fake"]) == 4
    assert capsys.readouterr().out.startswith("batchq · mine · complete, with too many failures\n")
    assert main(["job=mine", "engine=fake", "output.max_error_rate=0.5"]) == 0
    assert capsys.readouterr().out.startswith("batchq · mine · complete\n")


def test_a_killed_driver_resumes_without_doing_anything_twice(project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(400))
    slow = ["output.rows_per_shard=40", "+engine.options.tokens_per_s=8000"]
    process = start(project, *slow)
    data = project / "out/data"
    wait_for(process, lambda: len(list(data.glob("*.parquet"))) >= 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    committed = stamps(data)
    assert 3 <= len(committed) < 10
    again = start(project, *slow)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "400 = 400 answers + 0 failures" in out
    assert "2 invocations" in out
    found = rows(project / "out")
    assert len(found) == len({r["batchq_id"] for r in found}) == 400
    assert sorted(r["id"] for r in found) == list(range(400))
    after = stamps(data)
    assert {name: after[name] for name in committed} == committed


@pytest.mark.parametrize("fault", ["exit_after", "die_after"])
def test_a_lost_replica_is_replaced_and_its_answers_kept(
    fault: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(200))
    flag = project / "struck"
    faults = [f"+engine.options.{fault}=70", f"+engine.options.once={flag}", "output.rows_per_shard=50"]
    assert main(["job=mine", "engine=fake", "log.level=warning", "log.format=json", *faults]) == 0
    out, err = capsys.readouterr()
    lost = [json.loads(line) for line in err.splitlines()]
    assert [(r["level"], r["replica"]) for r in lost if " lost: " in r["message"]] == [("warning", 0)]
    assert flag.exists()
    assert "200 = 200 answers + 0 failures" in out
    assert "1 replicas lost" in out
    assert sorted(r["id"] for r in rows(project / "out")) == list(range(200))


def test_a_shard_that_loses_every_replica_ends_the_run_with_its_name(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(10))
    assert main(["job=mine", "engine=fake", "+engine.options.die_after=0", "cluster.max_attempts=2"]) == 1
    err = capsys.readouterr().err
    assert "shard 0 (rows.jsonl) lost its replica 2 times" in err
    assert "log: " in err
    assert "Traceback" not in err


def listening(root: int) -> list[str]:
    """Addresses at which a process or one that it started listens."""
    found = []
    for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert found, "Ray listens somewhere"
    return found


WATCHED = """
import os, signal, threading
from batchq.pool import connection
from batchq.plan.draft import make_plan
from batchq.plan.stored import load_plan, store_plan

def ours(*_):
    print("heard", flush=True)

def look():
    while not over.is_set():
        seen.add(signal.getsignal(signal.SIGTERM))

signal.signal(signal.SIGTERM, ours)
seen, over = set(), threading.Event()
watch = threading.Thread(target=look)
watch.start()
connection.connect(None)
over.set()
watch.join()
assert seen == {ours}, seen
os.kill(os.getpid(), signal.SIGTERM)
assert signal.getitimer(signal.ITIMER_REAL)[0] == 0, "Ray's handler below Python's would abort in three seconds"
"""


def test_ray_never_takes_sigterm_for_itself() -> None:
    """Not even for a moment of its start, in which a signal may be lost."""
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def test_sigterm_stops_with_three_and_no_answer_is_asked_twice(project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(400))
    noted = f"+engine.options.asked={project / 'asked'}"  # a line per row that the engine is asked
    process = start(project, "output.rows_per_shard=40", "+engine.options.tokens_per_s=8000", noted)
    wait_for(process, lambda: len(list((project / "out/data").glob("*.parquet"))) >= 2)
    open_to_others = [place for place in listening(process.pid) if not place.startswith(("127.", "::ffff:127.", "::1"))]
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 3, err
    assert not open_to_others, "Ray listens on loopback alone"
    assert "the same command goes on from here" in err
    assert 80 <= len((project / "asked").read_text().splitlines()) < 400
    again = start(project, "output.rows_per_shard=40", noted)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "400 = 400 answers + 0 failures" in out
    assert "watching" not in err, "a run that said it was over is not waited for"
    assert len((project / "asked").read_text().splitlines()) == 400


def test_a_row_that_kills_a_preempted_replica_and_a_second_submission(project: Path) -> None:
    """At once: the row becomes a failure, the pool goes on, the second driver leaves and names the first."""
    made = rows_of(300)
    made[290]["text"] = "~"
    write_jsonl(project / "rows.jsonl", made)
    opened = open_tokenizer(str(compose_job(["job=mine"]).model.path))
    (token,) = opened.backend_tokenizer.encode("~", add_special_tokens=False).ids
    faults = [f"+engine.options.die_token={token}", "+engine.options.tokens_per_s=4000", "engine.in_flight=8"]
    options = [*faults, "cluster.replicas=2", "output.rows_per_shard=30"]
    first = start(project, *options)
    wait_for(first, lambda: bool(list((project / "out/data").glob("*.parquet"))))
    os.kill(processes_below(first.pid, b"ray::Replica")[-1], signal.SIGTERM)
    second = start(project, *options)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 7, said
    assert f"another run (process {first.pid} on " in said and "nothing was started here" in said
    out, err = first.communicate(timeout=240)
    assert first.returncode == 0, err
    assert "300 = 299 answers + 1 failures" in out
    assert "replica 1 lost: its process died" in err or "replica 0 lost: its process died" in err, err
    assert "kills engines; it becomes a failure" in err, err
    assert sorted(r["id"] for r in rows(project / "out")) == list(range(300))
    assert {r["id"]: r["batchq_error"] for r in rows(project / "out") if r["batchq_error"]} == {290: "killed_engine"}
    report = json.loads((project / "out/meta/report.json").read_text())
    assert report["lost_replicas"] - 1 <= math.log2(8) + 2, "of the eight rows in flight, by halving"


def test_a_driver_that_was_suspended_leaves_to_the_one_that_took_over(tmp_path: Path) -> None:
    stop, lost = threading.Event(), threading.Event()
    said: list[str] = []
    first = lease.Lease(str(tmp_path), said.append, stop, lost)
    assert not said, "nobody was there before"
    with pytest.raises(Stopped, match="is at work on it, so nothing was started here"):
        lease.Lease(str(tmp_path), said.append, stop, threading.Event())
    first._over.set()  # it hangs: no beat any more
    first._thread.join()
    second = lease.Lease(str(tmp_path), said.append, stop, threading.Event())
    assert "going on from where it was" in said[-1]
    first._over.clear()
    first._run()  # it wakes
    assert lost.is_set() and first.taken_by == f"another run (process {os.getpid()} on {socket.gethostname()})"
    second.close()
    assert first._interval() == 2 and "watching 8 s" in said[0]
    first._began -= 3600
    assert first._interval() == 15, "on a bucket that keeps versions, a night's beats are 2,000 instead of 14,400"
    heard = len(said)
    lease.Lease(str(tmp_path), said.append, stop, threading.Event()).close()
    assert len(said) == heard, "who said that it was over is not watched"


@pytest.mark.parametrize("finished", [False, True])
def test_a_newcomer_goes_on_with_the_plan_that_was_made_while_it_waited(
    finished: bool, project: Path, compose: Callable[..., Config]
) -> None:
    """The driver before it fell back to the model as it is, planned so, and ended. The newcomer, who had found no plan
    yet, neither quantizes nor judges again, and asks nothing if all is committed."""
    write_jsonl(project / "rows.jsonl", rows_of(30))
    asked = ["quantization.scheme=int8_rtn", "gate.fallback=[none]", f"+engine.options.asked={project / 'asked'}"]
    made = compose(*asked, "output.path=made")
    model = resolve(made.model)
    fixed = store_plan(make_plan(made, model.digest, Scheme.none, model.digest), str(project / "made"))
    (project / "made/data").mkdir()
    if finished:
        asyncio.run(labelled(made, fixed))
    before = lease.Lease(str(project / "out"), print, threading.Event(), threading.Event())
    before._over.set()  # its heart stands still, as if it were frozen
    before._thread.join()
    newcomer = start(project, *asked)
    assert newcomer.stderr is not None
    said = ""
    while "watching" not in said:
        line = newcomer.stderr.readline()
        assert line, f"it ended: {said}"
        said += line
    (project / "made/data").rename(project / "out/data")
    (project / "made/meta/plan.json").rename(project / "out/meta/plan.json")
    before.close()
    out, err = newcomer.communicate(timeout=120)
    assert newcomer.returncode == 0, said + err
    assert not [word for word in ("quantizing", "gate:") if word in said + err], said + err
    assert "30 = 30 answers + 0 failures" in out
    count = len((project / "asked").read_text().splitlines()) if (project / "asked").exists() else 0
    assert count == (0 if finished else 30)
    assert ("all is committed; nothing to do" in err) == finished
    assert main(["verify", "job=mine", "engine=fake"]) == 0


def test_all_readers_see_one_clean_table(project: Path) -> None:
    """With an empty shard and one that is all failures."""
    write_jsonl(project / "rows.jsonl", [{"id": 0, "text": "x" * 3000, "gold": "bad"}, *rows_of(40)])
    assert main(["job=mine", "engine=fake", "output.rows_per_shard=1"]) == 0
    import datasets
    import duckdb
    import pandas as pd
    import polars as pl

    data = project / "out/data"
    assert list((project / "out/meta/empty").iterdir())
    frame = pd.read_parquet(data)
    assert len(frame) == 41
    loaded = datasets.load_dataset(str(data), split="train", cache_dir=str(project / "hf"))
    assert len(loaded) == 41
    assert set(loaded.column_names) == set(frame.columns)
    assert pl.read_parquet(data / "*.parquet").shape[0] == 41
    query = f"select count(*), count(distinct batchq_id), count(batchq_error) from '{data}/*.parquet'"
    assert duckdb.execute(query).fetchall() == [(41, 41, 1)]


def test_from_and_to_s3(
    project: Path, s3: S3, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    bucket = s3.make_bucket("jobs")
    from batchq import storage

    for part in range(2):
        lines = "".join(json.dumps(r) + "\n" for r in rows_of(50)[part * 25 : part * 25 + 25])
        storage.create(f"{bucket}/in/rows-{part}.jsonl", lines.encode())
    where = [f"input.path={bucket}/in/*.jsonl", f"output.path={bucket}/out"]
    assert main(["job=mine", "engine=fake", *where]) == 0
    assert "50 = 50 answers + 0 failures" in capsys.readouterr().out
    before = {s.uri: s.etag for s in storage.list_objects(f"{bucket}/out/data")}
    assert len(before) == 2
    assert main(["job=mine", "engine=fake", *where]) == 0
    assert "all is committed" in capsys.readouterr().err
    assert {s.uri: s.etag for s in storage.list_objects(f"{bucket}/out/data")} == before


def test_from_python(compose: Callable[..., Config], project: Path) -> None:
    import batchq

    write_jsonl(project / "rows.jsonl", rows_of(5))
    result = batchq.run(compose())
    assert result.exit_code == 0
    assert result.summary["answers"] == 5


def test_the_gate_falls_back_or_refuses(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recovery that nothing reaches: with no other scheme allowed exit code 5, otherwise the model as it is."""
    write_jsonl(project / "rows.jsonl", rows_of(200))
    asked = ["job=mine", "engine=fake", "quantization.scheme=int8_rtn", "gate.recovery=1.5"]
    assert main([*asked, "gate.fallback=[]"]) == 5
    refused = capsys.readouterr().err
    assert "int8_rtn keeps 100.0% of accuracy" in refused and "gate.recovery=1.5" in refused
    assert not (project / "out/data").exists() and not (project / "out/meta/plan.json").exists()

    assert main([*asked, "gate.fallback=[none]"]) == 0
    assert "fails 150.0%" in capsys.readouterr().out
    report = json.loads((project / "out/meta/report.json").read_text())
    assert (report["quantization"], report["rows"], report["gate"][0]["verdict"]) == ("none", 200, "fail")
    refused_run, done = report["runs"]
    assert refused_run["state"] == "refused" and refused_run["device_seconds"]["gate"] > 0, (
        "it was held, so it is billed"
    )
    assert done["device_seconds"]["gate"] == 0, "both answers were cached by the first command"

    assert main([*asked, "gate.fallback=[none]"]) == 0  # what it fell back to is resumed
    assert "nothing to do" in capsys.readouterr().err


def test_the_engine_that_the_gate_accepts_goes_on_to_label(project: Path, cache: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(160))
    asked = ["job=mine", "job.name=kept", "engine=fake", "quantization.scheme=int8_rtn"]
    assert main(asked) == 0
    assert sorted(r["id"] for r in rows(project / "out")) == list(range(160))
    logs = {p.name for p in (cache / "logs/kept").glob("*/*")}
    assert {"gate-baseline.log", "gate-int8_rtn.log"} <= logs and "replica-0.log" not in logs
    (record,) = (project / "out/meta/runs").glob("*.json")
    *_, judged, labelled = json.loads(record.read_text())["replicas"]
    assert judged["phases"]["gate"] > 0 and judged["phases"]["infer"] == 0
    assert labelled["phases"]["start"] == labelled["phases"]["gate"] == 0  # counted once, by the gate
    assert labelled["phases"]["infer"] > 0


def test_the_gate_replaces_an_engine_that_dies_or_hangs_and_gives_up_in_the_end(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(170))
    asked = ["job=mine", "engine=fake", "quantization.scheme=int8_rtn"]
    assert main([*asked, "+engine.options.die_after=3", "cluster.max_attempts=2"]) == 1
    err = capsys.readouterr().err
    assert "a sample cost 2 engines in a row (the fake engine died, as ordered); log: " in err
    assert "Traceback" not in err and not (project / "out/data").exists()

    def hit(fault: str, *more: str) -> str:
        flag = project / fault
        assert main([*asked, f"+engine.options.{fault}=3", f"+engine.options.once={flag}", *more]) == 0
        assert flag.exists()
        return capsys.readouterr().err

    lost = "the engine that was asked a sample is lost: "
    another = ["engine.max_model_len=255", "output.path=other"]  # or the answers of the one are cached for the other
    silent = hit("hang_after", "engine.stall_timeout_s=2", *another)
    assert lost + "no answer for engine.stall_timeout_s=2" in silent
    assert lost + "its process died" in hit("exit_after")
    report = json.loads((project / "out/meta/report.json").read_text())
    assert (report["answers"], report["gate"][0]["verdict"], report["lost_replicas"]) == (170, "pass", 0)


@pytest.mark.parametrize(("kind", "cache"), [("generate", "auto"), ("generate", "fp8"), ("classify", "auto")])
def test_what_decoding_reads_is_known_where_text_is_generated(
    kind: str, cache: str, compose: Callable[..., Config], project: Path
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    text = ["task.kind=generate", "task.labels=[]", "task.gold=null", "task.prompt='{{ text }}'"]
    limits = ["engine.max_num_seqs=100", "engine.in_flight=64", f"quantization.kv_cache={cache}"]
    config = compose(*limits, *(text if kind == "generate" else []), engine="vllm")
    model, fixed = resolve(config.model), make_plan(config, "model", Scheme.none, "model")
    gpu = Gpu("NVIDIA H100 80GB HBM3", 80 << 30, 80 << 30, (9, 0), "580")
    here = Hardware((gpu,), (0,), "Xeon", frozenset(), 64 << 30)
    served = served_on(config, here, fixed, model, Checkpoint(model.path, "model", 1 << 20, 0.0, True))
    found = work_of(config, here, served)
    weights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)  # of the tiny model's two layers
    assert found.flop_per_token == 2 * weights
    if kind == "classify":
        assert found.weight_bytes_per_output_token is None and found.peak_bandwidth is None
        return
    assert found.weight_bytes_per_output_token == 2 * weights / 64, (
        "a step writes at most one token of each row in flight"
    )
    assert found.kv_bytes_per_token == 2 * 2 * 2 * 32 * (1 if cache == "fp8" else 2)
    assert found.peak_bandwidth == 3.35e12


def test_a_verdict_outlives_a_kill_right_after_the_plan_is_stored(project: Path) -> None:
    """It stands in the plan itself, so there is no moment at which the one is there without the other."""
    write_jsonl(project / "rows.jsonl", rows_of(120))
    asked = ["quantization.scheme=int8_rtn"]
    killed = start(project, *asked, failpoint="plan.store.after_put=kill")
    assert killed.wait(120) == -signal.SIGKILL
    assert (project / "out/meta/plan.json").exists() and not (project / "out/data").exists()
    again = start(project, *asked)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "int8_rtn keeps 100.0%" in out
    report = json.loads((project / "out/meta/report.json").read_text())
    assert [v["verdict"] for v in report["gate"]] == ["pass"]


def test_verdicts_of_the_version_before_are_still_reported(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(120))
    asked = ["job=mine", "engine=fake", "quantization.scheme=int8_rtn"]
    assert main(asked) == 0
    report = json.loads((project / "out/meta/report.json").read_text())
    stored = load_plan(str(project / "out"))
    assert stored is not None and [dict(v) for v in stored.verdicts] == [
        {k: v for k, v in verdict.items() if k != "words"} for verdict in report["gate"]
    ]
    (project / "out/meta/plan.json").unlink()
    store_plan(dataclasses.replace(stored, verdicts=()), str(project / "out"))
    (project / "out/meta/gate.json").write_text(json.dumps([{**stored.verdicts[0], "high": math.inf}]))
    capsys.readouterr()
    assert main(["report", *asked]) == 0
    assert "int8_rtn keeps 100.0% [100.0%, ?] of the baseline's accuracy" in capsys.readouterr().out
