"""input.date: {date} in paths, and ranges of dates."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchq.cli import Verb, _act, _stop_on_signals, main
from batchq.config import Config
from batchq.config.compose import compose_dates, compose_each
from batchq.config.dates import each_date
from batchq.errors import ConfigError, ExitCode
from batchq.input import partition_types
from batchq.plan.inputs import list_inputs
from tests.helpers import rows_of, write_jsonl
from tests.jobs import completed, finished

MINE = ["job=mine", "engine=fake", "input.path=in/ds={date}", "output.path=out/{date}"]


def config(**fields: str | None) -> Config:
    """Of these paths and input.date; two underscores stand for a dot."""
    made = Config()
    made.input.path, made.output.path = "in/{date}", "out/{date}"
    for name, value in fields.items():
        group, _, field = name.partition("__")
        setattr(getattr(made, group), field, value)
    return made


def test_a_date_stands_in_every_path() -> None:
    paths = {
        "input__path": "s3://corpus/[!x]*/ds={date}/*,more/{date}.csv",
        "output__path": "labels/{date}",
        "output__reuse": "labels-{date}",
        "quantization__calibration": "calibration/{date}",
        "gate__input": "gold/{date}",
    }
    asked = config(**paths, input__date="2026-11-21", model__path="m/{date}", job__name="{date}")
    asked.task.prompt = 'Answer as JSON: {"date": {date}}'
    (filled,) = each_date(asked)
    for name, value in paths.items():
        group, _, field = name.partition("__")
        assert getattr(getattr(filled, group), field) == value.replace("{date}", "2026-11-21")
    assert (filled.task.prompt, filled.job.name, filled.model.path) == (asked.task.prompt, "{date}", "m/{date}")
    assert asked.input.path == paths["input__path"], "the one that was asked for stays as it is"


def test_a_range_is_a_configuration_per_date_over_the_ends_of_months_and_years() -> None:
    found = each_date(config(input__date="2027-12-30..2028-03-01"))
    assert [found[0].input.date, found[-1].input.date, len(found)] == ["2027-12-30", "2028-03-01", 2 + 31 + 29 + 1]
    assert found[2].output.path == "out/2028-01-01" and found[2].input.path == "in/2028-01-01"
    assert len(each_date(config(input__date="2026-11-21..2026-11-21"))) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input__date": "2026-02-30"}, "there is no 2026-02-30 in the calendar"),
        ({"input__date": "20261121"}, "20261121 is no date; say it as 2026-11-21"),
        ({"input__date": "2026-11-3"}, "2026-11-3 is no date"),
        ({"input__date": "yesterday"}, "yesterday is no date"),
        ({"input__date": ""}, "nothing is no date"),
        ({"input__date": "2026-11-01.."}, "nothing is no date"),
        ({"input__date": "2026-11-01..2026-11-31"}, "there is no 2026-11-31"),
        ({"input__date": "2026-11-30..2026-11-01"}, "runs backwards; say 2026-11-01..2026-11-30"),
        ({"input__date": "1026-11-30..2026-11-01"}, "at most"),
        ({"input__date": "2026-11-01..2026-11-02", "output__path": "out"}, "output.path has no {date}"),
        ({"input__date": "2026-11-01..2026-11-02", "input__path": "in"}, "input.path has no {date}"),
        ({"input__date": "2026-11-01", "input__path": "in", "output__path": "out"}, "no path has {date}"),
        ({"input__path": "in"}, "output.path=out/{date}: {date} stands for input.date, which is missing"),
        ({"input__path": "in", "output__path": "out", "gate__input": "g/{date}"}, "gate.input=g/{date}: {date} stands"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(fields: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        each_date(config(**fields))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_no_quotes_are_needed_on_the_command_line(project: Path) -> None:
    found = compose_dates([*MINE, "input.date=2026-11-21..2026-11-22", "gate.input=s3://gold/ds={date}/*.csv"])
    assert [(each.input.path, each.output.path, each.gate.input) for each in found] == [
        (f"in/ds=2026-11-{day}", f"out/2026-11-{day}", f"s3://gold/ds=2026-11-{day}/*.csv") for day in (21, 22)
    ]
    swept = compose_each(["-m", *MINE, "input.date=2026-11-01..2026-11-02,2026-11-05"])
    assert [each.input.date for each in swept if isinstance(each, Config)] == ["2026-11-01", "2026-11-02", "2026-11-05"]


def test_python_composes_one_date_at_a_time(compose: Callable[..., Config], project: Path) -> None:
    assert compose(*MINE[2:], "input.date=2026-11-21").output.path == "out/2026-11-21"
    with pytest.raises(ConfigError, match="3 dates are as many runs; compose one date at a time"):
        compose(*MINE[2:], "input.date=2026-11-21..2026-11-23")


@pytest.mark.parametrize(
    "path", ["in/ds={date}", "in/ds={date}/a.jsonl", "in/ds={date}/*", "in/ds={date}/a.*,in/x.jsonl"]
)
def test_the_date_is_a_column_where_its_folder_is_called_after_one(
    compose: Callable[..., Config], project: Path, path: str
) -> None:
    write_jsonl(project / "in/ds=2026-11-21/a.jsonl", rows_of(3))
    write_jsonl(project / "in/x.jsonl", rows_of(2))
    one = compose(f'input.path="{path}"', "output.path=out/{date}", "input.date=2026-11-21")
    objects = list_inputs(one).objects
    assert objects[0].name == "ds=2026-11-21/a.jsonl"
    assert partition_types(each.name for each in objects) == {"ds": "string"}


def test_without_a_folder_called_after_it_the_date_is_no_column(compose: Callable[..., Config], project: Path) -> None:
    write_jsonl(project / "in/2026-11-21.jsonl", rows_of(3))
    one = compose("input.path=in/{date}.jsonl", "input.date=2026-11-21")
    assert [each.name for each in list_inputs(one).objects] == ["2026-11-21.jsonl"]


def test_each_date_of_a_range_has_its_rows_its_column_and_its_verdict(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for day in ("01", "03"):
        write_jsonl(project / f"in/ds=2026-11-{day}/rows.jsonl", rows_of(5))
    dates = "input.date=2026-11-01..2026-11-03"
    first, _, third = compose_dates([*MINE, dates])
    manifest, rows, code = finished(first)
    assert (manifest["rows"], code) == (5, 0)
    assert {row["ds"] for row in rows} == {"2026-11-01"}
    assert {row["batchq_id"].split("@")[0] for row in rows} == {"ds=2026-11-01/rows.jsonl"}
    assert completed(third).text.startswith("batchq · mine · 2026-11-03 · complete")
    capsys.readouterr()
    assert main(["verify", *MINE, dates]) == 1, "the highest exit code counts"
    said = capsys.readouterr()
    assert said.out.count("5 rows = 5 answers + 0 failures in 1 object; each of the input's rows once") == 2
    told = said.err.splitlines()
    assert [line.partition("] ")[2] for line in told if line.startswith("[")] == [
        f"2026-11-0{n}, {n} of 3" for n in (1, 2, 3)
    ]
    assert [line for line in told if line.startswith("batchq: ")] == [
        f"batchq: {project}/out/2026-11-02: no run has been planned there yet"
    ]


def test_a_signal_between_two_dates_ends_the_range(project: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    done = []

    def act(config: Any) -> tuple[int, str]:
        done.append(config.input.date)
        _stop_on_signals(grace=1e6)
        os.kill(os.getpid(), signal.SIGTERM)
        return 0, "complete all the same"

    try:
        assert _act(Verb("", act), compose_dates([*MINE, "input.date=2026-11-01..2026-11-03"])) == ExitCode.STOPPED
        assert done == ["2026-11-01"]
        done.clear()
        assert _act(Verb("", act), compose_dates([*MINE, "input.date=2026-11-02"])) == ExitCode.COMPLETE
        assert done == ["2026-11-02"], "of an earlier command's signal the next one knows nothing"
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
