"""What a run did cost is fixed when it ends: nothing that is said later changes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchq.account.cost import matched
from batchq.cli import main
from batchq.config import PricingConfig
from batchq.records import sealed, unsealed
from batchq.report import facts
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


PAID = ["pricing.currency=EUR", "pricing.as_of=2026-10-01", "pricing.source=contract", "pricing.per_hour.cpu_core=36"]
TODAY = ["pricing.currency=USD", "pricing.as_of=2026-11-01", "pricing.per_hour.cpu_core=72"]


def written(project: Path) -> dict[str, bytes]:
    """What finance may have copied: the reports and the records."""
    meta = project / "out/meta"
    return {str(p): p.read_bytes() for p in [*meta.glob("report.*"), *meta.glob("runs/*.json")]}


def test_what_was_booked_stays_byte_for_byte(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    assert main([*RUN, *PAID]) == 0
    before = written(project)
    assert len(before) == 4
    report = json.loads((project / "out/meta/report.json").read_text())
    (record,) = (json.loads(p.read_text()) for p in (project / "out/meta/runs").glob("*.json"))
    seconds = sum(r["devices"] * sum(r["phases"].values()) for r in record["replicas"])
    assert report["cost"] == pytest.approx(seconds / 100, rel=1e-9) and report["currency"] == "EUR"
    assert record["rated"]["rates"] == [{"accelerator": "cpu_core", "key": "cpu_core", "per_hour": 36.0}]

    for asked in (["report", *RUN, *TODAY], [*RUN, *TODAY], ["report", "out", *TODAY]):
        capsys.readouterr()
        assert main(asked) == 0
        said = capsys.readouterr().out
        assert facts.money(report["cost"]) in said and "EUR" in said and "contract, 2026-10-01" in said
        assert written(project) == before

    for asked in (["report", *RUN], ["report", "out"]):
        assert main([*asked, "--reprice", *TODAY]) == 0
        said = capsys.readouterr().out
        assert facts.money(report["cost"]) in said and facts.money(2 * report["cost"]) in said
        assert written(project) == before
    assert main(["report", "out", "costs.csv", "--reprice"]) == 2
    assert "costs.csv: --reprice only shows" in capsys.readouterr().err


def test_currencies_are_added_up_apart(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    assert main([*RUN, *PAID, "output.path=out/a"]) == 0
    assert main([*RUN, *TODAY, "output.path=out/b"]) == 0
    capsys.readouterr()
    assert main(["report", "out"]) == 0
    (total,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("all jobs")]
    assert " EUR + " in total and " USD " in total


def test_a_record_of_before_prices_were_booked_is_read_and_named(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    assert main([*RUN, *PAID]) == 0
    (record,) = (project / "out/meta/runs").glob("*.json")
    record.write_bytes(sealed({k: v for k, v in unsealed(record.read_bytes()).items() if k != "rated"}))
    before = written(project)
    capsys.readouterr()
    assert main(["report", *RUN, *TODAY]) == 0
    assert "1 run of before prices were booked, at today's list" in capsys.readouterr().out
    assert written(project) == before


def test_an_example_says_so_in_every_report(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    assert main(RUN) == 0
    assert main(["report", "out", "costs.html"]) == 0
    words = "Price list: example, not a quotation, 2026-11-01"
    assert capsys.readouterr().out.count(words) == 2
    for page in ("out/meta/report.html", "costs.html"):
        assert words in (project / page).read_text()


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("NVIDIA L40", ""), ("NVIDIA RTX A1000", ""), ("NVIDIA GH200 480GB", ""), ("NVIDIA GB200", "")),
        *(("NVIDIA L40S", "L40S"), ("NVIDIA A100-SXM4-80GB", "A100"), ("nvidia h200", "H200")),
        *(("NVIDIA H100 NVL", "H100 NVL"), ("cpu_core", "cpu_core")),
    ],
)
def test_a_key_matches_whole_words(name: str, key: str) -> None:
    listed = dict.fromkeys(("L4", "L40S", "A100", "H100", "H100 NVL", "H200", "B200", "cpu_core"), 1.0)
    assert matched(name, PricingConfig(per_hour=listed)) == key


def test_small_amounts_keep_three_digits() -> None:
    assert [facts.money(v) for v in (0.000207, 0.00781, 29.08621, 0.0, None)] == [
        *("0.000207", "0.00781", "29.0862", "0.0000", "-")
    ]
    assert [facts.counted(n, "output") for n in (1, 2)] == ["1 output", "2 outputs"]
