"""The Arrow schema of an input's columns."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchq import input
from batchq.errors import InputError
from tests.inputs import objects, parquet, schema_of, write


def test_a_jsonl_schema_holds_every_value(tmp_path: Path) -> None:
    lines = [
        {"s": "x", "i": 1, "f": 1, "b": True, "null": None, "mixed": 1, "list": [], "deep": {"a": 1}, "big": 2**70},
        {"s": None, "i": None, "f": 2.5, "b": None, "null": None, "mixed": "1", "list": [1, None], "deep": None},
        {"late": "x", "list": [1.5], "null": None, "chat": [{"role": "user"}], "bi": True, "odd": [1, "a"], "e": []},
        {"bi": 1, "strings": ["a"]},
    ]
    write(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines[:2]))
    write(tmp_path / "b.jsonl", "".join(json.dumps(line) + "\n" for line in lines[2:]) + "broken\n")
    text = pa.string()
    assert schema_of(tmp_path) == {
        "s": text,
        "i": pa.int64(),
        "f": pa.float64(),
        "b": pa.bool_(),
        "null": text,
        "mixed": text,
        "list": pa.list_(pa.float64()),
        "deep": text,
        "big": text,
        "late": text,
        "chat": text,
        "bi": text,
        "odd": text,
        "e": text,
        "strings": pa.list_(text),
    }
    assert list(schema_of(tmp_path, columns=["late", "i"])) == ["late", "i"]
    assert input.as_text("plain") == "plain" and json.loads(input.as_text({"é": [1]})) == {"é": [1]}


def test_a_parquet_schema_is_the_files_own(tmp_path: Path) -> None:
    parquet(tmp_path / "x.parquet")
    expected = {"n": pa.int64(), "text": pa.string(), "kind": pa.string(), "odd.name": pa.list_(pa.int64())}
    assert schema_of(tmp_path / "x.parquet") == expected
    listed = objects(tmp_path / "x.parquet")
    assert not input.infer_schema(listed, "parquet", None).metadata


def test_csv_and_text_are_strings(tmp_path: Path) -> None:
    write(tmp_path / "csv/a.csv", "id,n\n1,2\n")
    write(tmp_path / "txt/a.txt", "1\n")
    assert schema_of(tmp_path / "csv") == {"id": pa.string(), "n": pa.string()}
    assert schema_of(tmp_path / "txt") == {"text": pa.string()}
    write(tmp_path / "csv/b.csv", "n,id\n1,2\n")
    assert list(schema_of(tmp_path / "csv")) == ["id", "n"]
    write(tmp_path / "csv/c.csv", "n,other\n1,2\n")
    with pytest.raises(InputError, match=r"c\.csv: has other columns than a\.csv"):
        schema_of(tmp_path / "csv")


@pytest.mark.parametrize(
    ("name", "data"),
    [("x.jsonl", "\n \n"), ("x.txt", "\r\n\r\n"), ("x.csv", "a,b\n\n"), ("x.csv", "\n"), ("x.parquet", None)],
)
def test_an_input_without_rows_is_empty(tmp_path: Path, name: str, data: str | None) -> None:
    if data is None:
        pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / name)
    else:
        write(tmp_path / name, data)
    with pytest.raises(InputError, match="the input is empty"):
        schema_of(tmp_path / name)


def test_one_row_anywhere_is_enough(tmp_path: Path) -> None:
    for n in range(40):
        write(tmp_path / f"{n:02d}.jsonl", '{"a": 1}\n' if n == 3 else "\n")
    assert schema_of(tmp_path) == {"a": pa.int64()}


def test_a_column_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '{"a": 1, "b": 2}\n')
    with pytest.raises(InputError, match=r"input\.columns: no column c in the input; there are a, b"):
        schema_of(path, columns=["a", "c"])


def test_an_input_of_another_format_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", "id,text\n1,secret words\n")
    with pytest.raises(InputError, match=r"none of the first 2 rows is jsonl \(invalid_json 2\)") as refused:
        schema_of(path)
    assert "secret" not in str(refused.value)
