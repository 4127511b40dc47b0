"""storage: the same behaviour on local files and on a real S3 server; creates under races, kills and lost replies."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchq import storage
from batchq.errors import AlreadyExists, Changed, ConfigError, NoConditionalWrites, NotFound, StorageError
from batchq.storage.remote import MIN_RANGE
from tests.s3 import flaky

if TYPE_CHECKING:
    from tests.s3 import S3


def names(found: Iterable[storage.Stat], root: str) -> list[str]:
    return [each.uri[len(storage.normalize(root)) + 1 :] for each in found]


# ---- folders and times ----


def test_folders_directly_below_and_when_an_object_was_written(root: str) -> None:
    before = time.time()
    for name in ("b/x", "a/y/z", "a=1/w", "file"):
        storage.put(f"{root}/{name}", b"1")
    assert storage.folders(root) == ["a", "a=1", "b"]
    assert storage.folders(f"{root}/a") == ["y"]
    assert storage.folders(f"{root}/nothing") == storage.folders(f"{root}/b") == []
    assert before - 2 < storage.written_at(f"{root}/file") < time.time() + 2, "a store's times are whole seconds"
    with pytest.raises(NotFound):
        storage.written_at(f"{root}/a")


# ---- names ----


def test_a_local_uri_becomes_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.normalize("a/../b/") == str(tmp_path / "b")
    assert storage.normalize("~/b") == "/home/someone/b"
    assert storage.normalize("file:///x/with%20space") == "/x/with space"
    assert storage.normalize("s3://bucket/a/") == "s3://bucket/a"
    assert storage.normalize("gs://bucket/") == "gs://bucket"
    assert storage.join("s3://bucket/", "a/", "/b") == "s3://bucket/a/b"
    assert storage.is_remote("az://box/x") and not storage.is_remote("file:///x") and not storage.is_remote("x")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:hunter2@bucket/x",
        "https://u:hunter2@host/x",
        "s3:///x",
        "hdfs://h/x",
        "az://box/x.csv?sv=2024&sig=hunter2",
        "s3://bucket/x.csv?X-Amz-Credential=a&X-Amz-Signature=hunter2",
    ],
)
def test_a_uri_that_is_none_is_refused_without_showing_its_secret(uri: str) -> None:
    with pytest.raises(ConfigError) as refused:
        storage.normalize(uri)
    assert "hunter2" not in str(refused.value) and "\n" not in str(refused.value)


# ---- list, look, read ----


def test_list_sorts_everything_below_and_a_missing_prefix_has_nothing(root: str) -> None:
    for name in ["b", "a/z", "a/_y", "a-b", "é ü%41#?.txt"]:
        storage.create(storage.join(root, name), name.encode())
    listed = list(storage.list_objects(root))
    assert names(listed, root) == ["a-b", "a/_y", "a/z", "b", "é ü%41#?.txt"]
    assert [each.size for each in listed] == [len(name.encode()) for name in names(listed, root)]
    assert all(storage.stat(each.uri) == each for each in listed)
    assert storage.read(listed[-1].uri) == "é ü%41#?.txt".encode()
    assert names(list(storage.list_objects(root + "/a")), root) == ["a/_y", "a/z"]
    assert list(storage.list_objects(root + "/none")) == []


def test_glob_takes_a_name_a_folder_or_a_pattern(root: str) -> None:
    for name in [
        "a.jsonl",
        "b.csv",
        "_SUCCESS",
        ".hidden",
        "odd[1].jsonl",
        "2024/01/x.jsonl",
        "2024/02/y.jsonl",
        "2024/_temporary/t.jsonl",
        "2025/z.jsonl",
    ]:
        storage.create(storage.join(root, name), b"1")

    def glob(pattern: str) -> list[str]:
        return names(storage.glob(storage.join(root, pattern)).found, root)

    assert glob("a.jsonl") == ["a.jsonl"]
    assert glob("odd[1].jsonl") == ["odd[1].jsonl"]
    assert glob("_SUCCESS") == ["_SUCCESS"]
    assert names(storage.glob(root + "/").found, root) == sorted(
        ["a.jsonl", "b.csv", "odd[1].jsonl", "2024/01/x.jsonl", "2024/02/y.jsonl", "2025/z.jsonl"]
    )
    assert glob("*.jsonl") == ["a.jsonl", "odd[1].jsonl"]
    assert glob("?.csv") == ["b.csv"]
    assert glob("[!b]*l") == ["a.jsonl", "odd[1].jsonl"]
    assert glob("202[45]/*") == ["2024/01/x.jsonl", "2024/02/y.jsonl", "2025/z.jsonl"]
    assert glob("**/*.jsonl") == ["2024/01/x.jsonl", "2024/02/y.jsonl", "2025/z.jsonl", "a.jsonl", "odd[1].jsonl"]
    assert glob("2024/**") == ["2024/01/x.jsonl", "2024/02/y.jsonl"]
    assert glob("*/_temporary/*") == ["2024/_temporary/t.jsonl"]
    assert glob("*.parquet") == []
    for absent in ["a", "a.json", "2024/0"]:
        with pytest.raises(NotFound):
            glob(absent)


def test_names_are_relative_to_what_was_asked_for(root: str) -> None:
    for name in ["in/a/x.txt", "in/a/y.txt"]:
        storage.create(storage.join(root, name), b"1")

    def base(pattern: str) -> str:
        return storage.glob(storage.join(root, pattern)).root[len(root) :]

    assert base("in") == "/in"
    assert base("in/a/x.txt") == "/in/a"
    assert base("in/*/x.txt") == "/in"
    assert base("in/a/x*") == "/in/a"


def test_read_takes_ranges_and_suffixes(root: str) -> None:
    uri = root + "/x"
    found = storage.create(uri, b"0123456789")
    assert found == storage.stat(uri) and found.size == 10
    assert storage.read(uri) == b"0123456789"
    assert storage.read(uri, 2, 3) == b"234"
    assert storage.read(uri, 8, 30) == b"89"
    assert storage.read(uri, 7) == b"789"
    assert storage.read(uri, 3, 0) == b""
    assert storage.read(uri, suffix=4, etag=found.etag) == b"6789"
    assert storage.read(uri, suffix=40) == b"0123456789"
    assert storage.exists(uri) and not storage.exists(root)
    for act in (storage.read, storage.stat, storage.open_read):
        with pytest.raises(NotFound, match="none"):
            act(root + "/none")


def test_a_replaced_object_is_not_read_as_the_planned_one(root: str) -> None:
    uri = root + "/x"
    old = storage.create(uri, b"planned")
    new = storage.put(uri, b"replaced!")
    assert old.etag != new.etag and storage.read(uri, etag=new.etag) == b"replaced!"
    for act in (storage.read, storage.open_read):
        with pytest.raises(Changed, match="/x: was replaced"):
            act(uri, etag=old.etag)


def test_an_object_replaced_while_it_is_read_is_noticed(remote: str) -> None:
    uri = remote + "/x"
    planned = storage.create(uri, bytes(MIN_RANGE * 8))
    with storage.open_read(uri, etag=planned.etag) as file:
        file.read(10)
        storage.put(uri, b"1" * MIN_RANGE * 8)
        with pytest.raises(Changed):
            file.read()


def test_a_large_object_streams_and_seeks(root: str) -> None:
    data = random.Random(0).randbytes(50_000_000)
    uri = root + "/big"
    found = storage.create(uri, data)
    with storage.open_read(uri, etag=found.etag) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        assert digest.hexdigest() == hashlib.sha256(data).hexdigest()
        for start, length in [(0, 10), (49_999_990, 100), (3, 20_000_000), (25_000_000, 1)]:
            assert file.seek(start) == start
            assert file.read(length) == data[start : start + length]
        assert file.seek(-5, os.SEEK_END) == 49_999_995 and file.read() == data[-5:]


def test_pyarrow_reads_parquet_through_it(root: str) -> None:
    sink = pa.BufferOutputStream()
    table = pa.table({"n": range(100_000), "text": [f"row {n}" for n in range(100_000)]})
    pq.write_table(table, sink, row_group_size=10_000)
    storage.create(root + "/x.parquet", sink.getvalue())
    with storage.open_read(root + "/x.parquet") as file:
        parquet = pq.ParquetFile(file)
        assert parquet.read_row_group(7).equals(table.slice(70_000, 10_000))
        assert parquet.read().equals(table)


def test_a_broken_connection_is_taken_up_again(s3: S3, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(1).randbytes(3_000_000)
    found = storage.create(remote + "/x", data)
    with flaky(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.env["AWS_ENDPOINT_URL"])
        proxy.faults += ["pass", "cut", "lose", "cut", "pass", "cut"]
        with storage.open_read(found.uri, etag=found.etag) as file:
            assert file.read() == data
        assert not proxy.faults
        proxy.faults += ["cut", "cut"]
        assert storage.read(found.uri, etag=found.etag) == data


# ---- write ----


def test_create_takes_a_name_once(root: str) -> None:
    uri = root + "/a/b/x"
    for data in (b"first", memoryview(b"first"), pa.py_buffer(b"first")):
        storage.delete(uri)
        storage.create(uri, data)
        assert storage.read(uri) == b"first"
    with pytest.raises(AlreadyExists, match="/x: already exists"):
        storage.create(uri, b"second")
    assert storage.read(uri) == b"first"
    storage.require_create_only(uri, b"first")
    assert storage.create(root + "/empty", b"").size == 0 and storage.read(root + "/empty") == b""


def test_a_store_that_lets_the_last_writer_win_is_refused(s3: S3, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.create(remote + "/x", b"1")
    with flaky(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.env["AWS_ENDPOINT_URL"])
        proxy.faults += ["accept"]
        with pytest.raises(NoConditionalWrites, match="/x: this store lets"):
            storage.require_create_only(remote + "/x", b"1")
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    with pytest.raises(NoConditionalWrites):
        storage.create(remote + "/y", b"1")


def test_a_connection_that_is_reset_is_asked_again(s3: S3, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with flaky(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.env["AWS_ENDPOINT_URL"])
        proxy.faults += ["reset", "reset"]
        storage.create(remote + "/x", b"1")
        proxy.faults += ["lose"]
        with pytest.raises(AlreadyExists):  # it may be ours: whoever wrote it reads it back
            storage.create(remote + "/y", b"1")
        proxy.faults += ["lose"]
        storage.delete(remote + "/x")
        proxy.faults += ["pass", "reset"]
        storage.delete_prefix(remote + "/")
        assert not proxy.faults
        assert not list(storage.list_objects(remote))


def test_one_of_sixteen_racing_writers_wins(root: str) -> None:
    def write(writer: int) -> int | None:
        try:
            storage.create(root + "/data/x", b"%02d" % writer * 100_000)
        except AlreadyExists:
            return None
        return writer

    with ThreadPoolExecutor(16) as threads:
        winners = [writer for writer in threads.map(write, range(16)) if writer is not None]
    assert len(winners) == 1
    assert storage.read(root + "/data/x") == b"%02d" % winners[0] * 100_000
    assert names(list(storage.list_objects(root)), root) == ["data/x"]


def test_a_conflict_is_tried_again_and_a_lost_reply_says_exists(
    s3: S3, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with flaky(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.env["AWS_ENDPOINT_URL"])
        proxy.faults += ["conflict", "pass", "conflict"]  # a put, the look whether it is there, a put
        assert storage.create(remote + "/x", b"mine").size == 4
        assert storage.read(remote + "/x") == b"mine"
        proxy.faults += ["lose"]
        with pytest.raises(AlreadyExists):
            storage.create(remote + "/y", b"mine")
        assert storage.read(remote + "/y") == b"mine"  # so a writer reads back before it believes that it lost


KILLED = """
import os, signal, sys
from batchq import storage
step, nth, uri, staging = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
real, calls = getattr(os, step), 0
def deadly(*arguments, **options):
    global calls
    calls += 1
    if calls == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
setattr(os, step, deadly)
storage.create(uri, b"whole" * 100_000, staging=staging or None)
"""


@pytest.mark.parametrize("staging", ["meta/tmp", "data/.tmp"])
@pytest.mark.parametrize(
    ("step", "nth", "linked"), [("fsync", 1, 0), ("link", 1, 0), ("fsync", 2, 1), ("unlink", 1, 1)]
)
def test_a_killed_local_writer_leaves_nothing_stray(
    tmp_path: Path, step: str, nth: int, linked: bool, staging: str
) -> None:
    (tmp_path / staging).mkdir(parents=True)  # with the folders there, the first fsync is the file's
    (tmp_path / "data").mkdir(exist_ok=True)
    final = tmp_path / "data/part-00001.parquet"
    given = str(tmp_path / staging) if staging == "meta/tmp" else None  # without one it is beside the file, unlisted
    arguments = [step, str(nth), str(final), given or ""]
    command = [sys.executable, "-c", KILLED, *arguments]
    killed = subprocess.run(command, cwd=Path(__file__).parent.parent, check=False)
    assert killed.returncode == -9

    def there() -> list[str]:
        return names(list(storage.list_objects(str(tmp_path / "data"))), str(tmp_path / "data"))

    assert there() == ([final.name] if linked else [])
    try:
        storage.create(str(final), b"whole" * 100_000, given)
    except AlreadyExists:
        assert linked
    assert final.read_bytes() == b"whole" * 100_000
    assert there() == [final.name]
    assert {path.name for path in (tmp_path / "data").iterdir()} <= {final.name, ".tmp"}


def test_staged_files_are_never_listed_and_go_away(tmp_path: Path) -> None:
    storage.create(str(tmp_path / "meta/attempts/1"), b"1")
    storage.put(str(tmp_path / "meta/attempts/1"), b"2")
    assert names(list(storage.list_objects(str(tmp_path))), str(tmp_path)) == ["meta/attempts/1"]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["1"]


def test_put_replaces_and_delete_is_idempotent(root: str) -> None:
    for uri in (root + "/a/x", root + "/a/b/y", root + "/ab"):
        storage.put(uri, b"old")
        assert storage.put(uri, b"new!") == storage.stat(uri)
        assert storage.read(uri) == b"new!"
    storage.delete(root + "/ab")
    storage.delete(root + "/ab")
    storage.delete_prefix(root + "/a/b")
    storage.delete_prefix(root + "/none")
    assert names(list(storage.list_objects(root)), root) == ["a/x"]


def test_a_whole_store_is_not_deleted(remote: str) -> None:
    for everything in ("/", remote.rpartition("/")[0]):
        with pytest.raises(ConfigError):
            storage.delete_prefix(everything)


def test_a_folder_of_large_files_goes_up_and_comes_back(root: str, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "deep/er").mkdir(parents=True)
    (source / "model.safetensors").write_bytes(random.Random(2).randbytes(40_000_000))
    (source / "config.json").write_text("{}")
    (source / "deep/er/empty").touch()
    (source / "linked.json").symlink_to("config.json")
    storage.publish_tree(source, root + "/checkpoint")
    storage.publish_tree(source, root + "/checkpoint")
    storage.fetch_tree(root + "/checkpoint", copy)
    found = sorted(path.relative_to(copy) for path in copy.rglob("*") if path.is_file())
    assert found == sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    assert all((copy / name).read_bytes() == (source / name).read_bytes() for name in found)
    with pytest.raises(NotFound):
        storage.fetch_tree(root + "/none", copy)


# ---- links, errors ----


def test_local_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/x").write_text("1")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/linked").symlink_to(tmp_path / "real")
    (tmp_path / "real/loop").symlink_to(tmp_path / "root")
    assert names(storage.glob(str(tmp_path / "root")).found, str(tmp_path / "root")) == ["linked/x"]
    (tmp_path / "root/dangling").symlink_to(tmp_path / "none")
    with pytest.raises(StorageError, match="dangling: a link that leads nowhere"):
        list(storage.list_objects(str(tmp_path / "root")))


def test_errors_are_one_line_that_names_the_uri_and_no_secret(
    s3: S3, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFound, match="no-such-bucket"):
        list(storage.list_objects("s3://no-such-bucket/x"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-a-secret")
    with pytest.raises(StorageError, match="access denied") as refused:
        storage.read(remote + "/x")
    assert remote + "/x" in str(refused.value) and "\n" not in str(refused.value)
    assert "canary" not in str(refused.value) and "http" not in str(refused.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match="/x: the store can't be reached"):
        storage.read(remote + "/x")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", s3.env["AWS_ENDPOINT_URL"])  # a machine that has no role either
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="/x: no credentials"):
        storage.read(remote + "/x")


def test_a_name_that_stores_disagree_on_is_refused(remote: str) -> None:
    with pytest.raises(StorageError, match="not a name"):
        storage.create(remote + "/a//b", b"1")
