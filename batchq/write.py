"""Answers -> one Parquet object with its receipt in the footer -> commit; and spills.

The data object is the commit: one create-only put under a name that the plan decides. Whoever
finds the name taken reads the receipt back, because a put whose reply was lost has still won.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchq import failpoint, storage
from batchq.config import TaskConfig
from batchq.errors import AlreadyExists, ConfigError, NotFound, StorageError
from batchq.records import Answer, Failure, Receipt, Shard, Usage, sealed, unsealed
from batchq.task import answer_fields

RECEIPT = b"batchq.receipt"
IDENTITY = [pa.field("batchq_id", pa.string(), nullable=False), pa.field("batchq_key", pa.string())]
COUNTS = [pa.field(f"batchq_{kind}_tokens", pa.int32()) for kind in ("prompt", "cached", "output")]
FAILURE = [
    pa.field("batchq_error", pa.string()),
    pa.field("batchq_message", pa.string()),
    pa.field("batchq_raw", pa.string()),
]
EXTRA = pa.field("batchq_extra", pa.string())  # JSON of keys that the frozen schema doesn't have
BUCKETS = 16  # temporary files that count_duplicates spreads its hashes over
RECEIPTS_AT_ONCE = 64
TAIL = 4096  # bytes read first for a footer; most fit


# -- schema -------------------------------------------------------------------------------------


def output_schema(columns: pa.Schema, task: TaskConfig, extra: bool) -> pa.Schema:
    """Identity, the input columns that come along, the answer, counts, failure: in this order.

    Raises ConfigError if an input column has the name of one of ours.
    """
    ours = [*IDENTITY, *answer_fields(task), *COUNTS, *FAILURE, *([EXTRA] if extra else [])]
    taken = sorted(set(columns.names) & {f.name for f in ours})
    if taken:
        raise ConfigError(
            f"input column {taken[0]} has the name of an output column: "
            f"leave it out with output.columns, or rename the answer with task.name"
        )
    plain = [pa.field(f.name, f.type) for f in columns]
    return pa.schema([*IDENTITY, *plain, *(f for f in ours if f not in IDENTITY)])


def schema_to_text(schema: pa.Schema) -> str:
    return base64.b64encode(schema.serialize()).decode()


def schema_from_text(text: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def input_columns(schema: pa.Schema, task: TaskConfig) -> pa.Schema:
    """The input columns of an output schema."""
    ours = {f.name for f in [*IDENTITY, *answer_fields(task), *COUNTS, *FAILURE, EXTRA]}
    return pa.schema([f for f in schema if f.name not in ours])


# -- rows to tables -----------------------------------------------------------------------------

Outcome = Answer | Failure


def outcome_columns(
    task: TaskConfig,
    ids: Sequence[str],
    keys: Sequence[str | None],
    outcomes: Sequence[Outcome],
    raws: Sequence[str | None],
) -> dict[str, pa.Array]:
    """The columns that batchq adds, one row an outcome."""
    answers = [o if isinstance(o, Answer) else None for o in outcomes]
    failures = [o if isinstance(o, Failure) else None for o in outcomes]
    columns: dict[str, pa.Array] = {
        "batchq_id": pa.array(ids, pa.string()),
        "batchq_key": pa.array([k if a else None for k, a in zip(keys, answers, strict=True)], pa.string()),
    }
    for field in answer_fields(task):
        columns[field.name] = pa.array([a.columns[field.name] if a else None for a in answers], field.type)
    columns["batchq_prompt_tokens"] = pa.array([a.prompt_tokens if a else None for a in answers], pa.int32())
    columns["batchq_cached_tokens"] = pa.array([a.cached_tokens if a else None for a in answers], pa.int32())
    columns["batchq_output_tokens"] = pa.array([a.output_tokens if a else None for a in answers], pa.int32())
    columns["batchq_error"] = pa.array([f.code if f else None for f in failures], pa.string())
    columns["batchq_message"] = pa.array([f.message if f else None for f in failures], pa.string())
    columns["batchq_raw"] = pa.array([r if f else None for f, r in zip(failures, raws, strict=True)], pa.string())
    return columns


def as_gold(value: Any) -> str | None:
    """A gold value as text; NaN and empty are no gold."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    return str(value)


def usage_of(
    outcomes: Sequence[Outcome], golds: Sequence[str | None], task: TaskConfig
) -> tuple[Usage, dict[str, int], dict[str, int]]:
    """(usage, answers by label, failures by code) of one part."""
    answers = [(o, g) for o, g in zip(outcomes, golds, strict=True) if isinstance(o, Answer)]
    labels: Counter[str] = Counter(o.columns[task.name] for o, _ in answers) if task.labels else Counter()
    usage = Usage(
        rows=len(outcomes),
        answers=len(answers),
        failures=len(outcomes) - len(answers),
        prompt_tokens=sum(o.prompt_tokens for o, _ in answers),
        cached_tokens=sum(o.cached_tokens for o, _ in answers),
        output_tokens=sum(o.output_tokens for o, _ in answers),
        correct=sum(o.columns[task.name] == g for o, g in answers if g is not None),
        gold=sum(g is not None for _, g in answers),
        mass=float(sum(o.columns[f"{task.name}_mass"] for o, _ in answers)) if task.labels else 0.0,
    )
    return usage, dict(labels), dict(Counter(o.code for o in outcomes if isinstance(o, Failure)))


def serialize(table: pa.Table, metadata: dict[bytes, bytes]) -> pa.Buffer:
    """One Parquet file in memory, page checksums on: a flipped byte is noticed by whoever verifies."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table, row_group_size=max(1, table.num_rows))
        writer.add_key_value_metadata(metadata)
    return sink.getvalue()


# -- commit -------------------------------------------------------------------------------------


def part_name(shard: Shard, part: int) -> str:
    """data/part-00017.parquet, or data/part-00017-0003.parquet for the fourth part of a stream."""
    suffix = f"-{part:04d}" if shard.unit == "stream" else ""
    return f"data/part-{shard.index:05d}{suffix}.parquet"


def parse_part_name(name: str) -> tuple[int, int] | None:
    """(shard, part) of a data object's name; None if it isn't one of ours."""
    found = re.fullmatch(r"(?:.*/)?part-(\d{5,})(?:-(\d{4,}))?\.parquet", name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def empty_name(index: int) -> str:
    """Where an empty shard says that it is done: no table, because readers trip over an empty row group."""
    return f"meta/empty/{index:05d}.json"


def commit(output: str, shard: Shard, receipt: Receipt, table: pa.Table) -> Receipt:
    """Publish one part; returns the receipt that stands in the store, which may be another attempt's.

    Raises StorageError if the store failed for good, or holds an object that isn't this plan's.
    """
    if receipt.usage.rows:
        uri = storage.join(output, part_name(shard, receipt.part))
        data: Any = serialize(table, {RECEIPT: receipt_to_json(receipt)})
    else:
        uri = storage.join(output, empty_name(shard.index))
        data = receipt_to_json(receipt)
    failpoint.reach("write.commit.before_put")
    try:
        storage.create(uri, data, staging=storage.join(output, "meta/tmp"))
        failpoint.reach("write.commit.after_put")
    except AlreadyExists:
        failpoint.reach("write.commit.taken")
        standing = read_receipt(uri)
        if standing.fingerprint != receipt.fingerprint:
            raise StorageError(f"{uri}: holds an object of another run; choose another output.path") from None
        return standing  # ours after a lost reply, or another attempt's: either way the work is done
    return receipt


def receipt_to_json(receipt: Receipt) -> bytes:
    """The receipt with a digest of its own: a Parquet footer has no checksum."""
    body = json.dumps(dataclasses.asdict(receipt), sort_keys=True, allow_nan=False)
    return json.dumps({"digest": hashlib.sha256(body.encode()).hexdigest(), "receipt": body}).encode()


def receipt_from_json(data: bytes) -> Receipt:
    """Raises ValueError if it is not whole."""
    try:
        outer = json.loads(data)
        body = outer["receipt"]
        if hashlib.sha256(body.encode()).hexdigest() != outer["digest"]:
            raise ValueError("its receipt is damaged")
        fields = json.loads(body)
        return Receipt(**{**fields, "usage": Usage(**fields["usage"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("its receipt is damaged") from error


def read_receipt(uri: str) -> Receipt:
    """A committed part's receipt, from the object's last bytes. Raises StorageError if they are damaged."""
    try:
        if uri.endswith(".json"):
            return storage.read_checked(uri, receipt_from_json)
        return storage.read_checked(uri, lambda tail: _receipt_in(uri, tail), suffix=TAIL)
    except ValueError as error:
        known = f" ({error})" if str(error).startswith(("its", "not", "no ")) else ""
        raise StorageError(f"{uri}: not a whole object of batchq's{known}; move it away and run again") from error


def _receipt_in(uri: str, tail: bytes) -> Receipt:
    wanted = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != b"PAR1":
        raise ValueError("not a whole Parquet file")
    if wanted > len(tail):
        tail = storage.read(uri, suffix=wanted)
    try:
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + tail[-wanted:])).metadata or {}
    except (pa.ArrowException, OSError) as error:  # damaged Thrift is an OSError
        raise ValueError("its footer is damaged") from error
    if RECEIPT not in metadata:
        raise ValueError("no receipt in its footer: not written by batchq")
    return receipt_from_json(metadata[RECEIPT])


def read_part(uri: str, columns: list[str]) -> pa.Table:
    """Columns of one data object, page checksums verified; bytes that don't pass are read again.

    Raises StorageError if they never do.
    """
    for attempt in range(storage.CHECKED_READS):
        try:
            with storage.open_read(uri) as file:
                return pq.ParquetFile(file, page_checksum_verification=True).read(columns=columns)
        except (pa.ArrowException, OSError, ValueError) as error:
            if attempt == storage.CHECKED_READS - 1:
                raise StorageError(f"{uri}: damaged: its pages don't pass their checksums") from error
    raise AssertionError("unreachable")


def read_receipts(output: str, known: Mapping[str, Receipt]) -> dict[str, Receipt]:
    """All committed parts' receipts by URI, data and empty, in the order of their names; those `known` aren't read."""
    uris = [s.uri for s in storage.list_objects(storage.join(output, "data")) if parse_part_name(s.uri)]
    uris += [s.uri for s in storage.list_objects(storage.join(output, "meta/empty"))]
    with ThreadPoolExecutor(RECEIPTS_AT_ONCE) as pool:
        return dict(zip(uris, pool.map(lambda uri: known.get(uri) or read_receipt(uri), uris), strict=True))


# -- attempts and spills --------------------------------------------------------------------------


def mark_attempt(output: str, shard: Shard, mark: dict[str, Any], number: int) -> int:
    """Add a record to the shard's attempts, create-only: before its rows are asked, and whatever is learnt since.

    `number` is the first that may be free; returns the one it got.
    """
    folder = storage.join(output, f"meta/attempts/{shard.index:05d}")
    stated = sealed(mark)  # a byte that flips may still leave JSON, and accuse another row
    failpoint.reach("write.mark_attempt.before_put")
    while True:
        try:
            storage.create(
                storage.join(folder, f"{number:04d}.json"),
                stated,
                staging=storage.join(output, "meta/tmp"),
            )
            failpoint.reach("write.mark_attempt.after_put")
            return number
        except AlreadyExists:
            if storage.read(storage.join(folder, f"{number:04d}.json")) == stated:
                return number  # ours: the reply was lost
            number += 1


def read_marks(output: str, shard: Shard) -> list[dict[str, Any]]:
    """The shard's attempts as they were recorded, oldest first. Raises StorageError for one that can't be read."""
    folder = storage.join(output, f"meta/attempts/{shard.index:05d}")
    return [storage.read_json(uri, unsealed) for uri in sorted(s.uri for s in storage.list_objects(folder))]


def spill_folder(output: str, shard: Shard) -> str:
    return storage.join(output, f"meta/partial/{shard.index:05d}")


def spill(output: str, shard: Shard, attempt: str, number: int, fingerprint: str, columns: dict[str, pa.Array]) -> None:
    """Save answered rows of a shard under way, for the attempt that may come after this one."""
    data = serialize(pa.table(columns), {b"batchq.fingerprint": fingerprint.encode()})
    # Its name holds its digest: nothing else would notice a byte that flipped in a page's header.
    name = f"{attempt}-{number:04d}-{hashlib.sha256(data).hexdigest()}.parquet"
    failpoint.reach("write.spill.before_put")
    with suppress(AlreadyExists):  # nobody else writes this name: the reply was lost
        storage.create(storage.join(spill_folder(output, shard), name), data, staging=storage.join(output, "meta/tmp"))
    failpoint.reach("write.spill.after_put")


def read_spills(output: str, shard: Shard, fingerprint: str, task: TaskConfig) -> dict[str, tuple[str | None, Answer]]:
    """Answers that earlier attempts saved, by batchq_id, with their batchq_key. Failures are asked again."""
    failpoint.reach("write.read_spills.before")
    names = [f.name for f in answer_fields(task)]
    found: dict[str, tuple[str | None, Answer]] = {}
    for stat in storage.list_objects(spill_folder(output, shard)):
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
            if row["batchq_error"] is None:
                tokens = [row[f"batchq_{kind}_tokens"] for kind in ("prompt", "cached", "output")]
                found[row["batchq_id"]] = (row["batchq_key"], Answer({n: row[n] for n in names}, *tokens))
    return found


def _whole(uri: str, data: bytes) -> bytes:
    """A spill's bytes. Raises ValueError if they aren't those that its name is made of."""
    if not uri.endswith(f"-{hashlib.sha256(data).hexdigest()}.parquet"):
        raise ValueError("a damaged spill")
    return data


def drop_spills(output: str, shard: Shard) -> None:
    failpoint.reach("write.drop_spills.before")
    storage.delete_prefix(spill_folder(output, shard))
    failpoint.reach("write.drop_spills.after")


def count_duplicates(output: str, column: str) -> int:
    """How many values of a user's id column stand more than once in the committed rows.

    Hashes of 8 bytes go to BUCKETS temporary files by their last bits, one of which is counted at a time: 10 million
    rows take 80 MB of disk and 5 MB of memory. Different values count as one with a probability of rows**2 / 2**65.
    """
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="batchq-ids-") as scratch, ExitStack() as opened:
        buckets = [opened.enter_context(open(Path(scratch) / str(i), "w+b")) for i in range(BUCKETS)]
        for stat in storage.list_objects(storage.join(output, "data")):
            values = read_part(stat.uri, [column]).column(0).to_pylist()
            digests = (hashlib.blake2b(repr(v).encode(), digest_size=8).digest() for v in values if v is not None)
            hashes = np.frombuffer(b"".join(digests), dtype=np.uint64)
            for i, bucket in enumerate(buckets):
                hashes[hashes % BUCKETS == i].tofile(bucket)
        duplicates = 0
        for bucket in buckets:
            bucket.seek(0)
            _, counts = np.unique(np.fromfile(bucket, dtype=np.uint64), return_counts=True)
            duplicates += int((counts > 1).sum())
        return duplicates
