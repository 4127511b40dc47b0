"""A version of a table that has a log of its own, as input: its files, which batchq's own Parquet reader reads.

The table's library says which files are in the version, and what the columns are. What files alone don't tell right is
refused in one line, never read wrong: rows that are deleted beside their files, columns that were renamed, types that
were widened.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from batchq import storage
from batchq.errors import ConfigError, InputError
from batchq.input.partitions import partition_values
from batchq.records import InputObject

# Features that a reader of Delta's protocol has to know, and that a list of files and columns is enough for; those
# whose use is looked at below among them.
_READ = {"timestampNtz", "v2Checkpoint", "vacuumProtocolCheck", "deletionVectors", "columnMapping"}
_WHOLE = {"byte", "short", "integer", "long"}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`columns`: the table's, those by folders too; `partitions`: the latter, each int64 or string."""

    words: str
    objects: list[InputObject]
    columns: frozenset[str]
    partitions: dict[str, str]


def delta(path: str, version: int | None) -> Snapshot:
    """A Delta table's version; None: its latest.

    Raises InputError if there is none, if files of it are gone, and for a table that its files don't tell right.
    """
    root, deltalake = storage.normalize(path), library("deltalake", "delta")
    try:
        table = deltalake.DeltaTable(root, version=version, storage_options=options())
        columns = json.loads(table.schema().to_json())["fields"]
        _refuse_delta(root, table, columns)
        files = pa.table(table.get_add_actions()).to_pylist()
    except deltalake.exceptions.DeltaError as error:
        asked = "" if version is None else f" input.version={version}:"
        raise InputError(f"input.path={path}:{asked} not a Delta table that can be read: {_line(error)}") from error
    types = {field["name"]: field["type"] for field in columns}
    partitions = {name: "int64" if types[name] in _WHOLE else "string" for name in table.metadata().partition_columns}
    names = [unquote(file["path"]) for file in files]
    for name, file in zip(names, files, strict=True):
        _refuse_place(root, name, file.get("partition") or {}, partitions)
    words = f"Delta table, version {table.version()}"
    return Snapshot(words, there(root, words, names, "VACUUM"), frozenset(types), partitions)


def options() -> dict[str, str]:
    """What the table's library is told beside the environment, where it finds credentials as batchq does."""
    import os

    plain = any("ENDPOINT" in name and value.startswith("http://") for name, value in os.environ.items())
    safe = {"aws_conditional_put": "etag", "aws_s3_allow_unsafe_rename": "false"}  # whatever the environment says
    return {**safe, **({"allow_http": "true"} if plain else {})}


def library(name: str, extra: str, field: str = "input.format") -> Any:
    """Raises ConfigError naming the extra that brings it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{field}={extra}: needs the package {name}, which isn't installed: pip install 'batchq[{extra}]'"
        ) from error


def _refuse_delta(root: str, table: Any, columns: list[dict[str, Any]]) -> None:
    """Raises InputError for what a table's files and columns alone don't tell right."""
    features = set(table.protocol().reader_features or ())
    mapping = table.metadata().configuration.get("delta.columnMapping.mode") or "none"
    if mapping != "none" or any("delta.columnMapping.physicalName" in (c.get("metadata") or {}) for c in columns):
        raise InputError(
            f"{root}: its columns may be called otherwise in its files (column mapping, mode {mapping}), which can't "
            "be read; write the rows to a new table without it"
        )
    if strange := sorted(features - _READ):
        raise InputError(
            f"{root}: uses {strange[0]} of Delta's protocol, which can't be read; write the rows to a new table "
            "without it"
        )
    if "deletionVectors" in features:
        deleted = pa.RecordBatchReader.from_stream(table.deletion_vectors())
        if any(batch.num_rows for batch in deleted):
            raise InputError(
                f"{root}: has deletion vectors: rows that are deleted and still in its files, which can't be read; "
                "REORG TABLE ... APPLY (PURGE) writes the files anew"
            )


def _refuse_place(root: str, name: str, said: dict[str, Any], partitions: dict[str, str]) -> None:
    """Raises InputError for a file outside the table's folder, or in folders that say other values than the log."""
    if "://" in name or name.startswith("/"):
        raise InputError(
            f"{root}: has a file elsewhere, {name}, as shallow clones do; write the rows to a table of its own"
        )
    by_folder = partition_values(name, dict.fromkeys(partitions, "string"))
    for key, value in by_folder.items():
        logged = None if said.get(key) is None else str(said[key])
        if logged != value:
            raise InputError(
                f"{root}: the folders of {name} don't say what the table's log says of its partition column {key}, or "
                "not as text; write the rows to a table whose folders do, or that has no partitions"
            )


def there(root: str, words: str, names: list[str], by: str) -> list[InputObject]:
    """The files as they are now, in the order of their names. Raises InputError for one that is gone, and says by what
    that is likely."""
    listed = {stat.uri: stat for stat in storage.list_objects(root)}
    found = []
    for name in sorted(names):
        stat = listed.get(storage.join(root, name))
        if stat is None:
            raise InputError(f"{root}: {name} of its {words} is gone, by {by} perhaps; take a newer input.version")
        found.append(InputObject(stat.uri, name, stat.size, stat.etag))
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
