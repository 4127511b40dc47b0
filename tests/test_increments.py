"""output.incremental: a night costs what changed. The whole command, with one worker in this process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from batchq.cli import main
from batchq.config import Config
from batchq.errors import ConfigError
from batchq.job import session
from batchq.model.tokenizer import open_tokenizer
from batchq.plan.committed import read_committed
from batchq.plan.source import last_source
from batchq.plan.stored import load_plan
from batchq.records import sealed, unsealed
from batchq.report.outcome import finish
from tests.helpers import rows_of, write_jsonl
from tests.jobs import OneWorker, completed, labelled, planned
from tests.s3 import S3

NIGHTLY = ["job=mine", "engine=fake", "gate=off", "input.path=in/ds={date}", "output.path=out/{date}"]
INCREMENTAL = [*NIGHTLY, "output.incremental=true"]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "Pool", OneWorker)


class Nights:
    """A project's snapshots, of which each differs from the last in some rows."""

    def __init__(self, project: Path) -> None:
        self.project, self.rows = project, rows_of(40)
        self.noting = f"+engine.options.asked={project / 'asked'}"

    def give(self, day: int, changed: int = 0, text: str = "row {i} was changed on day {day}") -> None:
        """The snapshot of a day of November 2026."""
        for i in range(changed * day, changed * day + changed):
            self.rows[i % len(self.rows)]["text"] = text.format(i=i, day=day)
        write_jsonl(self.project / f"in/ds=2026-11-{day:02}/rows.jsonl", self.rows)

    def run(self, dates: str, *more: str, code: int = 0) -> int:
        """Label these dates of November; how many rows the engine was asked."""
        days = [f"2026-11-{day}" for day in dates.split("..")]
        assert main([*INCREMENTAL, f"input.date={'..'.join(days)}", self.noting, *more]) == code
        noted = self.project / "asked"
        count = len(noted.read_text().splitlines()) if noted.exists() else 0
        noted.unlink(missing_ok=True)
        return count

    def report(self, day: str) -> dict[str, Any]:
        return json.loads((self.project / f"out/2026-11-{day}/meta/report.json").read_text())  # type: ignore[no-any-return]

    def source(self, day: str) -> str:
        """The night whose answers this one took over, as its plan says."""
        plan = load_plan(str(self.project / f"out/2026-11-{day}"))
        assert plan
        return plan.reuse.rpartition("-")[2]


@pytest.fixture
def nights(project: Path) -> Nights:
    return Nights(project)


def test_a_second_night_asks_for_what_changed_alone(nights: Nights, capsys: pytest.CaptureFixture[str]) -> None:
    nights.give(1)
    assert nights.run("01") == 40
    said = capsys.readouterr()
    assert f"nothing to take over, no finished run of job mine is in {nights.project}/out" in said.err
    assert "copied" not in said.out
    nights.give(2, changed=2)
    assert main(["plan", *INCREMENTAL, "input.date=2026-11-02"]) == 0
    assert f"new, with what can be reused of {nights.project}/out/2026-11-01, 40 answers" in capsys.readouterr().out
    assert nights.run("02") == 2
    said = capsys.readouterr()
    assert f"38 answers of {nights.project}/out/2026-11-01: copied, not asked, not billed" in said.out
    told = nights.report("02")
    assert (told["date"], told["rows"], told["copied_rows"]) == ("2026-11-02", 40, 38)
    assert told["cost_per_thousand_rows"] == pytest.approx(told["cost"] * 1000 / 2)
    assert main(["verify", *INCREMENTAL, "input.date=2026-11-01..2026-11-02"]) == 0
    for night in ("01", "02"):
        shutil.rmtree(nights.project / f"out/2026-11-{night}/meta/attempts", ignore_errors=True)
    assert nights.run("02") == 0, "all is committed"
    assert main(["clean", *INCREMENTAL, "input.date=2026-11-02"]) == 0


def test_thirty_nights_of_which_one_dies_ask_for_each_change_once(
    nights: Nights, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (token,) = open_tokenizer(tiny).backend_tokenizer.encode("~", add_special_tokens=False).ids
    for day in range(1, 31):
        nights.give(day, 2, text="row {i} of day {day} ~" if day == 17 else "row {i} of day {day}")
    dying = [f"+engine.options.die_token={token}", f"+engine.options.once={nights.project / 'died'}"]
    asked = nights.run("01..30", *dying, code=1)
    assert (nights.source("17"), nights.source("18"), nights.source("30")) == ("16", "16", "29")
    again = nights.run("01..30")
    assert again <= 2, "of the night that died, what it hadn't answered"
    assert nights.source("17") == "16", "a resume reuses what was chosen when the run was planned"
    assert 40 + 29 * 2 <= asked + again <= 40 + 29 * 2 + 2 + 2
    capsys.readouterr()
    assert main(["verify", *NIGHTLY, "input.date=2026-11-01..2026-11-30"]) == 0
    assert capsys.readouterr().out.count("each of the input's rows once") == 30


def test_a_night_that_was_compacted_is_taken_over_too(nights: Nights) -> None:
    nights.give(1)
    nights.give(2, changed=2)
    assert nights.run("01", "output.compact=1") == 40
    assert nights.run("02", "output.compact=1") == 2 and nights.source("02") == "01"
    assert main(["clean", *INCREMENTAL, "input.date=2026-11-01", "output.compact=1"]) == 0
    nights.give(3, changed=2)
    assert nights.run("03") == 2 and nights.source("03") == "02"
    (gone,) = nights.project.glob("out/2026-11-02/compact-*/*.parquet")
    shutil.rmtree(nights.project / "out/2026-11-03")
    gone.unlink()
    assert nights.run("03") == 4 and nights.source("03") == "01"


def test_another_prompt_asks_all_and_says_why(nights: Nights, capsys: pytest.CaptureFixture[str]) -> None:
    nights.give(1)
    nights.give(2)
    nights.run("01")
    capsys.readouterr()
    assert nights.run("02", "task.prompt='Say: {{ text }}'") == 40
    told = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines() if "incremental" in line]
    assert told == [
        f"output.incremental: nothing can be reused of {nights.project}/out/2026-11-01, "
        "which has another task.prompt or task.system"
    ]
    assert nights.source("02") == "" and nights.report("02")["copied_rows"] == 0
    assert nights.run("02", "task.prompt='Say: {{ text }}'") == 0, "the same command finds it complete"


def test_a_checkpoint_that_is_gone_asks_all_and_says_so(nights: Nights, capsys: pytest.CaptureFixture[str]) -> None:
    nights.give(1)
    nights.give(2)
    nights.run("01")
    plan = nights.project / "out/2026-11-01/meta/plan.json"
    fields = unsealed(plan.read_bytes())
    plan.write_bytes(sealed({**fields, "checkpoint": "f" * 64}))
    capsys.readouterr()
    assert nights.run("02") == 40
    said = capsys.readouterr().err
    assert "its checkpoint ffffffffffff isn't in quantization.cache any more; all rows are asked" in said
    assert nights.source("02") == ""
    assert nights.run("02") == 0


def test_a_damaged_night_is_passed_over_with_a_line(nights: Nights, capsys: pytest.CaptureFixture[str]) -> None:
    for day in (1, 2, 3):
        nights.give(day, changed=1)
    nights.run("01..02")
    data = nights.project / "out/2026-11-02/data"
    (data / "part-00001.parquet").unlink()
    capsys.readouterr()
    assert nights.run("03") == 2, "the changes of two nights"
    assert f"{data.parent}: was complete, and 1 of its shards are gone; it is passed over" in capsys.readouterr().err
    shutil.rmtree(nights.project / "out/2026-11-03")
    (data / "part-00000.parquet").write_bytes(b"PAR1 no more")
    assert nights.run("03") == 2
    assert f"{data}/part-00000.parquet: not a whole object" in capsys.readouterr().err


def test_pages_that_turn_out_damaged_are_asked_again(nights: Nights, capsys: pytest.CaptureFixture[str]) -> None:
    """Receipts are whole, and so are keys; the answers of one part aren't."""
    nights.give(1)
    nights.give(2)
    nights.run("01")
    part = nights.project / "out/2026-11-01/data/part-00000.parquet"
    chunk = next(
        c
        for c in map(pq.read_metadata(part).row_group(0).column, range(pq.read_metadata(part).num_columns))
        if c.path_in_schema == "label_mass"
    )
    whole = bytearray(part.read_bytes())
    end = chunk.data_page_offset + chunk.total_compressed_size
    whole[end - 1] ^= 0xFF
    part.write_bytes(whole)
    capsys.readouterr()
    assert nights.run("02") == 21
    assert "part-00000.parquet: damaged: its pages don't pass their checksums" in capsys.readouterr().err
    assert nights.report("02")["copied_rows"] == 19


def test_a_former_night_that_was_deleted_in_mid_run_is_no_reason_to_stop(
    nights: Nights, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (token,) = open_tokenizer(tiny).backend_tokenizer.encode("~", add_special_tokens=False).ids
    nights.give(1)
    nights.give(2, changed=10, text="row {i} ~")
    nights.run("01")
    nights.run("02", f"+engine.options.die_token={token}", f"+engine.options.once={nights.project / 'died'}", code=1)
    shutil.rmtree(nights.project / "out/2026-11-01")
    capsys.readouterr()
    assert nights.run("02") >= 10
    assert "This run began with its answers; what is left of it is asked" in capsys.readouterr().err
    assert main(["verify", *INCREMENTAL, "input.date=2026-11-02"]) == 0


# ---- which one is the last ----


@pytest.fixture
def last(compose: Callable[..., Config], project: Path) -> Callable[..., str]:
    """The name of the last output beside out/NAME, of those that were made as copies of a complete one."""
    write_jsonl(project / "rows.jsonl", rows_of(3))
    completed(compose("output.path=complete"))

    def chosen(own: str, *others: str, date: str | None = None) -> str:
        for other in others:
            shutil.copytree(project / "complete", project / "out" / other)
        config = compose(f"output.path=out/{own}")
        config.input.date = date
        source = last_source(config, lambda words: pytest.fail(words))
        shutil.rmtree(project / "out", ignore_errors=True)
        return source.output.removeprefix(f"{project}/out/") if source else ""

    return chosen


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        ("2026-11-21", ["2026-11-20", "2026-11-19", "2026-10-31"], "2026-11-20"),
        ("2026-11-05", ["2026-11-30", "2026-11-04", "2026-11-06"], "2026-11-04"),  # a backfill into the past
        ("2026-11-01", ["2026-11-30", "2026-11-28"], "2026-11-28"),  # its first night: the nearest after it
        ("ds=2026-11-21", ["ds=2026-11-20", "2026-11-20", "other-2026-11-20"], "ds=2026-11-20"),
        ("20261121", ["20261120", "20261122"], "20261120"),
        ("2026-11-21T02-00", ["2026-11-20T02-13", "2026-11-20T01-00", "2026-11-21T01-00"], "2026-11-21T01-00"),
        ("2026-11-21", ["2026-11-20", "2026-11-20-again"], "2026-11-20-again"),
        ("2026-11-21", ["latest", "v2"], ""),
        ("2026-11-21", [], ""),
    ],
)
def test_by_dates_in_names(last: Callable[..., str], own: str, others: list[str], expected: str) -> None:
    assert last(own, *others) == expected


def test_by_the_folder_that_has_the_date_wherever_it_stands(last: Callable[..., str]) -> None:
    others = ["2026-11-20/tickets", "2026-11-20/calls", "2026-11-22/tickets"]
    assert last("2026-11-21/tickets", *others, date="2026-11-21") == "2026-11-20/tickets"


def test_without_dates_by_the_store_s_own_time_of_the_plan(
    compose: Callable[..., Config], project: Path, last: Callable[..., str]
) -> None:
    for age, name in enumerate(["c", "a", "b"]):
        shutil.copytree(project / "complete", project / "runs" / name)
        os.utime(project / "runs" / name / "meta/plan.json", (1e9 - age, 1e9 - age))
    (project / "runs/a/meta/manifest.json").touch()  # as a report writes it anew
    (project / "runs/no-output").mkdir()
    source = last_source(compose("output.path=runs/new"), pytest.fail)
    assert source and source.output == f"{project}/runs/c" and source.answers == 3


def test_other_jobs_and_runs_that_are_not_complete_do_not_count(
    compose: Callable[..., Config], project: Path, last: Callable[..., str]
) -> None:
    completed(compose("output.path=out/2026-11-20", "job.name=another"))
    shutil.copytree(project / "complete", project / "out/2026-11-19")
    (project / "out/2026-11-19/meta/manifest.json").unlink()
    shutil.copytree(project / "complete", project / "out/2026-11-18")
    source = last_source(compose("output.path=out/2026-11-21"), pytest.fail)
    assert source and source.output == f"{project}/out/2026-11-18"


def test_on_a_store(compose: Callable[..., Config], project: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    write_jsonl(project / "rows.jsonl", rows_of(3))
    bucket = s3.make_bucket("nights")
    for day in ("18", "19"):
        config = compose(f"output.path={bucket}/labels/2026-11-{day}")
        fixed = planned(config)
        asyncio.run(labelled(config, fixed))
        finish(config, fixed, read_committed(fixed, config.output.path), [])
    source = last_source(compose(f"output.path={bucket}/labels/2026-11-20"), pytest.fail)
    assert source and source.output == f"{bucket}/labels/2026-11-19"
    source = last_source(compose(f"output.path={bucket}/labels/new"), pytest.fail)
    assert source and source.output in (f"{bucket}/labels/2026-11-18", f"{bucket}/labels/2026-11-19")


def test_what_is_reused_is_named_or_chosen_not_both(compose: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"output\.reuse=old: output\.incremental=true chooses"):
        compose("output.incremental=true", "output.reuse=old")


# ---- docs/increments.md ----


def test_the_page_s_commands(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs/increments.md").read_text()
    (groups,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    job = yaml.safe_load((project / "conf/job/mine.yaml").read_text())
    for name, fields in yaml.safe_load(groups.replace("s3://", f"{project}/")).items():
        job[name] |= fields
    job |= {"job": {"name": "tickets"}, "engine": {"kind": "fake", "max_model_len": 256}, "gate": {"enabled": False}}
    (project / "conf/job/tickets.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(job)}")
    for day in range(1, 6):
        write_jsonl(project / f"corpus/tickets/ds=2026-11-0{day}/rows.jsonl", rows_of(10))
    commands = re.findall(r"^python -m batchq ([^#\n]*)", page, re.M)
    assert len(commands) == 6
    for command in commands:
        assert main(command.split()) == 0, command
    told = re.findall(r"(\d+) answers of .*/2026-11-(\d+): copied", capsys.readouterr().out)
    assert told == [("10", "01"), ("10", "01"), ("10", "02"), ("10", "03"), ("10", "04")], "the second is told twice"
