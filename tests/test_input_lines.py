"""JSONL and text, compressed or not: each row exactly once out, whatever the damage."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from batchq import input
from batchq.errors import InputError
from batchq.records import Range
from tests.inputs import compressed, one, rows, write


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
    long = ("line_too_long", "longer than 32 MiB")
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
