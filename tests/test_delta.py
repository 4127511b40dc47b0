"""An output as a Delta table: its rows once, whichever set is read, and nothing that Delta would read otherwise."""

from __future__ import annotations

import datetime
import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from batchq import storage
from batchq.cli import main
from batchq.cli.clean import clean
from batchq.cli.verify import verify
from batchq.config import Config, TableFormat
from batchq.errors import BatchqError, ConfigError, OutputTaken, StorageError
from batchq.input.snapshots import options
from batchq.job.publish import is_due, publish
from batchq.output import delta
from batchq.plan.stored import load_plan
from batchq.records import Plan
from batchq.report.outcome import compose_report
from batchq.storage import failpoint
from tests.helpers import rows_of, write_jsonl
from tests.jobs import completed, finished, planned, rows

WHEN = datetime.datetime(2026, 1, 31, 12, 0, 0, 123456, datetime.UTC)


@pytest.fixture
def done(compose: Callable[..., Config], project: Path) -> Config:
    """40 rows of a Parquet file in four parts, with types that a table's log has words of its own for."""
    more = {"at": WHEN, "price": Decimal("12.340"), "day": WHEN.date(), "share": 0.5, "none": None}
    table = pa.Table.from_pylist([{**row, **more} for row in rows_of(40)])
    kinds = {"at": pa.timestamp("us", "Europe/Berlin"), "none": pa.int64()}
    schema = pa.schema([pa.field(f.name, kinds.get(f.name, f.type)) for f in table.schema])
    pq.write_table(table.cast(schema), project / "rows.parquet", row_group_size=10)
    config: Config = compose("input.path=rows.parquet", "output.rows_per_shard=10", "output.table=delta")
    finished(config)
    return config


def plan_of(config: Config) -> Plan:
    plan = load_plan(storage.normalize(config.output.path))
    assert plan is not None
    return plan


def published(config: Config) -> None:
    publish(config, plan_of(config), threading.Event(), lambda _: None)


def table(uri: str) -> DeltaTable:
    return DeltaTable(uri, storage_options=options())


def test_it_has_the_rows_and_their_types(done: Config) -> None:
    published(done)
    found = table("out").to_pyarrow_table().sort_by("batchq_id")
    assert found.to_pylist() == rows(done)
    kinds = {field["name"]: field["type"] for field in json.loads(table("out").schema().to_json())["fields"]}
    assert [kinds[name] for name in ("at", "price", "day", "share")] == ["timestamp", "decimal(5,3)", "date", "double"]
    assert verify(done)[0]


def test_statistics_are_the_rows(done: Config) -> None:
    published(done)
    logged = [json.loads(line) for line in Path("out/_delta_log/00000000000000000000.json").read_text().splitlines()]
    stats = [json.loads(each["add"]["stats"]) for each in logged if "add" in each]
    assert [each["numRecords"] for each in stats] == [10] * 4
    for each in stats:
        assert each["minValues"]["at"] == each["maxValues"]["at"] == "2026-01-31T12:00:00.123456Z"
        assert each["minValues"]["day"] == "2026-01-31" and each["nullCount"]["none"] == 10
        assert not {"share", "price", "none", "label_probability"} & {*each["minValues"], *each["maxValues"]}
    assert sorted(each["minValues"]["id"] for each in stats) == [0, 10, 20, 30]
    found = table("out").to_pyarrow_table(filters=[("id", ">=", 30), ("at", ">=", WHEN)])
    assert sorted(found.column("id").to_pylist()) == list(range(30, 40))


def test_it_is_registered_once_and_switched_in_one_commit(done: Config) -> None:
    published(done)
    published(done)
    assert table("out").version() == 0 and not is_due(done, plan_of(done))
    done.output.compact = 1
    published(done)
    published(done)
    compose_report(done)
    now = table("out")
    assert now.version() == 1 and len(now.file_uris()) == 1 and "compact-" in now.file_uris()[0]
    assert len(DeltaTable("out", version=0).file_uris()) == 4
    assert sorted(now.to_pyarrow_table().column("id").to_pylist()) == list(range(40))
    assert now.transaction_version(f"batchq-{plan_of(done).fingerprint}") == delta.COMPACTED
    assert verify(done)[0]


def test_parts_that_the_table_has_are_not_removed(done: Config) -> None:
    published(done)
    done.output.table, done.output.compact, done.clean.parts = None, 1, True
    published(done)
    with pytest.raises(BatchqError, match="its Delta table has the parts"):
        clean(done)
    done.output.table = TableFormat.delta
    assert not verify(done)[0]
    published(done)
    assert "removed 4 parts" in clean(done)
    assert table("out").to_pyarrow_table().num_rows == 40


def test_a_table_that_somebody_changed_is_left_alone(done: Config) -> None:
    published(done)
    table("out").delete("id < 10")
    done.output.compact = 1
    with pytest.raises(StorageError, match="somebody else has changed"):
        published(done)
    assert table("out").version() == 1


def test_another_table_is_not_overwritten(compose: Callable[..., Config], project: Path, done: Config) -> None:
    write_deltalake("out", pa.table({"x": [1]}))
    with pytest.raises(OutputTaken, match="didn't make"):
        published(done)
    assert table("out").to_pyarrow_table().num_rows == 1
    write_deltalake("other", pa.table({"x": [1]}))
    with pytest.raises(OutputTaken, match="is a Delta table already"):
        planned(compose("input.path=rows.parquet", "output.table=delta", "output.path=other"))
    planned(compose("input.path=rows.parquet", "output.path=other"))


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        (pa.uint32(), 1, "unsigned whole numbers"),
        (pa.time64("us"), 1, "such type"),
        (pa.timestamp("ns"), 1, "nanoseconds"),
        (pa.list_(pa.uint8()), [1], "unsigned whole numbers"),
        (pa.struct([("a", pa.duration("s"))]), {"a": 1}, "such type"),
    ],
    ids=str,
)
def test_what_delta_does_not_hold_is_refused_when_planned(
    compose: Callable[..., Config], project: Path, kind: pa.DataType, value: Any, why: str
) -> None:
    made = pa.Table.from_pylist(rows_of(3)).append_column("odd", pa.array([value] * 3, kind))
    pq.write_table(made, project / "rows.parquet")
    with pytest.raises(ConfigError, match=f"column odd is .*Delta has no {why}; leave it out with output.columns"):
        planned(compose("input.path=rows.parquet", "output.table=delta"))
    planned(compose("input.path=rows.parquet", "output.table=delta", "output.columns=[id]"))


@pytest.mark.parametrize(
    ("name", "why"), [("a b", "column 'a b' has ' ' in its name"), ("ID", "columns id and ID are the same to Delta")]
)
def test_names_that_delta_does_not_take_are_refused_when_planned(
    compose: Callable[..., Config], project: Path, name: str, why: str
) -> None:
    write_jsonl(project / "rows.jsonl", [{**row, name: 1} for row in rows_of(3)])
    with pytest.raises(ConfigError, match=why):
        planned(compose("output.table=delta"))


def test_times_without_a_zone(compose: Callable[..., Config], project: Path) -> None:
    when = WHEN.replace(tzinfo=None)
    pq.write_table(pa.Table.from_pylist([{**row, "at": when} for row in rows_of(3)]), project / "rows.parquet")
    config = compose("input.path=rows.parquet", "output.table=delta")
    finished(config)
    published(config)
    assert table("out").to_pyarrow_table(filters=[("at", ">=", when)]).column("at").to_pylist() == [when] * 3
    assert not table("out").to_pyarrow_table(filters=[("at", ">", when)]).num_rows


def test_the_page_s_commands(done: Config, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run whose output becomes a table, which is compacted and switched, and verified."""
    page = (Path(__file__).parent.parent / "docs/tables.md").read_text()
    section = page.partition("## The output as a Delta table")[2].partition("\n## ")[0]
    commands = re.findall(r"^python -m batchq ([^#\n]*)", section, re.M)
    assert len(commands) == 3
    own = [
        "engine=fake",
        "engine.max_model_len=256",
        "gate.enabled=false",
        "input.path=rows.parquet",
        "output.path=new",
    ]
    versions = []
    for command in commands:
        asked = command.replace("job=sentiment_transcripts", "job=mine").split()
        assert main([*asked, *own]) == 0, capsys.readouterr().err
        versions.append(table("new").version())
    assert versions == [0, 1, 1]


def test_vacuum_lite_leaves_the_run_s_records(done: Config) -> None:
    published(done)
    done.output.compact = 1
    published(done)
    asked: dict[str, Any] = {"retention_hours": 0, "enforce_retention_duration": False, "dry_run": True}
    assert all(path.startswith("data/") for path in table("out").vacuum(**asked))
    assert any("meta/" in path for path in table("out").vacuum(full=True, **asked)), "as docs/tables.md warns"


def test_another_job_reads_it(done: Config, capsys: pytest.CaptureFixture[str]) -> None:
    published(done)
    asked = ["plan", "job=mine", "engine=fake", "output.path=new", "task.gold=null", "output.columns=[id]"]
    assert main([*asked, "input.path=out", "input.format=delta"]) == 0
    assert "4 objects" in capsys.readouterr().out
    assert main([*asked, "input.path=out/data"]) == 0
    assert "4 objects" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["local", "remote"])
def test_of_drivers_that_saw_the_same_one_commits(
    where: str, compose: Callable[..., Config], project: Path, request: pytest.FixtureRequest
) -> None:
    """Six drivers, with no lease between them, have all looked at the table before the first of them commits."""
    output = f"{request.getfixturevalue('remote')}/out" if where == "remote" else "out"
    write_jsonl(project / "rows.jsonl", rows_of(20))
    config = compose(f"output.path={output}", "output.rows_per_shard=10", "output.table=delta")
    completed(config)
    at_once(config, 6)
    assert table(output).version() == 0 and len(table(output).file_uris()) == 2
    config.output.compact = 1
    at_once(config, 6)
    assert table(output).version() == 1 and len(table(output).file_uris()) == 1
    assert sorted(table(output).to_pyarrow_table().column("id").to_pylist()) == list(range(20))
    assert verify(config)[0]


def at_once(config: Config, drivers: int) -> None:
    """Publish by so many threads, each of which waits for all others right before its commit."""
    gate = threading.Barrier(drivers, timeout=60)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(drivers) as threads:
        patch.setattr(failpoint, "reach", lambda name: gate.wait() if name == "delta.commit.before" else None)
        for done in [threads.submit(published, config) for _ in range(drivers)]:
            done.result()
