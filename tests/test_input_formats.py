"""Every format is handled by name: one that is forgotten somewhere is refused, and never read as another."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchq import input
from batchq.config import InputFormat
from batchq.input.formats import FORMATS, LOGGED, TABLES, UNITS, splittable
from batchq.records import InputObject, Range


def test_every_format_has_a_unit_and_an_ending() -> None:
    files = {each.value for each in set(InputFormat) - LOGGED if each is not InputFormat.auto}
    assert set(UNITS) == set(FORMATS.values()) == files
    assert {"parquet", "dataset"} == TABLES


def test_what_is_compressed_is_read_by_one_worker() -> None:
    assert splittable("a.jsonl", "jsonl") == "bytes" and splittable("a.jsonl.gz", "jsonl") == "stream"
    assert splittable("a.csv", "csv") == "stream" and splittable("a.parquet", "parquet") == "rows"


@pytest.mark.parametrize("what", ["rows", "columns", "ranges"])
def test_a_format_that_is_unknown_is_not_read_as_another(what: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.orc"
    path.write_text("one\ntwo\n")
    obj = InputObject(str(path), "rows.orc", path.stat().st_size, "")
    with pytest.raises((AssertionError, KeyError), match="orc"):
        if what == "rows":
            list(input.read_rows(obj, "orc", Range("bytes", 0, obj.size), columns=None))
        elif what == "columns":
            input.infer_schema([obj], "orc", None)
        else:
            input.split(obj, "orc", rows_per_shard=10)
