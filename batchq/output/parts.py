"""Answers -> one Parquet object with its receipt in the footer -> commit.

The data object is the commit: one create-only put under a name that the plan decides. Whoever
finds the name taken reads the receipt back, because a put whose reply was lost has still won.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchq import storage
from batchq.config import TaskConfig
from batchq.errors import AlreadyExists, StorageError
from batchq.output import layout, receipts
from batchq.output.objects import Rows
from batchq.records import Answer, Failure, Receipt, Shard, Usage
from batchq.storage import failpoint
from batchq.task import answers

Outcome = Answer | Failure

PAGE_BYTES = 1024 * 1024  # of a column's page, about
PART_BYTES = 32 * 1024 * 1024  # of a part's rows, after which the shard's next part begins; fixed in each plan


def outcome_columns(
    task: TaskConfig,
    ids: Sequence[str],
    keys: Sequence[str | None],
    outcomes: Sequence[Outcome],
    raws: Sequence[str | None],
) -> dict[str, pa.Array]:
    """The columns that batchq adds, one row per outcome."""
    answered = [o if isinstance(o, Answer) else None for o in outcomes]
    failures = [o if isinstance(o, Failure) else None for o in outcomes]
    columns: dict[str, pa.Array] = {
        "batchq_id": pa.array(ids, pa.string()),
        "batchq_key": pa.array([k if a else None for k, a in zip(keys, answered, strict=True)], pa.string()),
    }
    for name, kind in ((field.name, field.type) for field in answers.of(task).fields()):
        columns[name] = pa.array([a.columns[name] if a else None for a in answered], kind)
    columns["batchq_prompt_tokens"] = pa.array([a.prompt_tokens if a else None for a in answered], pa.int32())
    columns["batchq_cached_tokens"] = pa.array([a.cached_tokens if a else None for a in answered], pa.int32())
    columns["batchq_output_tokens"] = pa.array([a.output_tokens if a else None for a in answered], pa.int32())
    columns["batchq_error"] = pa.array([f.code if f else None for f in failures], pa.string())
    columns["batchq_message"] = pa.array([f.message if f else None for f in failures], pa.string())
    columns["batchq_raw"] = pa.array([r if f else None for f, r in zip(failures, raws, strict=True)], pa.string())
    return columns


def usage_of(
    outcomes: Sequence[Outcome], golds: Sequence[str | None], task: TaskConfig
) -> tuple[Usage, dict[str, int], dict[str, int]]:
    """(usage, answers by label, failures by code) of one part."""
    answered = [o for o in outcomes if isinstance(o, Answer)]
    counts = answers.of(task).counts(outcomes, golds)
    usage = Usage(
        rows=len(outcomes),
        answers=len(answered),
        failures=len(outcomes) - len(answered),
        prompt_tokens=sum(o.prompt_tokens for o in answered),
        cached_tokens=sum(o.cached_tokens for o in answered),
        output_tokens=sum(o.output_tokens for o in answered),
        correct=counts.correct,
        gold=counts.gold,
        mass=counts.mass,
        gold_unknown=counts.gold_unknown,
        truncated=counts.truncated,
    )
    return usage, counts.labels, dict(Counter(o.code for o in outcomes if isinstance(o, Failure)))


def serialize(table: pa.Table, metadata: dict[bytes, bytes]) -> pa.Buffer:
    """One Parquet file in memory, with page checksums: a reader that verifies them notices a flipped byte."""
    sink = pa.BufferOutputStream()
    # Pages and dictionaries are measured after so many values: a page of 1,024 long ones takes its memory all at once,
    # here and in whoever reads it.
    at_once = max(1, min(1024, table.num_rows * PAGE_BYTES // max(1, table.nbytes)))
    options = {"compression": "zstd", "write_page_checksum": True, "write_batch_size": at_once}
    with pq.ParquetWriter(sink, table.schema, **options) as writer:
        writer.write_table(table, row_group_size=max(1, table.num_rows))
        writer.add_key_value_metadata(metadata)
    return sink.getvalue()


def commit(output: str, shard: Shard, receipt: Receipt, table: pa.Table) -> Receipt:
    """Publish one part; returns the receipt that the store holds, which may be another attempt's.

    Raises StorageError if the store failed for good, or holds an object that isn't this plan's.
    """
    if receipt.usage.rows:
        uri = layout.part(output, shard, receipt.part)
        data: Any = serialize(table, {receipts.KEY: receipts.to_json(receipt)})
    else:
        uri = layout.empty(output, shard.index)
        data = receipts.to_json(receipt)
    failpoint.reach("write.commit.before_put")
    try:
        storage.create(uri, data, staging=layout.staging(output))
        failpoint.reach("write.commit.after_put")
    except AlreadyExists:
        failpoint.reach("write.commit.taken")
        stored = receipts.read(uri)
        if stored.fingerprint != receipt.fingerprint:
            raise StorageError(f"{uri}: holds an object of another run; choose another output.path") from None
        return stored  # ours after a lost reply, or another attempt's: either way the work is done
    return receipt


def read(rows: Rows, columns: list[str] | None = None) -> pa.Table:
    """Columns of a data object, or of some of its row groups, page checksums verified; bytes that don't pass are read
    again.

    Raises StorageError if they never do.
    """
    for attempt in range(storage.CHECKED_READS):
        try:
            with storage.open_read(rows.uri) as file:
                parquet = pq.ParquetFile(file, page_checksum_verification=True)
                if rows.groups is None:
                    return parquet.read(columns=columns)
                return parquet.read_row_groups(list(rows.groups), columns=columns)
        except (pa.ArrowException, OSError, ValueError) as error:
            if attempt == storage.CHECKED_READS - 1:
                raise StorageError(f"{rows.uri}: damaged: its pages don't pass their checksums") from error
    raise AssertionError("unreachable")
