"""What lies below an input and is none of its rows: own products, other outputs of batchq, tables with own logs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchq import input, storage
from batchq.cli import main
from batchq.cli.verify import verify
from batchq.config import Config, InputConfig
from batchq.errors import InputError
from batchq.plan.inputs import check_inputs, list_inputs
from batchq.plan.stored import load_plan
from tests.helpers import rows_of, write_jsonl
from tests.inputs import place, write
from tests.jobs import finished, planned

ROW = b'{"text": "all is well", "gold": "good", "id": 1}\n'
UUID = "0b1c2d3e-4f50-6172-8394-a5b6c7d8e9f0"


def put(root: str, *names: str) -> None:
    for name in names:
        place(root, name, ROW)


def listed(root: str, path: str, own: str = "") -> list[str]:
    never = {input.OWN: storage.join(root, own)} if own else {}
    return [each.name for each in input.list_input(InputConfig(path=storage.join(root, path)), never).objects]


# ---- a run's own output ----


@pytest.mark.parametrize(
    ("path", "output"),
    [
        ("corpus", "corpus/out"),
        ("corpus/", "corpus/out/"),
        ("./corpus", "corpus/../corpus/out"),
        ("corpus/**/*.parquet", "./corpus/out"),
        ("corpus/**", "corpus/deep/out"),
        ("linked", "corpus/out"),
        ("corpus", "linked/out"),
        ("corpus", "elsewhere"),  # corpus/link-to-out leads there
    ],
)
def test_a_run_again_reads_none_of_its_own_output(
    path: str, output: str, compose: Callable[..., Config], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planned, run, killed and resumed, verified, planned again elsewhere: always the same two rows."""
    (project / "corpus/deep").mkdir(parents=True)
    for name in ("a", "deep/b"):
        pq.write_table(pa.Table.from_pylist(rows_of(1)), project / f"corpus/{name}.parquet")
    (project / "linked").symlink_to("corpus")
    (project / "elsewhere").mkdir()
    (project / "corpus/link-to-out").symlink_to("../elsewhere")
    config = compose(f"input.path={path}", f"output.path={output}")
    planned(config)
    out = project / output
    write(out / "data/killed.parquet", ROW)  # what a reader would take for rows
    write(out / "meta/attempts/00000/0001.json", ROW)
    fixed = load_plan(storage.normalize(output))
    assert fixed is not None and len(fixed.objects) == 2
    assert check_inputs(fixed, config) == []
    (out / "data/killed.parquet").unlink()
    shutil.rmtree(out / "meta/attempts")
    _, rows, code = finished(config, fixed)
    assert (len(rows), code) == (2, 0)
    assert check_inputs(fixed, config) == []
    assert verify(config)[0]
    assert [each.name.rpartition("/")[2] for each in list_inputs(config).objects] == ["a.parquet", "b.parquet"]
    # A run elsewhere reads none of it either: it is an output of batchq.
    assert main(["plan", "job=mine", "engine=fake", f"input.path={path}", "output.path=another"]) == 0
    said = capsys.readouterr().out
    assert "2 objects" in said and "(in outputs of batchq)" in said.split("left out")[1]


@pytest.mark.parametrize(
    ("path", "own"), [("out", "out"), ("out/data", "out"), ("out/in/a.jsonl", "out"), ("out/in", "out"), ("o*", "out")]
)
def test_an_input_within_the_output_is_refused(root: str, path: str, own: str) -> None:
    put(root, "out/in/a.jsonl", "out/data/part-00000.jsonl")
    with pytest.raises(InputError, match=r"in output\.path, such as .*/out/.*none of its own products"):
        listed(root, path, own)


def test_an_own_output_is_left_out_and_counted(root: str) -> None:
    put(root, "in/a.jsonl", "in/out/data/part-00000.jsonl", "in/out/meta/runs/x.json", "in/out/notes.jsonl")
    put(root, "in/outlook.jsonl", "in/out/meta/.tmp/part-00000.jsonl.0b1c", "in/out/_SUCCESS")
    never = {input.OWN: storage.join(root, "in/out/")}
    found = input.list_input(InputConfig(path=storage.join(root, "in")), never)
    assert [each.name for each in found.objects] == ["a.jsonl", "outlook.jsonl"]
    assert found.left_out == {"in output.path": 3}


def test_caches_and_configuration_are_no_input_unless_they_are_named(
    compose: Callable[..., Config], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHQ_CACHE", str(project / "cache"))
    for name in ("a.jsonl", "cache/spent/x.json", "checkpoints/int8/config.json", "cache/corpus/b.jsonl"):
        write(project / name, ROW)
    write(project / "llama/tokenizer.json", ROW)
    found = list_inputs(compose("input.path=.", "quantization.cache=checkpoints", "model.path=llama"))
    assert [each.name for each in found.objects] == ["a.jsonl"]
    where = {"in the cache": 2, "in quantization.cache": 1, "in the configuration": 1, "in model.path": 1}
    assert found.left_out == where
    assert [each.name for each in list_inputs(compose("input.path=cache/corpus")).objects] == ["b.jsonl"]


# ---- outputs of other runs ----

OUTPUTS = ["old/meta/plan.json", "old/data/part-00000.jsonl", "old/meta/report.json", "old/beside.jsonl"]
TRIED = ["tried/meta/runs/20261130T162625-0123abcd.json"]


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("in", ["a.jsonl", "data/b.jsonl", "old/beside.jsonl"]),
        ("in/**/*.jsonl", ["a.jsonl", "data/b.jsonl", "old/beside.jsonl"]),
        ("in/*", ["a.jsonl", "data/b.jsonl", "old/beside.jsonl"]),
        ("in/old/data", ["part-00000.jsonl"]),
        ("in/old/data/", ["part-00000.jsonl"]),
        ("in/old/data/*.jsonl", ["part-00000.jsonl"]),
        ("in/old/data/part-00000.jsonl", ["part-00000.jsonl"]),
        ("in/*/data", ["data/part-00000.jsonl"]),
    ],
)
def test_an_output_of_batchq_is_input_only_by_its_data_folder(root: str, path: str, names: list[str]) -> None:
    put(root, *(f"in/{name}" for name in ["a.jsonl", "data/b.jsonl", *OUTPUTS, *TRIED]))
    if path == "in/*/data":
        names = [f"old/{name}" for name in names]
    assert listed(root, path) == names


@pytest.mark.parametrize("path", ["old", "old/meta", "old/meta/report.json", "old/**/part*", "tried"])
def test_what_else_an_output_holds_is_refused_with_the_way_to_its_rows(root: str, path: str) -> None:
    put(root, *(name for name in [*OUTPUTS, *TRIED] if "beside" not in name))
    with pytest.raises(InputError, match=r"in outputs of batchq.*name an output's data/"):
        listed(root, path)


def test_answers_of_a_run_are_labelled_on_purpose(compose: Callable[..., Config], project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(9))
    finished(compose())
    again = compose("input.path=out/data", "output.path=again", "task.name=second", "output.columns=[text]")
    _, rows, code = finished(again)
    assert (len(rows), code) == (9, 0)
    assert verify(again)[0]


# ---- tables with a log of their own ----

TABLES = {
    "Delta table": "_delta_log/00000000000000000000.json",
    "Hudi table": ".hoodie/hoodie.properties",
    "Iceberg table": f"metadata/00001-{UUID}.metadata.json",
    "Iceberg table of Hadoop's": "metadata/v3.metadata.json",
    "Iceberg table of many files": f"metadata/{UUID}-m0.avro",
    "Paimon table": "snapshot/snapshot-1",
    "streaming sink of Spark": "_spark_metadata/0",
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("path", ["t", "t/*.jsonl", "t/*/*.jsonl", "t/day=1", "t/day=1/p.jsonl", "**/*.jsonl", ""])
def test_a_table_is_no_list_of_files(root: str, kind: str, path: str) -> None:
    put(root, "t/p.jsonl", "t/day=1/p.jsonl", f"t/{TABLES[kind]}", "beside/a.jsonl")
    with pytest.raises(
        InputError, match=rf"/t/.*lies in the {kind.split(' of H')[0].split(' of m')[0]} .*/t; its own log"
    ):
        listed(root, path)
    assert listed(root, "beside") == ["a.jsonl"]
    assert listed(root, "b*/*.jsonl") == ["beside/a.jsonl"], "a table that isn't meant is in nobody's way"


def test_folders_that_are_only_called_like_those_of_tables_are_read(root: str) -> None:
    put(root, "in/metadata/video.metadata.json", "in/snapshot/latest.jsonl", "in/meta/runs/a.jsonl", "in/data/b.jsonl")
    assert len(listed(root, "in")) == 4


def test_a_refused_table_is_one_line_and_exit_code_2(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(project / "t/part-0.jsonl", ROW)
    write(project / "t/_delta_log/00000000000000000000.json", json.dumps({"add": {}}))
    for verb in ("plan", "run"):
        assert main([verb, "job=mine", "engine=fake", "input.path=t"]) == 2
        said = capsys.readouterr().err
        assert "Delta table" in said and "Traceback" not in said and len(said.strip().splitlines()) == 1
    assert not os.path.exists(project / "out")
