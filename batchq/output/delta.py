"""A complete output as a Delta table: one commit at output.path that says which objects the table has.

The commit has a transaction of its own in the protocol's sense, named by the run: its version is PARTS while the table
has the parts, COMPACTED once it has the compacted objects. It is asked for before each commit, and the store creates a
commit only once, so that a killed or second driver never registers an object twice. What takes the parts' place is
added by the commit that removes them: a reader of the table sees one set or the other.
"""

from __future__ import annotations

import datetime
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchq import storage
from batchq.errors import ConfigError, OutputTaken, StorageError
from batchq.input.snapshots import library, options
from batchq.output import layout, objects, receipts
from batchq.records import Plan
from batchq.storage import failpoint

PARTS, COMPACTED = 1, 2
STATED_BYTES = 32  # of a text that a table's log states as a least or greatest one
LOG = "_delta_log"
_NO_NAME = " ,;{}()\n\t="  # what a column's name can't have in a table without column mapping


def check(schema: pa.Schema) -> None:
    """Raises ConfigError naming the column that a Delta table can't hold, or a library that is missing."""
    library("deltalake", "delta", "output.table")
    seen: dict[str, str] = {}
    for field in schema:
        if strange := next((sign for sign in field.name if sign in _NO_NAME), ""):
            raise ConfigError(
                f"output.table=delta: column {field.name!r} has {strange!r} in its name, which Delta's writers refuse; "
                "leave it out with output.columns, or call the input's column otherwise"
            )
        if (other := seen.setdefault(field.name.lower(), field.name)) != field.name:
            raise ConfigError(
                f"output.table=delta: columns {other} and {field.name} are the same to Delta, where case doesn't "
                "count; leave one out with output.columns"
            )
        if why := _unfit(field.type):
            raise ConfigError(
                f"output.table=delta: column {field.name} is {field.type}, and Delta has no {why}; "
                "leave it out with output.columns, or write the input's column in another type"
            )


def require_free(output: str) -> None:
    """Raises OutputTaken if there is a Delta table at the output of a run that isn't planned yet."""
    if storage.peek(storage.join(output, LOG)) and not storage.exists(layout.plan(output)):
        raise OutputTaken(f"{output}: is a Delta table already; choose another output.path")


def state(output: str, plan: Plan) -> int:
    """0, PARTS or COMPACTED: what the table at `output` has of this run.

    Raises OutputTaken if there is a Delta table of something else.
    """
    table = _open(output)
    if table is None:
        return 0
    if (found := table.transaction_version(_name(plan))) is None:
        raise OutputTaken(f"{output}: is a Delta table that this run didn't make; choose another output.path")
    return int(found)


def is_due(output: str, plan: Plan) -> bool:
    """Whether the table is yet to be told of what is read now."""
    return state(output, plan) < _wanted(output)


def register(output: str, plan: Plan, schema: pa.Schema) -> int:
    """Make the table's objects those that the rows are read from; returns the table's version.

    Raises ConfigError as `check`, OutputTaken as `state`, StorageError if the commit failed, or if somebody else has
    changed which of the parts the table has.
    """
    check(schema)
    deltalake, wanted = library("deltalake", "delta", "output.table"), _wanted(output)
    if state(output, plan) < wanted:
        added = _added(output)
        transaction = deltalake.Transaction(_name(plan), wanted)
        hooks = deltalake.PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
        table, columns = _open(output), deltalake.Schema.from_arrow(_stored(schema))
        failpoint.reach("delta.commit.before")
        try:
            if table is None:
                # Without a retry, which would add the parts by a second commit where another driver made the first.
                once = deltalake.CommitProperties(max_commit_retries=0, app_transactions=[transaction])
                deltalake.transaction.create_table_with_add_actions(
                    output, columns, added, mode="error", storage_options=options(), commit_properties=once
                )
            else:  # a retry of this looks at the commits before it, and gives up if one is of the same transaction
                said = deltalake.CommitProperties(app_transactions=[transaction])
                actions = [*_removed(output, table), *added]
                table.create_write_transaction(
                    actions, "append", columns, commit_properties=said, post_commithook_properties=hooks
                )
        except deltalake.exceptions.DeltaError as error:  # ours after a lost reply, or another driver was quicker
            if state(output, plan) < wanted:
                raise StorageError(f"{output}: the Delta commit failed: {' '.join(str(error).split())[:300]}") from None
        failpoint.reach("delta.commit.after")
    table = _open(output)
    assert table is not None
    return int(table.version())


def problems(output: str, plan: Plan) -> list[str]:
    """How the table's objects differ from those that the rows are read from, in words."""
    table = _open(output)
    if table is None:
        return [f"{output}: isn't a Delta table yet; the same job registers it"]
    state(output, plan)
    has, wanted = set(_paths(table)), {uri[len(output) + 1 :] for uri in objects.listed(output)}
    words = [
        f"{output}/{path}: is in the Delta table, and the rows aren't read from it" for path in sorted(has - wanted)
    ]
    return words + [f"{output}/{path}: isn't in the Delta table" for path in sorted(wanted - has)]


def uses_parts(output: str) -> bool:
    """Whether a Delta table at `output` has objects under data/ now."""
    if not storage.peek(storage.join(output, LOG)):
        return False
    table = _open(output)
    return table is not None and any(path.startswith("data/") for path in _paths(table))


def _wanted(output: str) -> int:
    return COMPACTED if objects.announced(output) else PARTS


def _name(plan: Plan) -> str:
    return f"batchq-{plan.fingerprint}"


def _open(output: str) -> Any:
    deltalake = library("deltalake", "delta", "output.table")
    try:
        return deltalake.DeltaTable(output, storage_options=options())
    except deltalake.exceptions.TableNotFoundError:
        return None
    except deltalake.exceptions.DeltaError as error:
        raise StorageError(f"{output}: its Delta table can't be read: {' '.join(str(error).split())[:300]}") from None


def _paths(table: Any) -> list[str]:
    found: list[str] = pa.table(table.get_add_actions()).column("path").to_pylist()
    return found


def _removed(output: str, table: Any) -> list[Any]:
    """What takes the parts out of the table. Raises StorageError if it hasn't got them all any more."""
    deltalake = library("deltalake", "delta", "output.table")
    files = {file["path"]: file["size_bytes"] for file in pa.table(table.get_add_actions()).to_pylist()}
    parts = [uri[len(output) + 1 :] for uri in objects.parts(output)]
    if missing := [path for path in parts if path not in files]:
        raise StorageError(
            f"{output}: {missing[0]} isn't in its Delta table any more, so somebody else has changed that; "
            "it isn't switched to the compacted objects"
        )
    now = int(time.time() * 1000)
    return [deltalake.transaction.RemoveAction(path, False, now, files[path], {}) for path in parts]


def _added(output: str) -> list[Any]:
    deltalake = library("deltalake", "delta", "output.table")
    now, changes = int(time.time() * 1000), _wanted(output) == PARTS

    def add(uri: str) -> Any:
        with storage.open_read(uri) as file:
            stats = _statistics(pq.read_metadata(file))
        size = storage.stat(uri).size
        return deltalake.transaction.AddAction(uri[len(output) + 1 :], size, {}, now, changes, json.dumps(stats))

    with ThreadPoolExecutor(receipts.AT_ONCE) as threads:
        return list(threads.map(add, objects.listed(output)))


def _statistics(metadata: pq.FileMetaData) -> dict[str, Any]:
    """Rows, nulls, and the least and greatest values as far as the footer and JSON tell them exactly: not of floats,
    whose footers leave NaN out, of decimals, nor of long texts."""
    nulls: dict[str, int] = {}
    least: dict[str, Any] = {}
    greatest: dict[str, Any] = {}
    for field in metadata.schema.to_arrow_schema():
        name, kind = field.name, field.type
        if pa.types.is_nested(kind):
            continue
        chunks = [
            metadata.row_group(group).column(place).statistics
            for group in range(metadata.num_row_groups)
            for place in range(metadata.num_columns)
            if metadata.row_group(group).column(place).path_in_schema == name
        ]
        if len(chunks) != metadata.num_row_groups:  # a struct's field is spelled as this column
            continue
        if any(chunk is None or not chunk.has_null_count for chunk in chunks):
            continue
        nulls[name] = sum(chunk.null_count for chunk in chunks)
        valued = [chunk for chunk in chunks if chunk.num_values]
        if valued and _is_stated(kind) and all(chunk.has_min_max for chunk in valued):
            low, high = min(chunk.min for chunk in valued), max(chunk.max for chunk in valued)
            if not isinstance(low, str) or max(len(low.encode()), len(high.encode())) <= STATED_BYTES:
                least[name], greatest[name] = _as_json(low), _as_json(high)
    return {"numRecords": metadata.num_rows, "minValues": least, "maxValues": greatest, "nullCount": nulls}


def _is_stated(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_integer(kind)
        or types.is_date(kind)
        or types.is_timestamp(kind)
        or types.is_string(kind)
        or types.is_large_string(kind)
    )


def _as_json(value: Any) -> Any:
    if isinstance(value, datetime.datetime):
        if value.tzinfo is None:
            return value.isoformat(timespec="microseconds")
        return value.astimezone(datetime.UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    return value.isoformat() if isinstance(value, datetime.date) else value


def _unfit(kind: pa.DataType) -> str:
    """What of a type Delta has not; empty if it can hold it."""
    types = pa.types
    if types.is_dictionary(kind):
        return _unfit(kind.value_type)
    if types.is_struct(kind):
        return next(filter(None, (_unfit(kind.field(i).type) for i in range(kind.num_fields))), "")
    if types.is_map(kind):
        return _unfit(kind.key_type) or _unfit(kind.item_type)
    if types.is_list(kind) or types.is_large_list(kind):
        return _unfit(kind.value_type)
    if types.is_unsigned_integer(kind):
        return "unsigned whole numbers"
    if types.is_timestamp(kind):
        return "nanoseconds" if kind.unit == "ns" else ""
    fits = (
        types.is_signed_integer(kind)
        or kind in (pa.float32(), pa.float64(), pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
        or kind in (pa.bool_(), pa.date32())
        or types.is_decimal128(kind)
    )
    return "" if fits else "such type"


def _stored(schema: pa.Schema) -> pa.Schema:
    """With times of any zone as those of UTC, which is how Parquet holds them."""

    def utc(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_timestamp(kind):
            return pa.timestamp("us", "UTC" if kind.tz else None)
        if pa.types.is_struct(kind):
            return pa.struct([each.with_type(utc(each.type)) for each in kind])
        if pa.types.is_map(kind):
            return pa.map_(utc(kind.key_type), utc(kind.item_type))
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return pa.list_(kind.value_field.with_type(utc(kind.value_type)))
        return kind

    return pa.schema([pa.field(each.name, utc(each.type), each.nullable) for each in schema])
