"""A snapshot of an Iceberg table as input: its files, which batchq's own Parquet reader reads.

The table is read from a metadata file, by pyiceberg's models and batchq's own stores: no catalog is asked. Iceberg
knows columns by ids; a file in which an id has another name or type than in the table is refused, as are rows that
are deleted beside their files.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchq import storage
from batchq.errors import BatchqError, InputError
from batchq.input.snapshots import Snapshot, library, there
from batchq.records import InputObject

OPENED_AT_ONCE = 16
_METADATA = re.compile(r"v?(\d+)(?:-[^/]*)?(?:\.gz)?\.metadata\.json(?:\.gz)?")
_SCHEMES = ("file://", "file:")  # of places on disk, as writers spell them
_REMEDY = "write the rows to a new table, or name the columns that are read in input.columns"


def iceberg(path: str, version: int | None, columns: Collection[str] | None) -> Snapshot:
    """A snapshot of the table in a folder, or of a metadata file; None: its current one. `columns`: those that are
    read, None for all.

    Raises InputError if there is none, if files of it are gone, and for a table that its files don't tell right.
    """
    library("pyiceberg", "iceberg")
    location = _metadata_file(path)
    root = location.rpartition("/")[0].rpartition("/")[0]
    try:
        metadata = _parsed(location)
        if _uri(metadata.location) != root:
            raise InputError(
                f"{root}: has a file elsewhere, or was moved; the table says that it is in {metadata.location}; read "
                "it there, or write the rows to a new table"
            )
        snapshot = metadata.current_snapshot() if version is None else metadata.snapshot_by_id(version)
        if snapshot is None and version is not None:
            known = ", ".join(str(each.snapshot_id) for each in metadata.snapshots[-5:])
            raise InputError(f"input.version={version}: no snapshot of {location}; the latest are {known or 'none'}")
        schema = _schema(metadata, snapshot if version is not None else None)
        files = _data_files(root, snapshot) if snapshot else []
    except BatchqError:
        raise
    except Exception as error:  # whatever the library's models and Avro reader make of bytes that are none
        raise InputError(
            f"input.path={path}: {location} is no Iceberg table that can be read: {' '.join(str(error).split())[:300]}"
        ) from error
    words = f"Iceberg table, snapshot {snapshot.snapshot_id if snapshot else 'none'}"
    names = [_name_below(root, metadata.location, file) for file in files]
    found = there(root, words, names, "expire_snapshots")
    partitioned = {each.source_id for spec in metadata.partition_specs for each in spec.fields if _is_identity(each)}
    fields = [field for field in schema.fields if columns is None or field.name in columns]
    mapping = metadata.name_mapping()
    with ThreadPoolExecutor(OPENED_AT_ONCE) as threads:
        list(threads.map(lambda each: _refuse_columns(each, fields, partitioned, mapping), found))
    return Snapshot(words, found, frozenset(field.name for field in schema.fields), {})


def _metadata_file(path: str) -> str:
    """A metadata file: the one that is named, or the newest of the table in a folder, by its number."""
    named = storage.normalize(path)
    if named.endswith((".metadata.json", ".metadata.json.gz")):
        return named
    folder = storage.join(named, "metadata")
    numbered: dict[int, list[str]] = {}
    for stat in storage.list_objects(folder):
        if found := _METADATA.fullmatch(stat.uri.rpartition("/")[2]):
            numbered.setdefault(int(found[1]), []).append(stat.uri)
    if not numbered:
        raise InputError(
            f"input.path={path}: no Iceberg table there: no {folder}/*.metadata.json; name a table's folder, or its "
            "metadata file"
        )
    newest = numbered[max(numbered)]
    if len(newest) > 1:
        raise InputError(
            f"input.path={path}: {len(newest)} metadata files have the highest number, {max(numbered)}; name the one "
            f"that the catalog names, such as {min(newest)}"
        )
    return newest[0]


def _parsed(location: str) -> Any:
    from pyiceberg.table.metadata import TableMetadataUtil

    data = storage.read(location)
    return TableMetadataUtil.parse_raw((gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode())


def _schema(metadata: Any, snapshot: Any) -> Any:
    """The table's columns; with a snapshot, as they were then."""
    if snapshot is None or snapshot.schema_id is None:
        return metadata.schema()
    return next(each for each in metadata.schemas if each.schema_id == snapshot.schema_id)


class _File:
    """As the library reads a file."""

    def __init__(self, location: str) -> None:
        self._uri = _uri(location)

    def open(self, seekable: bool = True) -> BytesIO:
        return BytesIO(storage.read(self._uri))


class _Store:
    """As the library opens files; manifests are small."""

    def new_input(self, location: str) -> _File:
        return _File(location)


def _data_files(root: str, snapshot: Any) -> list[Any]:
    """Raises InputError for rows that are deleted beside their files, and for files that aren't plain Parquet."""
    from pyiceberg.manifest import FileFormat, ManifestContent

    store, found = _Store(), []
    for manifest in snapshot.manifests(store):
        entries = [entry.data_file for entry in manifest.fetch_manifest_entry(store, discard_deleted=True)]
        if entries and manifest.content == ManifestContent.DELETES:
            raise InputError(
                f"{root}: has delete files: rows that are deleted and still in its data files, which can't be read; "
                "rewrite_data_files (with delete-file-threshold=1) writes the files anew"
            )
        found += entries
    for file in found:
        if file.file_format != FileFormat.PARQUET or file.key_metadata:
            what = "encrypted" if file.key_metadata else file.file_format.name
            raise InputError(
                f"{root}: {file.file_path} is {what}, and only plain Parquet is read; write the rows to such a table"
            )
    return found


def _uri(location: str) -> str:
    for scheme in _SCHEMES:
        if location.startswith(scheme):
            return storage.normalize(location[len(scheme) :])
    return re.sub(r"^s3[an]://", "s3://", location)


def _name_below(root: str, location: str, file: Any) -> str:
    """A file's name in the table's folder. Raises InputError for one that lies elsewhere."""
    uri = _uri(file.file_path)
    if uri.startswith(f"{root}/"):
        return uri[len(root) + 1 :]
    moved = "; the table says that it is in " + location if _uri(location) != root else ""
    raise InputError(
        f"{root}: has a file elsewhere, {file.file_path}{moved}; write the rows to a table that has its files below "
        "its folder"
    )


def _is_identity(partition: Any) -> bool:
    from pyiceberg.transforms import IdentityTransform

    return isinstance(partition.transform, IdentityTransform)


def _refuse_columns(obj: InputObject, fields: list[Any], partitioned: set[int], mapping: Any) -> None:
    """Raises InputError if a file's columns aren't called and typed as the table's of the same ids."""
    from pyiceberg.io.pyarrow import pyarrow_to_schema

    with storage.open_read(obj.uri, etag=obj.etag) as file:
        try:
            arrow = pq.read_schema(file)
            own = pyarrow_to_schema(arrow, name_mapping=mapping, downcast_ns_timestamp_to_us=False)
        except (pa.ArrowException, ValueError, TypeError, NotImplementedError) as error:
            why = " ".join(str(error).split())[:300]
            raise InputError(f"{obj.uri}: its columns can't be told to be the table's: {why}") from error
    called = {field.name: field for field in own.fields}
    by_id = {field.field_id: field for field in own.fields}
    for field in fields:
        there, id = by_id.get(field.field_id), field.field_id
        if there is None and field.name in called:
            raise InputError(f"{obj.uri}: its column {field.name} is another one of that name; {_REMEDY}")
        if there is None and (field.initial_default is not None or id in partitioned):
            why = "a default" if field.initial_default is not None else "the partition's value"
            raise InputError(f"{obj.uri}: lacks column {field.name}, for which the table has {why}; {_REMEDY}")
        if there is not None and there.name != field.name:
            raise InputError(f"{obj.uri}: the table's column {field.name} is called {there.name} in it; {_REMEDY}")
        if there is not None and _type(there.field_type) != _type(field.field_type):
            raise InputError(
                f"{obj.uri}: the table's column {field.name} is {field.field_type}, and {there.field_type} in it; "
                + _REMEDY
            )


def _type(kind: Any) -> str:
    """A type with the names and ids of its parts, whether or not these may be null."""
    return re.sub(r"\b(?:required|optional) ", "", str(kind))
