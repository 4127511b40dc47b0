"""An output that version 0.1.0 left half finished is read, reported and finished by this one.

tests/data/output-0.1.0 was made by that version on the fake engine: 120 rows in three shards: one is committed, one is
begun and has answers that were saved when it was told to stop.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from batchq.account import ledger
from batchq.cli import main
from batchq.config import Config
from batchq.output import marks, spills
from batchq.plan.committed import read_committed
from batchq.plan.stored import load_plan
from batchq.records import Plan, sealed, unsealed
from batchq.report.outcome import verdicts
from tests.jobs import labelled, rows

DATA = Path(__file__).parent / "data"
WRITTEN = 1_790_000_000_000_000_000  # when its rows were, ns: a local file's etag is its time and size


@pytest.fixture
def output(project: Path) -> Path:
    """The output in a user's folder, its plan with that folder's path to the rows."""
    shutil.copy(DATA / "output-0.1.0.rows.jsonl", project / "rows.jsonl")
    os.utime(project / "rows.jsonl", ns=(WRITTEN, WRITTEN))
    shutil.copytree(DATA / "output-0.1.0", project / "out")
    path = project / "out/meta/plan.json"
    fields = unsealed(path.read_bytes())
    fields["objects"][0][0] = str(project / "rows.jsonl")
    path.write_bytes(sealed(fields))
    return project / "out"


def stored(output: Path) -> Plan:
    plan = load_plan(str(output))
    assert plan is not None
    return plan


def test_its_records_are_read(output: Path, compose: Callable[..., Config]) -> None:
    plan = stored(output)
    committed = read_committed(plan, str(output))
    assert [receipt.shard for receipt in committed.receipts] == [1] and len(committed.remaining) == 2
    (run,) = ledger.read_runs(str(output))
    assert (run.state, run.verb) == ("stopped", "run")
    assert sum(replica.counters.tokens for replica in run.replicas) == 2612
    assert sum(replica.counters.output_tokens for replica in run.replicas) == 57
    assert [verdict.verdict for verdict in verdicts(plan, str(output))] == ["pass"]
    (shard, _) = committed.remaining
    assert [mark.search.culprits for mark in marks.read(str(output), shard)] == [()]
    assert len(spills.read(str(output), shard, plan.fingerprint, compose().task)) == 17


def test_it_is_reported(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["job=mine", "engine=fake", "quantization.scheme=int8_rtn"]
    assert main(["report", *asked]) == 0
    said = capsys.readouterr().out
    assert "2 of 3 shards to go" in said and "40 = 40 answers + 0 failures" in said
    assert "int8_rtn keeps 100.0%" in said
    report = json.loads((output / "meta/report.json").read_text())
    assert report["device_seconds"]["quantize"] == pytest.approx(2 * 16.076)
    assert main(["status", *asked]) == 0
    assert "1 of 3 shards committed" in capsys.readouterr().out


def test_what_is_left_of_it_is_labelled_and_its_saved_answers_are_not_asked_again(
    output: Path, compose: Callable[..., Config]
) -> None:
    plan, config = stored(output), compose("quantization.scheme=int8_rtn")
    receipts = asyncio.run(labelled(config, plan))
    assert not read_committed(plan, str(output)).remaining
    assert sum(receipt.from_spill for receipt in receipts) == 17
    found = rows(config)
    assert sorted(row["id"] for row in found) == list(range(120))
    assert len({row["batchq_id"] for row in found}) == 120
