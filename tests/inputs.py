"""Input files that tests make, and how they read them."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from backports import zstd

from batchq import input, storage
from batchq.config import InputConfig, InputFormat
from batchq.errors import InputError
from batchq.records import InputObject, Row


def objects(path: Path | str, **config: Any) -> list[InputObject]:
    """The objects of a path, CSV files with their dialects. Raises InputError for one that can't be read so far."""
    made = InputConfig(path=str(path), **config)
    listed = input.list_input(made).objects
    found, refused = input.with_dialects(listed, input.format_of(listed[0].name, made.format), made.csv)
    for why in refused.values():
        raise InputError(why)
    return found


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


def place(root: str, name: str, data: bytes) -> None:
    """Write a file below a local folder or a prefix."""
    if storage.is_remote(root):
        storage.put(storage.join(root, name), data)
    else:
        write(Path(root) / name, data)


def compressed(data: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(data)
    if ending == ".bz2":
        return bz2.compress(data)
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})  # as its command does


def schema_of(path: Path | str, columns: list[str] | None = None, **config: Any) -> dict[str, pa.DataType]:
    listed = objects(path, **config)
    format = input.format_of(listed[0].name, config.get("format", InputFormat.auto))
    return {field.name: field.type for field in input.infer_schema(listed, format, columns)}


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


def save_dataset(tmp_path: Path) -> Path:
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
