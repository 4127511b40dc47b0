"""Tables with a log of their own as input: the planned version's rows, each once and as the table has them."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from batchq import input, storage
from batchq.cli import main
from batchq.cli.verify import verify
from batchq.config import Config, InputConfig, InputFormat
from batchq.errors import BatchqError, Changed, InputError
from batchq.input import snapshots
from batchq.plan.inputs import check_inputs
from batchq.plan.stored import load_plan
from tests.helpers import rows_of, write_jsonl
from tests.jobs import finished, planned, rows


def table_of(first: int, count: int, **more: Any) -> pa.Table:
    made = [{**row, "id": row["id"] + first, **more} for row in rows_of(count)]
    return pa.Table.from_pylist(made)


def files(path: str, version: int | None = None) -> list[str]:
    asked = InputConfig(path=path, format=InputFormat.delta, version=version)
    return [each.name for each in input.list_input(asked).objects]


def test_the_latest_version_is_planned_and_read(compose: Callable[..., Config], project: Path) -> None:
    when = {"at": datetime.datetime(2026, 1, 31, 12, 0, 0, 123456, datetime.UTC), "price": Decimal("12.340")}
    write_deltalake("in", table_of(0, 8, **when))
    write_deltalake("in", table_of(100, 4, **when), mode="overwrite")
    write_deltalake("in", table_of(200, 3, added="x", **when), mode="append", schema_mode="merge")
    config = compose("input.path=in", "input.format=delta")
    finished(config)
    plan = load_plan(storage.normalize("out"))
    assert plan is not None and plan.snapshot == "Delta table, version 2"
    found = rows(config)
    assert sorted(row["id"] for row in found) == [100, 101, 102, 103, 200, 201, 202]
    assert {row["added"] for row in found if row["id"] < 200} == {None}
    assert {(row["at"], row["price"]) for row in found} == {(when["at"], when["price"])}
    assert verify(config)[0]


def test_a_plan_keeps_its_version(compose: Callable[..., Config], project: Path) -> None:
    write_deltalake("in", table_of(0, 8))
    config = compose("input.path=in", "input.format=delta")
    plan = planned(config)
    write_deltalake("in", table_of(100, 4), mode="overwrite")
    assert check_inputs(plan, config) == []
    finished(config, plan)
    assert [row["id"] for row in sorted(rows(config), key=lambda row: row["id"])] == list(range(8))
    DeltaTable("in").vacuum(0, dry_run=False, enforce_retention_duration=False)
    with pytest.raises(Changed, match="was planned and is gone"):
        check_inputs(plan, config)
    with pytest.raises(InputError, match=r"of its Delta table, version 0 is gone, by VACUUM perhaps"):
        files("in", 0)


def test_partitions_have_the_tables_types(compose: Callable[..., Config], project: Path) -> None:
    table = pa.Table.from_pylist(
        [
            {
                "text": "row one says that all is well",
                "gold": "good",
                "code": "007",
                "n": 5,
                "d": datetime.date(2026, 1, 2),
            },
            {
                "text": "row two says that all is well",
                "gold": "bad",
                "code": "a b/ü",
                "n": -1,
                "d": datetime.date(2026, 1, 3),
            },
            {"text": "row three says that all is well", "gold": "bad", "code": None, "n": None, "d": None},
        ]
    )
    for only, row in (("007", 0), (None, 2)):
        write_deltalake(f"in-{only}", table.slice(row, 1), partition_by=["code"])
        found = snapshots.delta(f"in-{only}", None)
        assert found.partitions == {"code": "string"}
    write_deltalake("in", table, partition_by=["code", "n", "d"])
    config = compose("input.path=in", "input.format=delta")
    finished(config)
    found_rows = {row["code"]: (row["n"], row["d"]) for row in rows(config)}
    assert found_rows == {"007": (5, "2026-01-02"), "a b/ü": (-1, "2026-01-03"), None: (None, None)}
    assert verify(config)[0]


def test_a_version_that_is_asked_for(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_deltalake("in", table_of(0, 8))
    write_deltalake("in", table_of(100, 4), mode="append")
    assert (len(files("in", 0)), len(files("in", 1)), len(files("in"))) == (1, 2, 2)
    asked = ["plan", "job=mine", "engine=fake", "input.path=in"]
    assert main([*asked, "input.format=delta", "input.version=0"]) == 0
    assert "parquet of a Delta table, version 0" in capsys.readouterr().out
    assert main([*asked, "input.format=delta", "input.version=7"]) == 2
    assert "input.version=7: not a Delta table that can be read" in capsys.readouterr().err
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert "input.format=delta (pip install 'batchq[delta]')" in said and said.count("\n") == 1
    write_jsonl(project / "plain/rows.jsonl", rows_of(3))
    assert main([*asked[:-1], "input.path=plain", "input.format=delta"]) == 2
    assert main([*asked[:-1], "input.path=plain", "input.version=3"]) == 2
    assert "goes with input.format=delta" in capsys.readouterr().err


def test_on_s3(remote: str, project: Path) -> None:
    write_deltalake(f"{remote}/t", table_of(0, 8), storage_options=snapshots.options())
    write_deltalake(f"{remote}/t", table_of(9, 8), mode="append", storage_options=snapshots.options())
    assert len(files(f"{remote}/t")) == 2 and len(files(f"{remote}/t", 0)) == 1


def delta_log(project: Path, old: str, new: str, count: int = 8) -> None:
    write_deltalake("in", table_of(0, count))
    log = project / "in/_delta_log/00000000000000000000.json"
    assert old in log.read_text()
    log.write_text(log.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"configuration":{}', '"configuration":{"delta.columnMapping.mode":"name"}', "column mapping"),
        (
            '"minReaderVersion":1,"minWriterVersion":2',
            '"minReaderVersion":3,"minWriterVersion":7,"readerFeatures":["typeWidening"],"writerFeatures":["typeWidening"]',
            "typeWidening",
        ),
        ('"add":{"path":"', '"add":{"path":"s3://elsewhere/', "has a file elsewhere"),
    ],
    ids=["mapping", "widening", "clone"],
)
def test_what_files_alone_do_not_tell_right_is_refused(project: Path, old: str, new: str, words: str) -> None:
    delta_log(project, old, new)
    with pytest.raises(BatchqError, match=words) as raised:
        files("in")
    assert "\n" not in str(raised.value)


def test_deletion_vectors_are_refused(project: Path) -> None:
    """A vector of six rows, stored in the log itself: the example of the protocol's specification."""
    used = '"readerFeatures":["deletionVectors"],"writerFeatures":["deletionVectors"]'
    delta_log(
        project, '"minReaderVersion":1,"minWriterVersion":2', f'"minReaderVersion":3,"minWriterVersion":7,{used}', 40
    )
    assert len(files("in")) == 1  # allowed by the protocol, and none there
    log = project / "in/_delta_log/00000000000000000000.json"
    bitmap = "^Bg9^0rr910000000000iXQKl0rr91000f55c8Xg0@@D72lkbi5=-{L"
    vector = f'"deletionVector":{{"storageType":"i","pathOrInlineDv":"{bitmap}","sizeInBytes":44,"cardinality":6}}'
    log.write_text(log.read_text().replace('"tags":null', f'{vector},"tags":null'))
    with pytest.raises(InputError, match="has deletion vectors"):
        files("in")


def test_columns_that_only_files_have_are_refused(compose: Callable[..., Config], project: Path) -> None:
    write_deltalake("in", table_of(0, 8, secret=1))
    log = project / "in/_delta_log/00000000000000000000.json"
    column = r",{\"name\":\"secret\",\"type\":\"long\",\"nullable\":true,\"metadata\":{}}"
    assert column in log.read_text()
    log.write_text(log.read_text().replace(column, ""))
    with pytest.raises(InputError, match="have a column secret, which the table hasn't"):
        planned(compose("input.path=in", "input.format=delta"))


def test_a_missing_library_is_one_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(snapshots, "import_module", missing)
    with pytest.raises(BatchqError, match=r"pip install 'batchq\[delta\]'"):
        files("in")
    shutil.rmtree("in", ignore_errors=True)
