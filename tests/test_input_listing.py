"""What an input consists of, and what it is by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchq import input
from batchq.config import InputFormat
from batchq.errors import InputError
from tests.inputs import objects, write


@pytest.mark.parametrize(
    ("name", "format", "unit"),
    [
        ("a/b.jsonl", "jsonl", "bytes"),
        ("b.NDJSON", "jsonl", "bytes"),
        ("b.json.gz", "jsonl", "stream"),
        ("b.csv", "csv", "stream"),
        ("b.tsv.zst", "csv", "stream"),
        ("b.parquet", "parquet", "rows"),
        ("b.txt", "text", "bytes"),
        ("b.txt.bz2", "text", "stream"),
        ("data-00000-of-00001.arrow", "dataset", "rows"),
    ],
)
def test_a_format_goes_by_the_name(name: str, format: str, unit: str) -> None:
    assert input.format_of(name, InputFormat.auto) == format
    assert input.splittable(name, format) == unit


def test_a_format_that_cannot_be_told_names_the_choices() -> None:
    with pytest.raises(InputError, match=r"notes\.md.*jsonl, csv, parquet, text, dataset"):
        input.format_of("notes.md", InputFormat.auto)
    assert input.format_of("notes.md.gz", InputFormat.text) == "text"
    with pytest.raises(InputError, match="decompress"):
        input.format_of("x.parquet.gz", InputFormat.auto)


def test_input_is_a_file_a_folder_a_pattern_or_a_list(tmp_path: Path) -> None:
    for name in ["in/b.jsonl", "in/a/c.jsonl", "in/_SUCCESS", "in/a/.c.jsonl.crc", "in/empty.jsonl", "more/d.jsonl.gz"]:
        write(tmp_path / name, b"" if "empty" in name else b'{"a": 1}\n')

    def names(*paths: str) -> list[str]:
        return [each.name for each in objects(", ".join(str(tmp_path / path) for path in paths))]

    assert names("in") == ["a/c.jsonl", "b.jsonl"]
    assert names("in/b.jsonl") == ["b.jsonl"]
    assert names("in/*/*.jsonl") == ["a/c.jsonl"]
    assert names("in/b.jsonl", "in", "more/*.gz") == ["in/a/c.jsonl", "in/b.jsonl", "more/d.jsonl.gz"]
    [only] = objects(tmp_path / "in/b.jsonl")
    assert (only.uri, only.size) == (str(tmp_path / "in/b.jsonl"), 9) and only.etag


def test_an_input_that_cannot_be_says_what_was_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "in/a.jsonl", "")
    write(tmp_path / "mixed/a.jsonl", "{}")
    write(tmp_path / "mixed/b.csv", "a\n1\n")
    with pytest.raises(InputError, match=r"input\.path=.*none\.jsonl: no file, folder or object"):
        objects(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"input\.path=.*\*\.csv: nothing there matches"):
        objects(tmp_path / "in/*.csv")
    with pytest.raises(InputError, match="the input is empty"):
        objects(tmp_path / "in")
    with pytest.raises(InputError, match=r"one format at a time.*csv \(b\.csv\), jsonl \(a\.jsonl\)"):
        objects(tmp_path / "mixed")
