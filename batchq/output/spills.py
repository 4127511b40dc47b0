"""Answered rows of a shard under way, saved for the attempt that may come after this one."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from batchq import storage
from batchq.config import TaskConfig
from batchq.errors import AlreadyExists, NotFound
from batchq.output import layout
from batchq.output.parts import serialize
from batchq.records import Answer, Shard
from batchq.storage import failpoint
from batchq.task import answers


def save(output: str, shard: Shard, attempt: str, number: int, fingerprint: str, columns: dict[str, pa.Array]) -> None:
    """Save answered rows; `columns` as `parts.outcome_columns` gives them."""
    data = serialize(pa.table(columns), {b"batchq.fingerprint": fingerprint.encode()})
    # Its name holds its digest: nothing else would notice a byte that flipped in a page's header.
    name = f"{attempt}-{number:04d}-{hashlib.sha256(data).hexdigest()}.parquet"
    failpoint.reach("write.spill.before_put")
    with suppress(AlreadyExists):  # nobody else writes this name: the reply was lost
        storage.create(storage.join(layout.spills(output, shard.index), name), data, staging=layout.staging(output))
    failpoint.reach("write.spill.after_put")


def read(
    output: str, shard: Shard, fingerprint: str, task: TaskConfig, start: int = 0
) -> dict[str, tuple[str | None, Answer]]:
    """Answers that earlier attempts saved, by batchq_id, with their batchq_key. Failures are asked again.

    `start`: rows at positions before it are committed; of a long stream they are most of what was ever saved.
    """
    failpoint.reach("write.read_spills.before")
    names = [f.name for f in answers.of(task).fields()]
    spilled: dict[str, tuple[str | None, Answer]] = {}
    for stat in storage.list_objects(layout.spills(output, shard.index)):
        try:
            data = storage.read_checked(stat.uri, partial(_whole, stat.uri))
        except NotFound:
            continue  # another attempt committed and cleaned up between our listing and this read
        except ValueError:
            continue  # a damaged spill only costs asking its rows again
        file = pq.ParquetFile(pa.BufferReader(data))
        table = file.read()
        if (file.metadata.metadata or {}).get(b"batchq.fingerprint") != fingerprint.encode():
            continue
        for row in table.to_pylist():
            if row["batchq_error"] is None and _position(row["batchq_id"]) >= start:
                tokens = [row[f"batchq_{kind}_tokens"] for kind in ("prompt", "cached", "output")]
                spilled[row["batchq_id"]] = (row["batchq_key"], Answer({n: row[n] for n in names}, *tokens))
    return spilled


def _position(id: str) -> int:
    """A row's `Row.position`, which its id ends in, behind a colon or an at sign."""
    return int(re.split("[:@]", id)[-1])


def _whole(uri: str, data: bytes) -> bytes:
    """A spill's bytes. Raises ValueError if they don't fit the digest in its name."""
    if not uri.endswith(f"-{hashlib.sha256(data).hexdigest()}.parquet"):
        raise ValueError("a damaged spill")
    return data


def drop(output: str, shard: Shard) -> None:
    failpoint.reach("write.drop_spills.before")
    storage.delete_prefix(layout.spills(output, shard.index))
    failpoint.reach("write.drop_spills.after")
