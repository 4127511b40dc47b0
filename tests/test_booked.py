"""What a run did cost is fixed when it ends: nothing that is said later changes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchq.cli import main
from batchq.records import sealed, unsealed
from tests.helpers import rows_of, write_jsonl

RUN = ["job=mine", "engine=fake"]
OTHER_MODEL = [
    *("model=hub", "model.path=hf://meta-llama/Llama-3.3-70B-Instruct"),
    "model.revision=0123456789012345678901234567890123456789",
]


def test_a_report_names_the_model_that_answered(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever model the configuration names today."""
    write_jsonl(project / "rows.jsonl", rows_of(5))
    assert main(RUN) == 0
    ran = json.loads((project / "out/meta/report.json").read_text())["model"]
    capsys.readouterr()
    for verb in ("report", "status"):
        assert main([verb, *RUN, *OTHER_MODEL]) == 0
        said = capsys.readouterr().out
        assert f"model      {ran} " in said and "Llama" not in said
    assert json.loads((project / "out/meta/report.json").read_text())["model"] == ran


def test_a_plan_of_before_models_had_names_says_so(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    assert main(RUN) == 0
    plan = project / "out/meta/plan.json"
    fields = unsealed(plan.read_bytes())
    plan.write_bytes(sealed({k: v for k, v in fields.items() if k not in ("model_name", "model_revision")}))
    capsys.readouterr()
    assert main(["report", *RUN, *OTHER_MODEL]) == 0
    assert f"a model whose name isn't on record (digest {fields['model'][:12]})" in capsys.readouterr().out
