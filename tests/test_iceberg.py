"""Iceberg tables as input: the planned snapshot's rows, each once and as the table has them."""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.table import Table
from pyiceberg.transforms import IdentityTransform
from pyiceberg.types import DoubleType, LongType

from batchq import input, storage
from batchq.cli import main
from batchq.cli.verify import verify
from batchq.config import Config, InputConfig, InputFormat
from batchq.errors import BatchqError, Changed, InputError
from batchq.input import snapshots
from batchq.plan.inputs import check_inputs
from batchq.plan.stored import load_plan
from tests.helpers import rows_of
from tests.jobs import finished, planned, rows


def rows_from(first: int, count: int, **more: Any) -> pa.Table:
    return pa.Table.from_pylist([{**row, "id": row["id"] + first, **more} for row in rows_of(count)])


def catalog(folder: Path, warehouse: str) -> SqlCatalog:
    told = {}
    if warehouse.startswith("s3://"):
        told = {"s3.endpoint": os.environ["AWS_ENDPOINT_URL"], "s3.region": os.environ["AWS_REGION"]}
        told |= {"s3.access-key-id": os.environ["AWS_ACCESS_KEY_ID"]}
        told |= {"s3.secret-access-key": os.environ["AWS_SECRET_ACCESS_KEY"]}
    made = SqlCatalog("mine", uri=f"sqlite:///{folder}/catalog.db", warehouse=warehouse, **told)
    made.create_namespace("lake")
    return made


@pytest.fixture
def lake(project: Path) -> SqlCatalog:
    return catalog(project, f"file://{project}/wh")


def made(lake: SqlCatalog, *tables: pa.Table) -> Table:
    table = lake.create_table("lake.in", tables[0].schema)
    for each in tables:
        table.append(each)
    return table


IN = "wh/lake/in"


def files(version: int | None = None, path: str = IN, **more: Any) -> list[str]:
    asked = InputConfig(path=path, format=InputFormat.iceberg, version=version, **more)
    return [each.name for each in input.list_input(asked).objects]


def test_the_current_snapshot_is_planned_and_read(compose: Callable[..., Config], lake: SqlCatalog) -> None:
    when = datetime.datetime(2026, 1, 31, 12, 0, 0, 123456, datetime.UTC)
    table = made(lake, rows_from(0, 8, at=when))
    table.overwrite(rows_from(100, 4, at=when))
    with table.update_schema(allow_incompatible_changes=True) as change:
        change.union_by_name(rows_from(0, 1, at=when, added="x").schema)
    table.append(rows_from(200, 3, at=when, added="x"))
    config = compose(f"input.path={IN}", "input.format=iceberg")
    finished(config)
    plan, current = load_plan(storage.normalize("out")), table.current_snapshot()
    assert plan and current and plan.snapshot == f"Iceberg table, snapshot {current.snapshot_id}"
    found = rows(config)
    assert sorted(row["id"] for row in found) == [100, 101, 102, 103, 200, 201, 202]
    assert {row["added"] for row in found if row["id"] < 200} == {None}
    assert {row["at"] for row in found} == {when}
    assert verify(config)[0]


def test_a_plan_keeps_its_snapshot(compose: Callable[..., Config], lake: SqlCatalog, project: Path) -> None:
    table = made(lake, rows_from(0, 8))
    config = compose(f"input.path={IN}", "input.format=iceberg")
    plan = planned(config)
    table.overwrite(rows_from(100, 4))
    assert check_inputs(plan, config) == []
    finished(config, plan)
    assert sorted(row["id"] for row in rows(config)) == list(range(8))
    (name,) = {each.name for each in plan.objects}
    (project / IN / name).unlink()
    with pytest.raises(Changed, match="was planned and is gone"):
        check_inputs(plan, config)
    first = min(table.metadata.snapshots, key=lambda each: each.timestamp_ms).snapshot_id
    with pytest.raises(InputError, match=r"of its Iceberg table, snapshot \d+ is gone, by expire_snapshots perhaps"):
        files(first)


def test_a_snapshot_that_is_asked_for(lake: SqlCatalog, capsys: pytest.CaptureFixture[str]) -> None:
    table = made(lake, rows_from(0, 8), rows_from(100, 4))
    first, second = (each.snapshot_id for each in table.metadata.snapshots)
    assert (len(files(first)), len(files(second)), len(files())) == (1, 2, 2)
    assert len(files(path=table.metadata_location)) == len(files(path=table.metadata_location[7:])) == 2
    older = [entry.metadata_file for entry in table.metadata.metadata_log]
    assert len(files(path=older[-1][7:])) == 1
    asked = ["plan", "job=mine", "engine=fake", f"input.path={IN}"]
    assert main([*asked, "input.format=iceberg", f"input.version={first}"]) == 0
    assert f"parquet of an Iceberg table, snapshot {first}" in capsys.readouterr().out
    assert main([*asked, "input.format=iceberg", "input.version=7"]) == 2
    assert "input.version=7: no snapshot of" in capsys.readouterr().err
    assert main([*asked[:-1], "input.path=conf", "input.format=iceberg"]) == 2
    assert "no Iceberg table there" in capsys.readouterr().err
    for path in (IN, f"{IN}/data", f"{IN}/data/*.parquet"):
        assert main([*asked[:-1], f"input.path={path}"]) == 2
        said = capsys.readouterr().err
        assert "input.format=iceberg (pip install 'batchq[iceberg]')" in said and said.count("\n") == 1


def test_on_s3(remote: str, compose: Callable[..., Config], project: Path) -> None:
    table = made(catalog(project, remote), rows_from(0, 8), rows_from(100, 4))
    first = table.metadata.snapshots[0].snapshot_id
    where = table.metadata.location
    assert where.startswith("s3://") and (len(files(path=where)), len(files(first, where))) == (2, 1)
    config = compose(f"input.path={where}", "input.format=iceberg")
    finished(config)
    assert sorted(row["id"] for row in rows(config)) == [*range(8), *range(100, 104)]


def test_folders_of_partitions_are_no_columns(compose: Callable[..., Config], lake: SqlCatalog) -> None:
    given = rows_from(0, 8, code="007")
    table = lake.create_table("lake.in", given.schema)
    with table.update_spec() as change:
        change.add_field("code", IdentityTransform(), "kind")
    table.append(given)
    config = compose(f"input.path={IN}", "input.format=iceberg")
    finished(config)
    assert any("kind=" in name for name in files())
    assert {row["code"] for row in rows(config)} == {"007"} and "kind" not in rows(config)[0]
    assert sorted(row["id"] for row in rows(config)) == list(range(8))


def rename(table: Table) -> None:
    with table.update_schema() as change:
        change.rename_column("text", "words")


def retype(table: Table) -> None:
    with table.update_schema() as change:
        change.update_column("small", LongType())


def again(table: Table) -> None:
    with table.update_schema(allow_incompatible_changes=True) as change:
        change.delete_column("small")
    with table.update_schema() as change:
        change.add_column("small", DoubleType())


def gone(table: Table) -> None:
    with table.update_schema(allow_incompatible_changes=True) as change:
        change.delete_column("small")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename, "column words is called text in it"),
        (retype, "column small is long, and int in it"),
        (again, "its column small is another one of that name"),
        (gone, "have a column small, which the table hasn't"),
    ],
)
def test_columns_that_files_have_otherwise_are_refused(
    compose: Callable[..., Config], lake: SqlCatalog, change: Callable[[Table], None], words: str
) -> None:
    given = rows_from(0, 8).append_column("small", pa.array(range(8), pa.int32()))
    change(made(lake, given))
    with pytest.raises(InputError, match=words) as raised:
        planned(compose(f"input.path={IN}", "input.format=iceberg"))
    assert "\n" not in str(raised.value)
    if change is not rename:
        planned(compose(f"input.path={IN}", "input.format=iceberg", "input.columns=[id,text,gold]"))


def test_files_that_were_added_go_by_their_names(
    compose: Callable[..., Config], lake: SqlCatalog, project: Path
) -> None:
    table = made(lake, rows_from(0, 8))
    pq.write_table(rows_from(100, 4), project / IN / "data/more.parquet")
    table.add_files([f"file://{project}/{IN}/data/more.parquet"])
    assert len(files()) == 2
    pq.write_table(rows_from(200, 4), project / "elsewhere.parquet")
    table.add_files([f"file://{project}/elsewhere.parquet"])
    with pytest.raises(InputError, match=r"has a file elsewhere, file:///.*elsewhere\.parquet"):
        files()


def test_delete_files_are_refused(lake: SqlCatalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest of deletes, as Spark's merge-on-read writes; pyiceberg writes none itself."""
    from pyiceberg.manifest import ManifestContent, ManifestFile

    made(lake, rows_from(0, 8))
    assert len(files()) == 1
    monkeypatch.setattr(ManifestFile, "content", ManifestContent.DELETES)
    with pytest.raises(InputError, match="has delete files"):
        files()


def test_metadata_that_leaves_a_doubt_or_is_damaged(lake: SqlCatalog, project: Path) -> None:
    table = made(lake, rows_from(0, 8))
    newest = Path(table.metadata_location.removeprefix("file://"))
    twin = newest.with_name(newest.name.replace("-", "-0000", 1))
    shutil.copy(newest, twin)
    with pytest.raises(InputError, match="2 metadata files have the highest number, 1; name the one"):
        files()
    assert len(files(path=str(newest))) == 1
    twin.unlink()
    newest.write_text("{}")
    with pytest.raises(InputError, match="is no Iceberg table that can be read") as raised:
        files()
    assert "\n" not in str(raised.value)


def test_a_table_that_was_moved_is_refused(lake: SqlCatalog, project: Path) -> None:
    made(lake, rows_from(0, 8))
    shutil.move(project / "wh", project / "moved")
    with pytest.raises(InputError, match=r"has a file elsewhere, or was moved; the table says that it is in file:"):
        files(path="moved/lake/in")


def test_a_missing_library_is_one_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(snapshots, "import_module", missing)
    with pytest.raises(BatchqError, match=r"pip install 'batchq\[iceberg\]'"):
        files()
