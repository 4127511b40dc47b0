"""Joins a finished output's parts into few large objects, create-only and in the order of the rows.

An object is made of whole parts, up to the size that is asked for, in a local temporary file, and put under its name in
one request. Its footer has the receipts of its parts. A killed compaction goes on with the first object that isn't
there. Memory holds a row group that is read and one that is written, 64 MiB each, whatever the objects' sizes.
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from batchq import storage
from batchq.errors import AlreadyExists, StorageError
from batchq.output import layout, objects, parts, receipts
from batchq.output.objects import Compacted, CompactedObject, Rows
from batchq.records import COMPACTED, Plan, Receipt
from batchq.storage import failpoint

SIZE = 512  # MiB of an object, where nothing is said
MIB = 1 << 20
GROUP_BYTES = 64 * 1024 * 1024  # of a row group's rows in memory
GROUP_ROWS = 1 << 20
DECODED_ROWS = 1024  # at a time, of a part whose bytes are bounded
DECODED_LONG_ROWS = 16  # and of one that isn't: plans of 0.1.0 cut parts by rows alone
BLOCK = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Part:
    uri: str
    size: int  # bytes
    receipt: Receipt


def compact(output: str, plan: Plan, size: int, going_on: Callable[[int, int], None]) -> Compacted | None:
    """Join the parts of a complete output into objects of about `size` MiB; what was announced before stays. None if
    the output has no rows.

    `going_on` is told before each object how many are done, of how many; what it raises ends this, resumably. Raises
    StorageError for parts that are damaged or don't hold the rows that their receipts say.
    """
    if compacted := objects.announced(output):
        return compacted
    sources = _sources(output)
    if not sources:
        return None
    groups = list(_grouped(sources, size * MIB))
    folder = f"{COMPACTED}{_digest(plan, groups)}"  # another size, another folder: no set is mixed of two
    made = []
    for number, group in enumerate(groups):
        going_on(number, len(groups))
        uri = layout.compacted_object(output, folder, number)
        made.append(_there(uri, group) or _create(output, uri, group, bounded=plan.bytes_per_part > 0))
    compacted = Compacted(plan.fingerprint, folder, size, tuple(made))
    failpoint.reach("compact.announce.before_put")
    with suppress(AlreadyExists):  # ours after a lost reply, or another driver's: whoever comes first is read
        storage.create(layout.compact(output), objects.to_json(compacted), staging=layout.staging(output))
    failpoint.reach("compact.announce.after_put")
    return objects.announced(output)


def differences(output: str, compacted: Compacted) -> Iterator[tuple[str, str]]:
    """Each part that is still under data/ and, if what took its place holds other rows, why; empty if the same."""
    left = {layout.parse_part(uri): uri for uri in objects.parts(output)}
    where = layout.compacted(output, compacted.folder)
    cached: tuple[Rows | None, pa.Table | None] = (None, None)
    for obj in compacted.objects if left else ():
        uri, first = storage.join(where, obj.name), 0
        for receipt in receipts.read_each(uri):
            count = receipt.usage.rows
            if part := left.pop((receipt.shard, receipt.part), None):
                rows, offset = objects.holding(obj, uri, first, count)
                if cached[0] != rows:
                    cached = (rows, parts.read(rows))
                assert cached[1] is not None
                own = parts.read(Rows(part))
                taken = cached[1].slice(offset, count)
                same = own.equals(taken) and receipts.read(part) == receipt
                yield part, "" if same else f"{part}: {uri} took its place and holds other rows"
            first += count
    yield from ((part, f"{part}: no compacted object holds its rows") for part in left.values())


def digest(uri: str) -> str:
    """sha256 of an object's bytes, streamed."""
    found = hashlib.sha256()
    with storage.open_read(uri) as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def _sources(output: str) -> list[_Part]:
    sizes = {stat.uri: stat.size for stat in storage.list_objects(layout.data(output))}
    uris = objects.parts(output)
    with ThreadPoolExecutor(receipts.AT_ONCE) as threads:
        return [_Part(u, sizes[u], r) for u, r in zip(uris, threads.map(receipts.read, uris), strict=True)]


def _grouped(sources: Sequence[_Part], most: int) -> Iterator[list[_Part]]:
    """Consecutive parts whose objects have at most so many bytes together, or one larger part."""
    group: list[_Part] = []
    for part in sources:
        if group and sum(each.size for each in group) + part.size > most:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _digest(plan: Plan, groups: Sequence[Sequence[_Part]]) -> str:
    cut = [[(p.receipt.shard, p.receipt.part, p.receipt.attempt) for p in group] for group in groups]
    return hashlib.sha256(repr((plan.fingerprint, cut)).encode()).hexdigest()[:12]


def _there(uri: str, group: Sequence[_Part]) -> CompactedObject | None:
    """The object, if an earlier attempt or another driver has made it. Raises StorageError if it is another one."""
    if not storage.exists(uri):
        return None
    if receipts.read_each(uri) != [part.receipt for part in group]:
        raise StorageError(f"{uri}: holds other rows than it should; move it away, and the same command makes it again")
    with storage.open_read(uri) as file:
        metadata = pq.read_metadata(file)
    counts = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    return CompactedObject(uri.rpartition("/")[2], storage.stat(uri).size, digest(uri), counts)


def _create(output: str, uri: str, group: Sequence[_Part], bounded: bool) -> CompactedObject:
    with tempfile.TemporaryFile(prefix="batchq-compact-") as file:
        counts = _written(file, group, bounded)
        # Pages of the file rather than memory of this process; let go when nobody has a view of it any more.
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    made = CompactedObject(uri.rpartition("/")[2], len(data), hashlib.sha256(data).hexdigest(), counts)
    failpoint.reach("compact.object.before_put")
    try:
        storage.create(uri, data, staging=layout.staging(output))
    except AlreadyExists:  # ours after a lost reply, or of another driver whose library may have written other bytes
        found = _there(uri, group)
        if found is None:
            raise
        return found
    failpoint.reach("compact.object.after_put")
    return made


def _written(file: BinaryIO | Any, group: Sequence[_Part], bounded: bool) -> tuple[int, ...]:
    """As `_write`, again if bytes were damaged on their way here."""
    for attempt in range(storage.CHECKED_READS):
        try:
            file.truncate(0)
            file.seek(0)
            counts = _write(file, group, bounded)
            file.flush()
            return counts
        except (pa.ArrowException, OSError, ValueError) as error:
            if attempt == storage.CHECKED_READS - 1:
                raise StorageError(f"{group[0].uri} or a part after it: damaged; `verify` says which") from error
    raise AssertionError("unreachable")


def _write(file: BinaryIO | Any, group: Sequence[_Part], bounded: bool) -> tuple[int, ...]:
    """Write the parts' rows, in order, as one Parquet file; returns the rows of each row group."""
    counts: list[int] = []
    held: list[pa.RecordBatch] = []
    size = waiting = 0  # bytes and rows that are held
    schema, at_once = _schema(group[0].uri), min(_values_at_once(part) for part in group)
    options = {"compression": "zstd", "write_page_checksum": True, "write_batch_size": at_once}

    with pq.ParquetWriter(file, schema, **options) as writer:

        def flush() -> None:
            nonlocal size, waiting
            if held:
                table = pa.Table.from_batches(held, schema)
                held.clear()
                size = waiting = 0
                counts.append(table.num_rows)
                writer.write_table(table, row_group_size=table.num_rows)
                failpoint.reach("compact.row_group.written")

        for part in group:
            rows = 0
            for batch in _batches(part.uri, schema, DECODED_ROWS if bounded else DECODED_LONG_ROWS):
                held.append(batch)
                rows, waiting, size = rows + batch.num_rows, waiting + batch.num_rows, size + batch.nbytes
                if size >= GROUP_BYTES or waiting >= GROUP_ROWS:
                    flush()
            if rows != part.receipt.usage.rows:
                raise StorageError(f"{part.uri}: holds {rows} rows, and its receipt says {part.receipt.usage.rows}")
        flush()
        writer.add_key_value_metadata({receipts.KEY_OF_ALL: receipts.all_to_json([p.receipt for p in group])})
    return tuple(counts)


def _schema(uri: str) -> pa.Schema:
    """A part's columns, without its receipt."""
    with storage.open_read(uri) as file:
        schema = pq.ParquetFile(file).schema_arrow
    return schema.with_metadata({k: v for k, v in (schema.metadata or {}).items() if k != receipts.KEY} or None)


def _values_at_once(part: _Part) -> int:
    """How many values are measured for a page at a time, as `parts.serialize` has it."""
    with storage.open_read(part.uri) as file:
        group = pq.read_metadata(file).row_group(0)
    return max(1, min(1024, int(group.num_rows) * parts.PAGE_BYTES // max(1, int(group.total_byte_size))))


def _batches(uri: str, schema: pa.Schema, at_once: int) -> Iterator[pa.RecordBatch]:
    """A part's rows, page checksums verified. Raises StorageError for one that has other columns."""
    with storage.open_read(uri) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False, buffer_size=BLOCK)
        if not parquet.schema_arrow.equals(schema):
            raise StorageError(f"{uri}: has other columns than the output's other parts; see `verify`")
        yield from parquet.iter_batches(at_once, use_threads=False)
