"""What an output holds, counted without any of the code that wrote it."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

PART = re.compile(r"(part-\d{5,}(-\d{4,})?|rows-\d{5,})\.parquet")
Answers = dict[str, tuple[Any, ...]]  # batchq_id -> key, label, probability, error


@dataclass(frozen=True)
class Count:
    lost: int
    repeated: int
    broken: int  # strays, rows nobody expected, answers that differ, objects with a page that fails its checksum
    answers: Answers


def count(output: str, expected: frozenset[str], env: Mapping[str, str], golden: Answers | None = None) -> Count:
    """Read every object that a reader is told to read, checksums verified. `golden`: what a run without a fault
    answered."""
    broken, tables = 0, []
    for name, data in objects(f"{output}/{folder(output, env)}", env).items():
        broken += not PART.fullmatch(name)
        tables.append(pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read())
    return _counted(tables, expected, golden, broken)


def count_delta(
    output: str, expected: frozenset[str], env: Mapping[str, str], golden: Answers | None = None
) -> Count | None:
    """Read the Delta table there as any user of the library does; None if there is none yet."""
    table = delta_table(output, env)
    return table and _counted([table.to_pyarrow_table()], expected, golden, 0)


def delta_table(output: str, env: Mapping[str, str]) -> Any:
    import deltalake

    told = {"allow_http": "true"} | {key: value for key, value in env.items() if key.startswith("AWS_")}
    try:
        return deltalake.DeltaTable(output, storage_options=told)
    except deltalake.exceptions.TableNotFoundError:
        return None


def _counted(tables: list[pa.Table], expected: frozenset[str], golden: Answers | None, broken: int) -> Count:
    seen: Counter[str] = Counter()
    answers: Answers = {}
    for row in chain.from_iterable(table.to_pylist() for table in tables):
        seen[row["batchq_id"]] += 1
        answers[row["batchq_id"]] = tuple(row[c] for c in ("batchq_key", "label", "label_probability", "batchq_error"))
        broken += (row["label"] is None) == (row["batchq_error"] is None)
    broken += len(seen.keys() - expected)
    if golden is not None:
        broken += sum(answers[i] != golden[i] for i in answers.keys() & golden.keys())
    return Count(len(expected - seen.keys()), sum(n - 1 for n in seen.values()), broken, answers)


def folder(output: str, env: Mapping[str, str]) -> str:
    """The folder that readers are told to read: data, until another one was announced."""
    uri = f"{output}/meta/compact.json"
    try:
        if uri.startswith("s3://"):
            with s3(env).open_input_file(uri.removeprefix("s3://")) as file:
                record = file.read()
        else:
            record = Path(uri).read_bytes()
    except FileNotFoundError:
        return "data"
    return str(json.loads(record)["folder"])


def objects(folder: str, env: Mapping[str, str]) -> dict[str, bytes]:
    """Every file or object below a folder, by its name below it."""
    if "://" not in folder:
        root = Path(folder)
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    scheme, _, path = folder.partition("://")
    remote = azure(env) if scheme == "az" else s3(env)
    listed = remote.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    found = {}
    for info in listed:
        if info.type == fs.FileType.File:
            with remote.open_input_file(info.path) as file:
                found[info.path[len(path) + 1 :]] = file.read()
    return found


def s3(env: Mapping[str, str]) -> fs.S3FileSystem:
    return fs.S3FileSystem(
        access_key=env["AWS_ACCESS_KEY_ID"],
        secret_key=env["AWS_SECRET_ACCESS_KEY"],
        region=env["AWS_REGION"],
        endpoint_override=env["AWS_ENDPOINT_URL"],
    )


def azure(env: Mapping[str, str]) -> fs.AzureFileSystem:
    host = env["AZURE_STORAGE_ENDPOINT"].split("/")[2]
    return fs.AzureFileSystem(
        env["AZURE_STORAGE_ACCOUNT_NAME"],
        account_key=env["AZURE_STORAGE_ACCOUNT_KEY"],
        blob_storage_authority=host,
        blob_storage_scheme="http",
        dfs_storage_authority=host,
        dfs_storage_scheme="http",
    )


def readers_that_fail(output: str, rows: int, scratch: Path, env: Mapping[str, str]) -> list[str]:
    """Names of those of pandas, Polars, DuckDB and datasets that don't see exactly so many rows in what they read."""
    seen_in = scratch / "as-readers-see-it"
    for name, data in objects(f"{output}/{folder(output, env)}", env).items():
        (seen_in / name).parent.mkdir(parents=True, exist_ok=True)
        (seen_in / name).write_bytes(data)
    failing = []
    for name, reader in READERS.items():
        try:
            seen = reader(seen_in, scratch / "cache")
        except Exception:
            seen = -1
        if seen != rows:
            failing.append(name)
    shutil.rmtree(seen_in)
    return failing


def _pandas(folder: Path, _: Path) -> int:
    import pandas

    return len(pandas.read_parquet(folder))


def _polars(folder: Path, _: Path) -> int:
    import polars

    return len(polars.read_parquet(folder))


def _duckdb(folder: Path, _: Path) -> int:
    import duckdb

    found = duckdb.connect().execute(f"select count(distinct batchq_id) from read_parquet('{folder}/**/*')").fetchone()
    return int(found[0]) if found else -1


def _datasets(folder: Path, cache: Path) -> int:
    import datasets

    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(cache))
    return len(loaded)


READERS = {"pandas": _pandas, "polars": _polars, "duckdb": _duckdb, "datasets": _datasets}
