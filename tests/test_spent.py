"""What was held before a plan, or beside it, is on record and in reports: nobody gets devices for nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import batchq
from batchq.account import ledger
from batchq.account.usage import RunAccount
from batchq.cli import main
from batchq.config import Config, Scheme
from batchq.errors import Stopped
from batchq.job.served import ensure_checkpoint
from batchq.job.session import open_session
from batchq.machine.hardware import Gpu, Hardware
from batchq.machine.progress import Progress
from batchq.model.source import resolve
from batchq.plan.draft import make_plan
from tests.helpers import rows_of, write_jsonl

ASKED = ["job=mine", "engine=fake", "quantization.scheme=int8_rtn", "pricing.per_hour.cpu_core=3600"]


def records(project: Path) -> list[RunAccount]:
    return ledger.read_runs(str(project / "out"))


def held(record: RunAccount, phase: str) -> float:
    return sum(r.devices * r.phases.get(phase, 0.0) for r in record.replicas)


def test_a_refused_gate_is_billed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "text": f"call {row['id']} is billed"} for row in rows_of(200)]
    write_jsonl(project / "rows.jsonl", rows)
    # A checkpoint and answers that no other test has cached: what is in the cache holds no device.
    asked = [*ASKED, "quantization.seed=8"]
    refused = [*asked, "gate.recovery=1.5", "gate.fallback=[]"]
    assert main(refused) == 5
    (record,) = records(project)
    assert (record.state, record.verb) == ("refused", "run")
    assert held(record, "quantize") > 0 and held(record, "gate") > 0
    assert not (project / "out/meta/plan.json").exists()
    capsys.readouterr()

    assert main(["report", *refused]) == 0
    told = capsys.readouterr().out
    assert told.startswith("batchq · mine · refused by the gate, nothing planned\n")
    assert record.exit_code == 5 and f"refused, exit code 5: {record.reason}" in told

    assert main(["report", str(project), "pricing.per_hour.cpu_core=3600"]) == 0
    said = capsys.readouterr().out
    assert "refused by the gate, nothing planned" in said and "1 output " in said

    assert main([*asked, "gate.recovery=0.9"]) == 0  # both invocations of `run` are in the bill
    report = json.loads((project / "out/meta/report.json").read_text())
    assert report["invocations"] == 2
    assert report["device_seconds"]["quantize"] == pytest.approx(held(record, "quantize"), abs=0.01)


def test_a_run_that_is_stopped_while_it_quantizes_is_billed(
    compose: Callable[..., Config], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(40))
    stop = threading.Event()
    told: list[str] = []

    def update(_: Progress, text: str, share: float | None = None) -> None:
        told.append(text)
        if len(told) == 2:  # the quantizing process has begun to work
            stop.set()

    monkeypatch.setattr(Progress, "update", update)
    config = compose("quantization.scheme=int8_rtn", "quantization.seed=7")  # a checkpoint that no other test has made
    with pytest.raises(Stopped, match="stopped while the model was quantized"):
        batchq.run(config, stop)
    (record,) = records(project)
    assert (record.state, record.verb) == ("stopped", "run") and held(record, "quantize") > 0
    assert not (project / "out/meta/plan.json").exists()


def test_what_other_verbs_hold_is_reported_beside_the_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(60))
    plain = ["job=mine", "engine=fake", "pricing.per_hour.cpu_core=3600"]
    assert main(["preview", *plain]) == 0
    assert main(["tune", *plain, "tune.engines=1", "tune.seconds=1"]) == 0
    assert not (project / "out").exists(), "a look at a job makes no output"
    assert sorted(record.verb for record in records(project)) == ["preview", "tune"]

    assert main(plain) == 0
    assert main(["preview", *plain]) == 0
    assert len(list((project / "out/meta/runs").glob("*.json"))) == 2, "there is an output now, which keeps it"
    assert main(["report", *plain]) == 0
    report = json.loads((project / "out/meta/report.json").read_text())
    assert report["invocations"] == 1
    beside = {each["verb"]: each for each in report["beside"]}
    assert {verb: each["invocations"] for verb, each in beside.items()} == {"preview": 2, "tune": 1}
    assert all(each["device_seconds"] > 0 and each["cost"] > 0 for each in beside.values())
    assert report["cost"] == pytest.approx(sum(run["cost"] for run in report["runs"]))
    assert "preview 2, tune 1" in capsys.readouterr().out


def test_a_configuration_that_is_refused_leaves_no_record(project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    assert main([*ASKED, "pricing.budget=6", "~pricing.per_hour.cpu_core"]) == 2
    assert records(project) == [] and not (project / "out").exists()


def test_quantizing_is_charged_to_the_machine_that_quantizes(
    compose: Callable[..., Config], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's: on a cluster of GPUs it may be a machine without one."""
    write_jsonl(project / "rows.jsonl", rows_of(5))
    config = compose("quantization.scheme=int8_rtn", "job.name=charged")
    gpu = Gpu("NVIDIA H100 80GB HBM3", 80 << 30, 80 << 30, (9, 0), "580")
    there = Hardware((gpu,) * 8, tuple(range(96)), "Xeon", frozenset(), 64 << 30)

    with open_session(config, "quantize") as session:
        monkeypatch.setattr(type(session.pool), "hardware", lambda *_: there)
        model = resolve(config.model)
        ensure_checkpoint(session, make_plan(config, model.digest, Scheme.int8_rtn, ""), model, Scheme.int8_rtn)
        assert session.hardware == there
        accounts = session.invocation.account("running").replicas
    assert all(each.accelerator == "cpu_core" for each in accounts)
