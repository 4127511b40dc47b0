"""worker/index.py: where each key of a finished output lies, on disk."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from batchq import storage
from batchq.errors import StorageError
from batchq.output import layout, parts
from batchq.worker import index
from batchq.worker.index import Index, remove_unused

HOUR = 3600.0


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def key(number: int) -> str:
    return random.Random(number).randbytes(16).hex()


def write(output: Path, part: int, keys: list[str | None]) -> None:
    table = pa.table({"batchq_key": pa.array(keys, pa.string()), "label": pa.array([None] * len(keys), pa.string())})
    storage.put(f"{layout.data(str(output))}/part-{part:05d}.parquet", parts.serialize(table, {}))


def places(opened: Index, keys: list[str]) -> dict[str, tuple[int, int]]:
    """Part and row of each key that is known."""
    return {
        keys[hit]: (part, row)
        for part, hits, rows in opened.find(keys)
        for hit, row in zip(hits.tolist(), rows.tolist(), strict=True)
    }


def indexes(cache: Path) -> list[Path]:
    return [path for path in (cache / "reuse").glob("*/") if path.name != ".building"]


@pytest.mark.parametrize(("group", "narrow"), [(500_000, 1 << 32), (150, 1 << 32), (150, 0)])
def test_every_key_is_found_where_it_first_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int, narrow: int
) -> None:
    """Also if the keys are dealt out several times, and if there are more rows than four bytes count."""
    monkeypatch.setattr(index, "GROUP", group)
    monkeypatch.setattr(index, "NARROW", narrow)
    expected: dict[str, tuple[int, int]] = {}
    for part in range(7):
        keys: list[str | None] = [key(100 * part + i) for i in range(100)]
        keys[part] = None  # a failure
        keys[50] = key(50)  # a row that stands in every part
        write(tmp_path / "out", part, keys)
        for row, each in enumerate(keys):
            if each is not None:
                expected.setdefault(each, (part, row))
    opened = Index(str(tmp_path / "out"))
    assert len(opened) == len(expected) == 7 * 98 + 1
    asked = [*expected, *(key(10_000 + i) for i in range(500)), "00" * 16, "ff" * 16]
    random.Random(1).shuffle(asked)
    assert places(opened, asked) == expected
    assert places(opened, []) == {}


def test_a_key_that_differs_behind_its_first_half_is_not_found(tmp_path: Path) -> None:
    write(tmp_path / "out", 0, [key(0)])
    other = key(0)[:16] + key(1)[16:]
    assert places(Index(str(tmp_path / "out")), [other, key(0)]) == {key(0): (0, 0)}


def test_an_output_without_an_answer_has_no_keys(tmp_path: Path) -> None:
    write(tmp_path / "out", 0, [None, None])
    for output in ("out", "nothing"):
        opened = Index(str(tmp_path / output))
        assert len(opened) == 0 and places(opened, [key(0)]) == {}


def test_other_objects_have_another_index(tmp_path: Path, own_cache: Path) -> None:
    write(tmp_path / "out", 0, [key(0)])
    first = Index(str(tmp_path / "out"))
    write(tmp_path / "out", 1, [key(1)])
    assert set(places(Index(str(tmp_path / "out")), [key(0), key(1)])) == {key(0), key(1)}
    assert set(places(first, [key(0), key(1)])) == {key(0)}
    assert len(indexes(own_cache)) == 2


def test_a_damaged_part_leaves_no_index(tmp_path: Path, own_cache: Path) -> None:
    write(tmp_path / "out", 0, [key(0)])
    write(tmp_path / "out", 1, ["no key"])
    with pytest.raises(StorageError, match=r"part-00001\.parquet: damaged: its keys"):
        Index(str(tmp_path / "out"))
    (tmp_path / "out/data/part-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(StorageError, match=r"part-00001\.parquet: damaged"):
        Index(str(tmp_path / "out"))
    assert not indexes(own_cache)


def test_an_index_goes_once_nobody_has_it_open(tmp_path: Path, own_cache: Path) -> None:
    write(tmp_path / "out", 0, [key(0)])
    output = str(tmp_path / "out")
    opened = Index(output)
    (folder,) = indexes(own_cache)
    assert remove_unused(0) == 0 and folder.is_dir(), "it is open"
    del opened
    assert remove_unused(HOUR) == 0 and folder.is_dir(), "it was opened just now"
    assert remove_unused(0, str(tmp_path / "other")) == 0 and folder.is_dir()
    assert remove_unused(0, output) > 16 and not indexes(own_cache)
    assert not [path for path in (own_cache / "reuse/.building").iterdir() if path.is_dir()]
    assert places(Index(output), [key(0)]) == {key(0): (0, 0)}


def test_a_new_index_takes_away_those_that_are_old(tmp_path: Path, own_cache: Path) -> None:
    for name in ("monday", "tuesday"):
        write(tmp_path / name, 0, [key(0)])
        Index(str(tmp_path / name))
    for folder in indexes(own_cache):
        if folder.name.startswith(index._prefix(str(tmp_path / "monday"))):
            long_ago = time.time() - 24 * HOUR
            os.utime(folder / "lock", (long_ago, long_ago))
    write(tmp_path / "wednesday", 0, [key(0)])
    Index(str(tmp_path / "wednesday"))
    assert sorted(folder.name.split("-")[0] for folder in indexes(own_cache)) == sorted(
        index._prefix(str(tmp_path / name))[:-1] for name in ("tuesday", "wednesday")
    )


def test_processes_that_need_it_at_once_make_it_once(tmp_path: Path, own_cache: Path) -> None:
    write(tmp_path / "out", 0, [key(i) for i in range(1000)])
    code = f"from batchq.worker.index import Index; print(len(Index({str(tmp_path / 'out')!r})))"
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in running] == ["1000\n"] * 3
    assert len(indexes(own_cache)) == 1


def test_where_the_cache_can_only_be_read_it_is_among_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", 0, [key(0)])
    monkeypatch.setattr(index, "is_writable", lambda folder: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    assert len(Index(str(tmp_path / "out"))) == 1
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == [f"batchq-reuse-{os.getuid()}"]
