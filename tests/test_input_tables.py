"""Parquet and datasets on disk, by ordinal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchq import input
from batchq.config import InputFormat
from batchq.errors import InputError, RowError
from batchq.records import Range, Row
from tests.inputs import objects, one, parquet, rows, save_dataset, schema_of, write


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return save_dataset(tmp_path)


def test_parquet_rows_are_read_by_ordinal(tmp_path: Path) -> None:
    obj, format = one(parquet(tmp_path / "x.parquet"))

    def between(start: int, stop: int, **options: Any) -> list[Row]:
        return list(input.read_rows(obj, format, Range("rows", start, stop), **{"columns": None, **options}))

    whole = between(0, 1000)
    assert [row.id for row in whole] == [f"x.parquet:{n}" for n in range(1000)]
    assert whole[7].columns == {"n": 7, "text": "row 7", "kind": "b", "odd.name": [7]}
    for start, stop in [(0, 1), (99, 101), (100, 200), (150, 151), (250, 1000), (999, 1000), (5, 5)]:
        assert between(start, stop) == whole[start:stop]
    assert between(100, 400, skip_until=333) == whole[333:400]
    assert [row.columns for row in between(5, 7, columns=["odd.name", "n"])] == [
        {"odd.name": [5], "n": 5},
        {"odd.name": [6], "n": 6},
    ]
    assert [row.columns for row in between(98, 102, columns=[])] == [{}] * 4
    assert [row.columns for row in between(5, 6, columns=["label", "n"])] == [{"label": None, "n": 5}]


def test_a_flipped_byte_in_parquet_stops_after_the_good_rows(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet")
    at = pq.read_metadata(path).row_group(5).column(1).data_page_offset
    data = bytearray(path.read_bytes())
    data[at + 100] ^= 1
    path.write_bytes(data)
    obj, format = one(path)
    good: list[int] = []
    with pytest.raises(InputError, match=r"x\.parquet: is damaged, or not parquet"):
        good.extend(row.columns["n"] for row in input.read_rows(obj, format, Range("rows", 0, 1000), columns=None))
    assert good == list(range(500))
    assert len(list(input.read_rows(obj, format, Range("rows", 600, 1000), columns=None))) == 400


@pytest.mark.parametrize("data", [b"", b"PAR1", b"not parquet at all" * 10])
def test_what_is_not_parquet_is_named(tmp_path: Path, data: bytes) -> None:
    [obj] = objects(write(tmp_path / "x.parquet", data))
    with pytest.raises(InputError, match=r"x\.parquet: is damaged, or not parquet"):
        input.split(obj, "parquet", rows_per_shard=10)


def test_a_value_that_python_cannot_hold_fails_where_it_is_read(tmp_path: Path) -> None:
    bad_text = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0"), pa.py_buffer(b"a\xff\xfeb")]
    )
    dates = pa.array([0, 0, 10**15], pa.int64()).cast(pa.timestamp("s"))
    pq.write_table(pa.table({"text": bad_text, "at": dates}), tmp_path / "x.parquet")
    found = rows(tmp_path / "x.parquet")
    assert [row.columns["text"] for row in (found[0], found[2])] == ["a", "b"]
    assert found[1].columns["at"] == found[0].columns["at"]
    for row, column, code in ((found[1], "text", "invalid_utf8"), (found[2], "at", "invalid_value")):
        with pytest.raises(RowError) as refused:
            row.columns[column]
        assert refused.value.code == code


def test_a_dataset_on_disk_is_recognised_and_read_by_ordinal(dataset: Path) -> None:
    for format in (InputFormat.auto, InputFormat.dataset):
        listed = objects(dataset, format=format)
        assert [each.name for each in listed] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    whole = []
    for obj in listed:
        ranges = input.split(obj, "dataset", rows_per_shard=400)
        assert all(each.stop - each.start <= 800 for each in ranges)
        part = [row for each in ranges for row in input.read_rows(obj, "dataset", each, columns=["text", "n"])]
        assert [row.id for row in part] == [f"{obj.name}:{n}" for n in range(1250)]
        across = Range("rows", 990, 1010)
        assert list(input.read_rows(obj, "dataset", across, columns=None, skip_until=995)) == part[995:1010]
        whole += part
    assert [row.columns for row in whole] == [{"text": f"row {n}", "n": n} for n in range(2500)]
    (row,) = input.read_rows(obj, "dataset", Range("rows", 0, 1), columns=["label"])
    assert row.columns == {"label": None}
    assert schema_of(dataset) == {"n": pa.int64(), "text": pa.string()}


@pytest.mark.parametrize("state", [b"", b"{", b"[]", b'{"_data_files": [{}]}', b"\xff"])
def test_a_dataset_that_does_not_say_what_it_has_is_named(dataset: Path, state: bytes) -> None:
    (dataset / "state.json").write_bytes(state)
    with pytest.raises(InputError, match=r"state\.json: doesn't say which files"):
        objects(dataset)


def test_the_splits_of_a_saved_dictionary_are_read(tmp_path: Path) -> None:
    import datasets

    parts = {name: datasets.Dataset.from_dict({"n": [1, 2]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    names = [each.name for each in objects(tmp_path / "saved")]
    assert names == ["test/data-00000-of-00001.arrow", "train/data-00000-of-00001.arrow"]


def test_a_dataset_file_that_is_cut_short_is_named(dataset: Path) -> None:
    path = dataset / "data-00000-of-00002.arrow"
    path.write_bytes(path.read_bytes()[:-5000])
    obj = objects(dataset)[0]
    with pytest.raises(InputError, match=r"data-00000-of-00002\.arrow: is "):
        list(input.read_rows(obj, "dataset", Range("rows", 0, 1250), columns=None))
