"""Input in an object store reads as it does from a disk."""

from __future__ import annotations

import gzip
import random
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchq import input, storage
from batchq.errors import Changed
from batchq.records import Range
from tests.inputs import objects, one, parquet, rows, save_dataset, schema_of, write

if TYPE_CHECKING:
    from tests.s3 import S3


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return save_dataset(tmp_path)


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
