"""Input objects cut into ranges: each row exactly once, wherever the cut."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchq import input
from batchq.config import InputFormat
from batchq.records import Range, Row
from tests.inputs import one, write

AWKWARD = b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r\n\n  \n{"a": 22}\n\r\n{"a": "x\\ny"}\n\n{"a": 4}'


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n\n"])
@pytest.mark.parametrize("block", [3, 7, 1 << 20])
@pytest.mark.parametrize("format", [InputFormat.jsonl, InputFormat.text])
def test_a_cut_at_any_offset_gives_each_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: bytes, block: int, format: InputFormat
) -> None:
    monkeypatch.setattr("batchq.input.lines.BLOCK", block)
    monkeypatch.setattr("batchq.input.lines.TAIL", min(block, 5))
    obj, _ = one(write(tmp_path / "x", AWKWARD + ending), format=format)

    def between(start: int, stop: int) -> list[Row]:
        return list(input.read_rows(obj, format.value, Range("bytes", start, stop), columns=None))

    whole = between(0, obj.size)
    expected = [b'{"a": "\xc3\xa9"}', b'{"a": 22}', b'{"a": "x\\ny"}', b'{"a": 4}']
    if format is InputFormat.text:
        assert [row.columns["text"].encode() for row in whole] == expected
    else:
        assert [row.columns for row in whole] == [json.loads(each) for each in expected]
    data = AWKWARD + ending
    assert [row.position for row in whole] == [0, *(data.index(each) for each in expected[1:])]
    assert [row.id for row in whole] == [f"x@{row.position}" for row in whole]
    for cut in range(obj.size + 1):
        assert between(0, cut) + between(cut, obj.size) == whole
        assert [row for row in whole if row.position >= cut] == list(
            input.read_rows(obj, format.value, Range("bytes", 0, obj.size), columns=None, skip_until=cut)
        )
    assert [row for at in range(obj.size) for row in between(at, at + 1)] == whole


def test_split_estimates_rows_from_a_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", "".join(f'{{"n": {n:06d}, "text": "{"x" * 480}"}}\n' for n in range(5000)))
    obj, format = one(path)
    ranges = input.split(obj, format, rows_per_shard=500)
    assert len(ranges) == 10 and (ranges[0].unit, ranges[0].start, ranges[-1].stop) == ("bytes", 0, obj.size)
    assert all(a.stop == b.start for a, b in pairwise(ranges))
    counts = [len(list(input.read_rows(obj, format, each, columns=[]))) for each in ranges]
    assert sum(counts) == 5000 and max(counts) <= 502 and min(counts) >= 498
    assert input.split(obj, format, rows_per_shard=10**6) == [Range("bytes", 0, obj.size)]


@pytest.mark.parametrize(
    ("groups", "wanted", "expected"),
    [
        ([100] * 10, 300, [300, 300, 300, 100]),
        ([100] * 3, 1000, [300]),
        ([100, 1000, 100], 250, [100, 250, 250, 250, 250, 100]),
        ([150, 150, 150], 100, [150, 150, 150]),
        ([10, 140, 10], 100, [150, 10]),
        ([90, 90], 100, [90, 90]),
        ([], 100, []),
    ],
)
def test_row_groups_stay_whole_unless_they_are_too_large(
    tmp_path: Path, groups: list[int], wanted: int, expected: list[int]
) -> None:
    schema = pa.schema([("n", pa.int64())])
    with pq.ParquetWriter(tmp_path / "x.parquet", schema) as writer:
        for count in groups:
            writer.write_table(pa.table({"n": range(count)}, schema=schema))
    obj, format = one(tmp_path / "x.parquet")
    ranges = input.split(obj, format, rows_per_shard=wanted)
    assert [each.stop - each.start for each in ranges] == expected
    assert [n for each in ranges for n in range(each.start, each.stop)] == list(range(sum(groups)))


def test_the_last_ranges_get_smaller() -> None:
    first = [[(0, Range("bytes", 0, 80))], [(0, Range("bytes", 80, 160))], [(1, Range("stream"))]]
    quarters = [[(2, Range("rows", at, at + 20))] for at in range(0, 80, 20)]
    assert input.taper([*first, [(2, Range("rows", 0, 80))]], 2) == [*first, *quarters]
    one_row = [[(0, Range("rows", 0, 1))]]
    assert input.taper(one_row, 4) == one_row
    several = [[(n, Range("stream")) for n in range(5)]]
    assert [[n for n, _ in group] for group in input.taper(several, 2)] == [[0], [1], [2], [3, 4]]
    assert input.taper([], 4) == []


@pytest.mark.parametrize("kind", ["jsonl.gz", "csv"])
def test_a_stream_ends_before_its_range_does(tmp_path: Path, kind: str) -> None:
    lines = "".join(f'{{"n": {n}}}\n' for n in range(9)) if kind == "jsonl.gz" else "n\n" + "1\n" * 9
    obj, format = one(write(tmp_path / f"x.{kind}", gzip.compress(lines.encode()) if "gz" in kind else lines))
    assert [row.position for row in input.read_rows(obj, format, Range("stream", 0, 4), columns=None)] == [0, 1, 2, 3]
    rest = input.read_rows(obj, format, Range("stream", 0, 4), columns=None, skip_until=3)
    assert [row.position for row in rest] == [3]


def test_a_range_is_stored_as_it_was_before_there_were_ranges() -> None:
    for unit, start, stop in (("stream", 0, 0), ("stream", 0, 33), ("bytes", 0, 80), ("rows", 5, 10)):
        assert Range.from_json(unit, start, stop).to_json() == [unit, start, stop]
    assert Range.from_json("stream", 0, 0) == Range("stream")
