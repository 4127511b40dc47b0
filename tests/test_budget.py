"""A run that may cost so much and no more."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchq.cli import main
from tests.helpers import rows_of, write_jsonl

SLOW = [
    "job=mine",
    "engine=fake",
    "+engine.options.tokens_per_s=2000",
    "pricing.per_hour.cpu_core=3600",
]  # 1 USD a second


def test_a_run_stops_when_its_budget_is_spent_and_goes_on_with_another(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(400))
    assert main([*SLOW, "pricing.budget=6"]) == 6
    told = capsys.readouterr().err
    assert "the budget is spent; rows in flight are finished and saved" in told
    assert "batchq: pricing.budget=6: " in told and "Raise it to resume" in told
    done = sum(pq.read_metadata(part).num_rows for part in (project / "out/data").glob("*.parquet"))
    assert done < 400

    runs = list((project / "out/meta/runs").glob("*.json"))
    assert main([*SLOW, "pricing.budget=6"]) == 6, "nothing is left of it, so nothing is started"
    assert "pricing.budget=6: " in capsys.readouterr().err
    (another,) = set((project / "out/meta/runs").glob("*.json")) - set(runs)
    assert json.loads(another.read_text())["replicas"] == []

    assert main(["job=mine", "engine=fake", "pricing.budget=1e6", "pricing.per_hour.cpu_core=3600"]) == 0
    assert "400 = 400 answers + 0 failures" in capsys.readouterr().out
    report = json.loads((project / "out/meta/report.json").read_text())
    assert report["invocations"] == 3 and report["cost"] >= 6


def test_a_budget_without_a_price_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    assert main(["job=mine", "engine=fake", "pricing.budget=6", "~pricing.per_hour.cpu_core"]) == 2
    assert "pricing.per_hour has no price for cpu_core" in capsys.readouterr().err
    assert main(["job=mine", "engine=fake", "pricing.budget=0"]) == 2
    assert "pricing.budget=0: must be above 0" in capsys.readouterr().err


def test_work_that_is_done_is_reported_whatever_it_cost(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    assert main(["job=mine", "engine=fake"]) == 0
    assert main(["job=mine", "engine=fake", "pricing.budget=1e-9"]) == 0
    assert "5 = 5 answers" in capsys.readouterr().out
