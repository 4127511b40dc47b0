"""Compaction: few large objects with the same rows, announced whole or not at all, and what reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchq import input, storage
from batchq.cli import main
from batchq.cli.clean import clean
from batchq.cli.verify import verify
from batchq.config import Config, InputConfig
from batchq.errors import BatchqError, InputError, StorageError
from batchq.output import compaction, objects, receipts
from batchq.plan.committed import read_committed
from batchq.plan.stored import load_plan
from batchq.records import Plan
from batchq.report.outcome import compose_report
from batchq.worker.reuse import Reuse
from tests.helpers import rows_of, write_jsonl
from tests.jobs import finished


@pytest.fixture
def done(compose: Callable[..., Config], project: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """90 rows in nine parts, of which one has long rows; row groups are small here."""
    monkeypatch.setattr(compaction, "GROUP_BYTES", 6_000)
    rows = rows_of(90)
    rows[41]["text"] = "long " * 40
    write_jsonl(project / "rows.jsonl", rows)
    config: Config = compose("output.rows_per_shard=10", "input.id=id")
    finished(config)
    return config


def plan_of(config: Config) -> Plan:
    plan = load_plan(storage.normalize(config.output.path))
    assert plan is not None
    return plan


def compact(config: Config, size: int = 512) -> objects.Compacted:
    made = compaction.compact(storage.normalize(config.output.path), plan_of(config), size, lambda *_: None)
    assert made is not None
    return made


def in_order(uris: list[str]) -> pa.Table:
    return pa.concat_tables(pq.ParquetFile(uri).read() for uri in uris)


def test_the_rows_are_the_same_in_the_same_order(done: Config) -> None:
    output = storage.normalize(done.output.path)
    before, said = in_order(objects.parts(output)), read_committed(plan_of(done), output).receipts
    compact(done)
    (made,) = objects.listed(output)
    table = in_order([made])
    assert table.equals(before) and table.schema.equals(before.schema)
    assert table.column("id").to_pylist() == list(range(90))
    file = pq.ParquetFile(made)
    assert 1 < file.num_row_groups < 9
    assert (receipts.read_each(made), read_committed(plan_of(done), output).receipts) == ([*said], said)
    assert objects.parts(output) == sorted(map(str, Path(output, "data").iterdir()))


def test_the_objects_are_about_as_large_as_is_asked_for(done: Config) -> None:
    parts = compaction._sources(storage.normalize(done.output.path))
    most = 2 * max(part.size for part in parts)
    cut = list(compaction._grouped(parts, most))
    assert all(sum(part.size for part in group) <= most for group in cut) and 4 <= len(cut) <= 5
    assert [part for group in cut for part in group] == parts


def test_the_verb_tells_what_is_read(done: Config, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["job=mine", "engine=fake", "output.rows_per_shard=10", "input.id=id"]
    assert main(["compact", *asked]) == 0
    folder = json.loads((project / "out/meta/manifest.json").read_text())["read"]
    assert f"{project}/out/{folder} · 1 object" in capsys.readouterr().out
    assert main(["status", *asked]) == 0
    assert f"{project}/out/{folder} · 1 object" in capsys.readouterr().out
    assert main(["compact", *asked, "output.compact=7"]) == 0  # nothing to do: what was announced stays
    assert [path.name for path in (project / "out").glob("compact-*")] == [folder]
    assert main(["verify", *asked]) == 0
    assert "90 rows = 90 answers + 0 failures in 1 object" in capsys.readouterr().out


def test_a_run_that_is_not_complete_is_not_compacted(
    done: Config, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "out/data/part-00003.parquet").unlink()
    assert main(["compact", "job=mine", "engine=fake", "output.rows_per_shard=10", "input.id=id"]) == 1
    assert "1 shards to go; only a complete run is compacted" in capsys.readouterr().err


def test_it_goes_on_where_it_was_killed(done: Config, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "_grouped", lambda parts, _: ([part] for part in parts))

    def killed(number: int, _: int) -> None:
        if number == 4:
            raise KeyboardInterrupt

    output = storage.normalize(done.output.path)
    with pytest.raises(KeyboardInterrupt):
        compaction.compact(output, plan_of(done), 1, killed)
    assert objects.folder(output) == f"{output}/data" and objects.announced(output) is None
    first = sorted(project.glob("out/compact-*/*"))
    times = [path.stat().st_mtime_ns for path in first]
    assert len(first) == 4
    compact(done, 1)
    assert [path.stat().st_mtime_ns for path in first] == times
    assert verify(done)[0]


def test_rows_of_another_run_under_its_name_are_refused(
    done: Config, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "_grouped", lambda parts, _: ([part] for part in parts))
    compact(done)
    (project / "out/meta/compact.json").unlink()
    (folder,) = project.glob("out/compact-*")
    shutil.copy(folder / "rows-00001.parquet", folder / "rows-00000.parquet")
    with pytest.raises(StorageError, match=r"rows-00000\.parquet: holds other rows than it should"):
        compact(done)


def test_everything_reads_the_compacted_set_once_the_parts_are_gone(done: Config, project: Path) -> None:
    done.clean.parts = True
    with pytest.raises(BatchqError, match="give `compact` first"):
        clean(done)
    before = compose_report(done).summary
    keys = in_order(objects.parts(str(project / "out"))).column("batchq_key").to_pylist()
    known = Reuse(str(project / "out"), done.task).find(keys)
    compact(done)
    assert "removed 9 parts, each compared" in clean(done)
    assert not list((project / "out/data").glob("*"))
    after = compose_report(done).summary
    assert {k: v for k, v in after.items() if k not in ("read", "objects")} == {
        k: v for k, v in before.items() if k not in ("read", "objects")
    }
    good, words = verify(done)
    assert good, words
    again = Reuse(str(project / "out"), done.task)
    assert again.find(keys) == known and len(known) == len(again) == 90


def test_a_part_that_differs_stays(done: Config, project: Path) -> None:
    compact(done)
    part = project / "out/data/part-00002.parquet"
    table, receipt = pq.ParquetFile(part).read(), pq.read_metadata(part).metadata[b"batchq.receipt"]
    other = table.set_column(table.schema.get_field_index("label"), "label", pa.array(["good"] * table.num_rows))
    with pq.ParquetWriter(part, other.schema, write_page_checksum=True) as writer:
        writer.write_table(other)
        writer.add_key_value_metadata({b"batchq.receipt": receipt})
    good, words = verify(done)
    assert not good and "part-00002.parquet" in words and "holds other rows" in words
    done.clean.parts = True
    with pytest.raises(BatchqError, match=r"part-00002\.parquet.*it stays"):
        clean(done)
    assert part.exists()


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "stray"])
def test_verify_proves_the_compacted_set(done: Config, project: Path, harm: str) -> None:
    compact(done)
    compose_report(done)
    (made,) = project.glob("out/compact-*/*")
    data = bytearray(made.read_bytes())
    if harm == "flip":
        data[len(data) // 3] ^= 1
        made.write_bytes(data)
    elif harm == "cut":
        made.write_bytes(data[:-100])
    elif harm == "gone":
        made.unlink()
    else:
        made.with_name("more.parquet").write_bytes(data)
    good, words = verify(done)
    assert not good and made.parent.name in words


def test_an_input_is_the_set_that_is_read(done: Config, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "_grouped", lambda parts, _: ([parts[0]], parts[1:]))
    compact(done)
    (folder,) = project.glob("out/compact-*")

    def listed(path: object) -> list[str]:
        return [each.name for each in input.list_input(InputConfig(path=str(path))).objects]

    assert listed(folder) == listed(folder / "*.parquet") == ["rows-00000.parquet", "rows-00001.parquet"]
    with pytest.raises(InputError, match=f"are read from .*{folder.name}; name that"):
        listed(project / "out/data")
    (project / "out/meta/compact.json").rename(project / "aside")
    with pytest.raises(InputError, match=r"are read from .*out/data; name that"):
        listed(folder)
    assert len(listed(project / "out/data")) == 9
    with pytest.raises(InputError, match="in outputs of batchq"):
        listed(project / "out")
