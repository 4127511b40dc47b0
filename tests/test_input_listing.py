"""What an input consists of, and what it is by its name."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from batchq import input, storage
from batchq.config import Config, InputConfig, InputFormat, Scheme, Unreadable
from batchq.errors import InputError
from batchq.input.listing import HIDDEN
from batchq.plan.draft import make_plan
from batchq.plan.inputs import check_inputs
from batchq.plan.stored import store_plan
from batchq.records import Range
from tests.inputs import objects, place, write
from tests.jobs import finished


def listed(path: Path | str, **config: Any) -> input.Inputs:
    return input.list_input(InputConfig(path=str(path), **config))


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


# ---- what is no data, and what can't be read ----

LINE = b'{"text": "all is well", "id": 1, "gold": "good"}\n'
LEFT_OUT = [
    *("_SUCCESS", "_started_123", "_committed_123", "_temporary/0/part-0.jsonl", "_metadata", ".part-0.jsonl.crc"),
    *("part-0.jsonl.tmp", "part-0.jsonl.inprogress.0b1c", "part-0.jsonl._COPYING_", "a.jsonl~", "deep_$folder$"),
    *(
        ".DS_Store",
        "._a.jsonl",
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        "Thumbs.db",
        "desktop.ini",
        "__MACOSX/a.jsonl",
    ),
    *(".git/config", "a.jsonl.crdownload", ".a.jsonl.swp", "lost+found/#12"),
]


@pytest.mark.parametrize("path", ["in", "in/**", "in/*", "in/**/*.jsonl"])
def test_files_of_other_tools_are_left_out_and_counted(root: str, path: str) -> None:
    for name in ["a.jsonl", "deep/b.jsonl", "_year=2024/c.jsonl", *LEFT_OUT]:
        place(root, f"in/{name}", LINE)
    found = listed(f"{root}/{path}")
    assert [each.name for each in found.objects] == ["_year=2024/c.jsonl", "a.jsonl", "deep/b.jsonl"]
    if "jsonl" not in path:
        assert found.left_out == {HIDDEN: len(LEFT_OUT)}
    assert not found.unreadable


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("in/*.tmp", ["b.jsonl.tmp"]),
        ("in/_*.jsonl", ["_a.jsonl"]),
        ("in/_temporary/*", ["c.jsonl"]),
        ("in/_a.jsonl", ["_a.jsonl"]),
        ("in/**/_temporary/*.jsonl", ["_temporary/c.jsonl"]),
    ],
)
def test_a_hidden_file_that_is_named_is_read(root: str, path: str, names: list[str]) -> None:
    for name in ["_a.jsonl", "b.jsonl.tmp", "_temporary/c.jsonl", "d.jsonl"]:
        place(root, f"in/{name}", LINE)
    assert [each.name for each in objects(f"{root}/{path}", format=InputFormat.jsonl)] == names


def test_nothing_but_hidden_files_says_so(root: str) -> None:
    place(root, "in/_a.jsonl", LINE)
    with pytest.raises(InputError, match=r"nothing there matches; left out: 1 hidden.*_a\.jsonl \(name one in full"):
        objects(f"{root}/in")


@pytest.mark.parametrize(
    "ending", [".jsonl", ".csv", ".txt", ".jsonl.gz", ".tsv.zst", ".txt.bz2", ".md", "", ".parquet", ".arrow"]
)
def test_files_of_no_bytes(root: str, ending: str) -> None:
    """Left out, whatever they are called; but an empty file can't be a Parquet file, so one of that name is damaged."""
    good = f"good{ending or '.jsonl'}".replace(".md", ".jsonl")
    place(root, f"in/{good}", b"not empty")
    place(root, f"in/empty{ending}", b"")
    found = listed(f"{root}/in")
    whole = ending in (".parquet", ".arrow")
    assert [each.name for each in found.objects] == ([f"empty{ending}"] if whole else []) + [good]
    assert found.left_out == ({} if whole else {"empty": 1})


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


@pytest.mark.parametrize("make", [fifo, endless, listening])
def test_pipes_devices_and_sockets_are_never_opened(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in/a.jsonl", LINE)
    make(tmp_path / "in/b.jsonl")
    found = listed(tmp_path / "in")
    assert [each.name for each in found.objects] == ["a.jsonl"] and list(found.left_out.values()) == [1]
    with pytest.raises(InputError, match=r"b\.jsonl: a pipe, a socket or a device"):
        objects(tmp_path / "in/b.jsonl")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything."""
    uid = os.geteuid()
    os.seteuid(65534 if uid == 0 else uid)
    try:
        yield
    finally:
        os.seteuid(uid)


def dangling(folder: bytes) -> None:
    os.symlink(b"nowhere", folder + b"/bad.jsonl")


def looping(folder: bytes) -> None:
    os.symlink(b"bad.jsonl", folder + b"/bad.jsonl")


def unreadable(folder: bytes) -> None:
    with open(folder + b"/bad.jsonl", "wb") as file:
        file.write(LINE)
        os.fchmod(file.fileno(), 0)


def closed(folder: bytes) -> None:
    os.mkdir(folder + b"/bad.jsonl", 0)


def latin1(folder: bytes) -> None:
    with open(folder + b"/caf\xe9.jsonl", "wb") as file:
        file.write(LINE)


BAD: dict[Callable[[bytes], None], str] = {
    dangling: "bad.jsonl: a link that leads nowhere",
    looping: "bad.jsonl: a link that leads back to itself",
    unreadable: "bad.jsonl: permission denied",
    closed: "bad.jsonl/: permission denied",
    latin1: r"caf\\udce9.jsonl: its name isn't UTF-8",
}


@pytest.mark.parametrize("make", BAD, ids=lambda each: each.__name__)
def test_what_cannot_be_read_is_named_or_quarantined(
    make: Callable[[bytes], None], compose: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named, and only where it is meant; its neighbours are labelled, the run ends in exit code 4, a resume agrees."""
    with TemporaryDirectory() as where:  # of which nobody is kept out, as of pytest's
        folder = Path(where)
        folder.chmod(0o777)
        write(folder / "in/a.jsonl", LINE)
        write(folder / "in/deep/b.jsonl", LINE)
        make(os.fsencode(folder / "in"))
        config = compose(f"input.path={folder}/in", "input.unreadable=quarantine", "output.max_error_rate=1")
        monkeypatch.chdir(folder)
        with as_nobody():
            assert [each.name for each in objects(folder / "in/deep")] == ["b.jsonl"]
            assert [each.name for each in objects(folder / "in/a*")] == ["a.jsonl"]
            with pytest.raises(InputError, match=BAD[make]) as refused:
                objects(folder / "in")
            assert "input.unreadable=quarantine" in str(refused.value) and "\n" not in str(refused.value)
            found = listed(folder / "in", unreadable=Unreadable.quarantine)
            assert [each.name for each in found.objects] == ["a.jsonl", "deep/b.jsonl"]
            assert len(found.unreadable) == 1
            fixed = make_plan(config, "model", Scheme.none, "model")
            assert fixed.unreadable == found.unreadable
            assert check_inputs(fixed, config) == []
        store_plan(fixed, storage.normalize(config.output.path))
        manifest, rows, code = finished(config, fixed)
        monkeypatch.undo()
    assert (len(rows), code) == (2, 4)
    assert [bad["name"] for bad in manifest["quarantined"]] == list(found.unreadable)


def test_a_folder_called_like_a_file_is_a_folder(root: str) -> None:
    for name in ["x.jsonl/part-0.jsonl", "x.jsonl/_SUCCESS", "y.jsonl"]:
        place(root, f"in/{name}", LINE)
    for path in ("in", "in/*.jsonl", "in/**/*.jsonl"):
        assert [each.name for each in objects(f"{root}/{path}")] == ["x.jsonl/part-0.jsonl", "y.jsonl"]


def test_long_names_and_odd_characters_are_read(root: str) -> None:
    long = f"{'n' * 240}.jsonl"
    names = sorted(
        ["trailing .jsonl", " leading.jsonl", "ta'b\"q.jsonl", "日本.jsonl", "%2F.jsonl", "a,b+c&d.jsonl", long]
    )
    for name in names:
        place(root, f"in/{name}", LINE)
    found = objects(f"{root}/in")
    assert [each.name for each in found] == names
    for each in found:
        [row] = input.read_rows(each, "jsonl", Range("bytes", 0, each.size), columns=None)
        assert row.columns["text"] == "all is well"
