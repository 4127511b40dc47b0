"""read: real files in, each row exactly once out, whatever the format, the cut or the damage."""

from __future__ import annotations

import gzip
import json
import math
import random
import uuid
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchq import input, storage
from batchq.config import InputConfig, InputFormat
from batchq.errors import Changed, InputError
from batchq.records import InputObject, Range, Row
from tests.helpers import compressed

if TYPE_CHECKING:
    from tests.s3 import S3


def objects(path: Path | str, **config: Any) -> list[InputObject]:
    return input.list_input(InputConfig(path=str(path), **config))


def one(path: Path | str, **config: Any) -> tuple[InputObject, str]:
    [obj] = objects(path, **config)
    return obj, input.format_of(obj.name, config.get("format", InputFormat.auto))


def rows(path: Path | str, columns: list[str] | None = None, skip_until: int = 0, **config: Any) -> list[Row]:
    """All rows of one file, over the ranges that `split` cuts it into."""
    obj, format = one(path, **config)
    return [
        row
        for each in input.split(obj, format, rows_per_shard=1000)
        for row in input.read_rows(obj, format, each, columns=columns, skip_until=skip_until)
    ]


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def schema_of(path: Path | str, columns: list[str] | None = None, **config: Any) -> dict[str, pa.DataType]:
    listed = objects(path, **config)
    format = input.format_of(listed[0].name, config.get("format", InputFormat.auto))
    return {field.name: field.type for field in input.infer_schema(listed, format, columns)}


# ---- what there is ----


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


# ---- cutting it up ----

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
    first = [(0, Range("bytes", 0, 80)), (0, Range("bytes", 80, 160)), (1, Range("stream"))]
    quarters = [(2, Range("rows", at, at + 20)) for at in range(0, 80, 20)]
    assert input.taper([*first, (2, Range("rows", 0, 80))], 2) == [*first, *quarters]
    one_row = [(0, Range("rows", 0, 1))]
    assert input.taper(one_row, 4) == one_row
    assert input.taper([], 4) == []


@pytest.mark.parametrize("kind", ["jsonl.gz", "csv"])
def test_a_stream_ends_before_its_range_does(tmp_path: Path, kind: str) -> None:
    lines = "".join(f'{{"n": {n}}}\n' for n in range(9)) if kind == "jsonl.gz" else "n\n" + "1\n" * 9
    obj, format = one(write(tmp_path / f"x.{kind}", gzip.compress(lines.encode()) if "gz" in kind else lines))
    assert [row.position for row in input.read_rows(obj, format, Range("stream", 0, 4), columns=None)] == [0, 1, 2, 3]
    rest = input.read_rows(obj, format, Range("stream", 0, 4), columns=None, skip_until=3)
    assert [row.position for row in rest] == [3]


def test_a_range_is_stored_as_it_was_before_there_were_ranges() -> None:
    for cut in (("stream", 0, 0), ("stream", 0, 33), ("bytes", 0, 80), ("rows", 5, 10)):
        assert Range.from_json(*cut).to_json() == [*cut]
    assert Range.from_json("stream", 0, 0) == Range("stream")


# ---- JSONL and text ----


def test_each_broken_line_is_a_row_with_a_code_and_its_neighbours_are_read(tmp_path: Path) -> None:
    lines = {
        b'{"a": "good"}': None,
        b'{"a": ': "invalid_json",
        b'{"a": "tab\there"}': "invalid_json",
        b"[1, 2]": "not_an_object",
        b"null": "not_an_object",
        b'{"a": "\xff\xfe"}': "invalid_utf8",
        b'{"a": "\\ud800"}': "invalid_unicode",
        b'{"\\uDEAD": 1}': "invalid_unicode",
        b'{"a": "\\ud83d\\ude00 \\u0000 \x7f"}': None,
        b'{"a": ' + b"[" * 100_000 + b"}": "invalid_json",
        b'{"a": ' + b"9" * 5000 + b"}": "invalid_json",
        b'{"a": NaN, "b": -Infinity, "c": 1e400}': None,
    }
    found = rows(write(tmp_path / "x.jsonl", b"\n".join(lines)))
    assert [row.error and row.error[0] for row in found] == list(lines.values())
    assert [row.raw for row in found] == [
        None if code is None else line.decode(errors="replace") for line, code in lines.items()
    ]
    assert found[8].columns == {"a": "\U0001f600 \0 \x7f"}
    last = found[-1].columns
    assert math.isnan(last["a"]) and last["b"] == -math.inf and last["c"] == math.inf
    assert all("good" not in row.error[1] and "tab" not in row.error[1] for row in found if row.error)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.csv"])
def test_a_line_that_is_too_long_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("batchq.input.broken.MAX_LINE", 1000)
    monkeypatch.setattr("batchq.input.lines.BLOCK", 300)
    lines = ["a"] if "csv" in name else []
    lines += [f'{{"a": "{"x" * length}"}}' for length in (10, 991, 992, 5000, 10, 5000)]
    data = "\n".join(line.replace('"', "") if "csv" in name else line for line in lines).encode()
    found = rows(write(tmp_path / name, compressed(data, ".gz") if "gz" in name else data))
    long = ("line_too_long", "longer than 64 MiB")
    if "csv" in name:
        assert [row.error for row in found] == [None, None, None, long, None, long]
    else:
        assert [row.error for row in found] == [None, None, long, long, None, long]
    assert all(row.raw is None or len(row.raw) <= 1000 for row in found)


def test_columns_are_picked_and_absent_ones_are_null(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '{"a": 1, "b": 2}\n{"b": 3}\n')
    assert [row.columns for row in rows(path, columns=["b", "a"])] == [{"b": 2, "a": 1}, {"b": 3, "a": None}]


def test_text_keeps_its_lines(tmp_path: Path) -> None:
    found = rows(write(tmp_path / "x.txt", b" one \n\n\xfftwo\n\0three\r\n"))
    assert [(row.id, row.columns) for row in found if not row.error] == [
        ("x.txt@0", {"text": " one "}),
        ("x.txt@12", {"text": "\0three"}),
    ]
    assert found[1].error == ("invalid_utf8", "not valid UTF-8") and found[1].raw == "\ufffdtwo"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path / "x.txt", ("\ufeff" + "hello\n").encode(encoding))
    with pytest.raises(InputError, match=r"x\.txt: is in UTF-16"):
        rows(path)


def test_a_json_array_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.json: is one JSON array"):
        rows(write(tmp_path / "x.json", b'\xef\xbb\xbf\n[{"a": 1}]'))


# ---- compression ----


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2"])
def test_compressed_text_streams(tmp_path: Path, ending: str) -> None:
    lines = [f'{{"n": {n}}}' for n in range(1000)]
    lines[500:500] = ["", "  "]
    half = "\n".join(lines[:600]).encode() + b"\n"
    rest = "\n".join(lines[600:]).encode()
    path = write(tmp_path / f"x.jsonl{ending}", compressed(half, ending) + compressed(rest, ending))  # two members
    found = rows(path)
    assert [row.columns["n"] for row in found] == list(range(1000))
    assert [row.id for row in found] == [f"x.jsonl{ending}:{n}" for n in range(1000)]
    assert rows(path, skip_until=600) == found[600:]


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_a_damaged_archive_gives_its_good_rows_then_names_itself(tmp_path: Path, ending: str, damage: str) -> None:
    text = random.Random(0)
    data = "".join(f'{{"n": {n}, "x": "{text.randbytes(50).hex()}"}}\n' for n in range(50_000)).encode()
    packed = bytearray(compressed(data, ending))
    if damage == "cut":
        del packed[-len(packed) // 4 :]
    elif damage == "flipped":
        packed[len(packed) // 2] ^= 0x10
    else:
        packed = bytearray(data)
    obj, format = one(write(tmp_path / f"x.jsonl{ending}", bytes(packed)))
    good: list[int] = []
    with pytest.raises(InputError, match=rf"x\.jsonl{ending}: is (cut short|damaged)") as refused:
        good.extend(row.columns["n"] for row in input.read_rows(obj, format, Range("stream"), columns=None))
    assert "\n" not in str(refused.value)
    assert good == list(range(len(good)))
    if damage == "cut":
        assert len(good) > 10_000


# ---- CSV ----


def test_csv_fields_stay_strings_and_quoted_newlines_stay_inside(tmp_path: Path) -> None:
    data = '\ufeffid,text,n\r\n1,"two\r\nlines, and ""quotes""",007\r\n\r\n  \n2,é\0,\n'
    found = rows(write(tmp_path / "x.csv", data))
    assert [row.columns for row in found] == [
        {"id": "1", "text": 'two\r\nlines, and "quotes"', "n": "007"},
        {"id": "2", "text": "é\0", "n": ""},
    ]
    assert [row.id for row in found] == ["x.csv:0", "x.csv:1"]
    assert [row.columns for row in rows(tmp_path / "x.csv", columns=["n", "id"])] == [
        {"n": "007", "id": "1"},
        {"n": "", "id": "2"},
    ]
    assert rows(tmp_path / "x.csv", skip_until=1) == found[1:]
    tabs = write(tmp_path / "x.tsv.gz", gzip.compress(b"a\tb\n1,5\t2\n"))
    assert rows(tabs)[0].columns == {"a": "1,5", "b": "2"}


def test_each_broken_csv_record_is_a_row_with_a_code(tmp_path: Path) -> None:
    data = b'a,b\n1\n1,2,3\n1,\xff\n1,"x\n\xff"\n3,4\n\n5,"open\n6,7\n'
    found = rows(write(tmp_path / "x.csv", data))
    assert [row.error and row.error[0] for row in found] == [
        "csv_columns",
        "csv_columns",
        "invalid_utf8",
        "invalid_utf8",
        None,
        "invalid_csv",
    ]
    assert found[0].error == ("csv_columns", "1 fields, but the header has 2")
    assert [row.raw for row in found] == ["1", "1,2,3", "1,\ufffd", '1,"x\n\ufffd"', None, '5,"open\n6,7']
    assert found[4].columns == {"a": "3", "b": "4"}


def test_a_long_document_fits_in_a_csv_field(tmp_path: Path) -> None:
    assert len(rows(write(tmp_path / "x.csv", f"a,b\n1,{'x' * 1_000_000}\n"))[0].columns["b"]) == 1_000_000


def test_a_csv_header_must_name_each_column_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names the column a more than once"):
        rows(write(tmp_path / "x.csv", "a,b,a\n1,2,3\n"))
    with pytest.raises(InputError, match=r"x\.csv: no column c in the input; there are a, b"):
        rows(write(tmp_path / "x.csv", "a,b\n1,2\n"), columns=["c"])


# ---- Parquet and datasets ----


def parquet(path: Path, count: int = 1000, group: int = 100) -> Path:
    table = pa.table(
        {
            "n": range(count),
            "text": [f"row {n}" for n in range(count)],
            "kind": pa.array(["a", "b"] * (count // 2)).dictionary_encode(),
            "odd.name": [[n] for n in range(count)],
        }
    )
    pq.write_table(table, path, row_group_size=group, write_page_checksum=True, data_page_size=1024)
    return path


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
    with pytest.raises(InputError, match=r"x\.parquet: no column label in the input; there are n, text"):
        between(0, 10, columns=["label"])


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


def test_a_value_that_python_cannot_hold_fails_its_own_row(tmp_path: Path) -> None:
    bad_text = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0"), pa.py_buffer(b"a\xff\xfeb")]
    )
    dates = pa.array([0, 0, 10**15], pa.int64()).cast(pa.timestamp("s"))
    pq.write_table(pa.table({"text": bad_text, "at": dates}), tmp_path / "x.parquet")
    found = rows(tmp_path / "x.parquet")
    assert [row.error and row.error[0] for row in found] == [None, "invalid_utf8", "invalid_value"]
    assert found[0].columns["text"] == "a"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset saved twice, in three files and then in two, with a cache that a `map` left."""
    import datasets

    made = datasets.Dataset.from_dict({"n": list(range(2500)), "text": [f"row {n}" for n in range(2500)]})
    made.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    stale = (tmp_path / "saved/data-00002-of-00003.arrow").read_bytes()
    for old in (tmp_path / "saved").glob("*.arrow"):
        old.unlink()
    made.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    write(tmp_path / "saved/data-00002-of-00003.arrow", stale)
    write(tmp_path / "saved/cache-0123456789abcdef.arrow", stale)
    return tmp_path / "saved"


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
    with pytest.raises(InputError, match="no column label"):
        list(input.read_rows(obj, "dataset", Range("rows", 0, 10), columns=["label"]))
    assert schema_of(dataset) == {"n": pa.int64(), "text": pa.string()}


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


# ---- S3 ----


def test_everything_reads_the_same_from_s3(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Path
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    root = f"{s3.make_bucket('read')}/{uuid.uuid4().hex}"
    lines = "".join(f'{{"n": {n}, "text": "{n * "x"}"}}\n' for n in range(1500)).encode()
    write(tmp_path / "in/jsonl/x.jsonl", lines)
    write(tmp_path / "in/gz/x.jsonl.gz", gzip.compress(lines))
    write(tmp_path / "in/csv/x.csv", "n,text\n" + "".join(f'{n},"{n}\n"\n' for n in range(1000)))
    (tmp_path / "in/parquet").mkdir()
    parquet(tmp_path / "in/parquet/x.parquet")
    storage.publish_tree(tmp_path / "in", root)
    for kind in ("jsonl", "gz", "csv", "parquet"):
        local = rows(tmp_path / "in" / kind)
        assert rows(f"{root}/{kind}/*") == local and len(local) >= 1000
        assert schema_of(f"{root}/{kind}") == schema_of(tmp_path / "in" / kind)
    storage.publish_tree(dataset, root + "/saved")
    [first, second] = objects(root + "/saved")
    assert input.split(first, "dataset", rows_per_shard=10) == [Range("stream")]
    found = list(input.read_rows(second, "dataset", Range("stream"), columns=None, skip_until=1000))
    assert found == list(input.read_rows(objects(dataset)[1], "dataset", Range("rows", 1000, 1250), columns=None))


@pytest.mark.parametrize("kind", ["x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_an_input_that_was_replaced_is_changed_not_damaged(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Also when it happens under a decoder: the store's word must come through gzip and Arrow."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    uri = f"{s3.make_bucket('read')}/{uuid.uuid4().hex}/{kind}"
    text = random.Random(0)
    values = [text.randbytes(200).hex() for _ in range(50_000)]
    data = "".join(f'{{"text": "{each}"}}\n' for each in values).encode()
    if kind == "x.parquet":
        pq.write_table(pa.table({"text": values}), tmp_path / kind, row_group_size=1000)
        data = (tmp_path / kind).read_bytes()
    storage.put(uri, gzip.compress(data, 1) if kind.endswith("gz") else data)
    obj, format = one(uri)
    [whole] = input.split(obj, format, rows_per_shard=10**9)
    reading = input.read_rows(obj, format, whole, columns=None)
    assert next(reading).position == 0
    storage.put(uri, b"another object")
    with pytest.raises(Changed, match="was replaced"):
        list(reading)
    with pytest.raises(Changed, match="was replaced"):
        list(input.read_rows(obj, format, whole, columns=None))


# ---- schema ----


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
