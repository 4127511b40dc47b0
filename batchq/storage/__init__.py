"""URIs: list, read, create once, publish. The only package that touches a store.

A URI is a local path or s3://bucket/key, gs://bucket/key, az://container/key. Remote stores go through obstore, local
files through the operating system: a killed local "create" of obstore leaves strays beside the final name, and readers
count those twice. Credentials come from the environment or the provider's own chain, never from a URI.

Every function raises errors of one line that name the URI: NotFound, Changed, AlreadyExists, NoConditionalWrites, or
StorageError for a store that failed after its retries; ConfigError for a URI that isn't one.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from batchq.errors import AlreadyExists, ConfigError, NotFound, StorageError
from batchq.storage import local, remote, remote_listing
from batchq.storage.faults import overwrites, translated
from batchq.storage.local import folder_of, identities, sync
from batchq.storage.names import Listing, Stat, is_remote, join, local_path, normalize, same, timed
from batchq.storage.patterns import Pattern, before_wildcards

if TYPE_CHECKING:
    from typing import TypeAlias

    import pyarrow as pa

    Data: TypeAlias = bytes | bytearray | memoryview | pa.Buffer

__all__ = [
    "CHECKED_READS",
    "Listing",
    "Stat",
    "create",
    "delete",
    "delete_prefix",
    "exists",
    "fetch_tree",
    "folder_of",
    "folders",
    "glob",
    "identities",
    "is_remote",
    "join",
    "list_objects",
    "normalize",
    "open_read",
    "peek",
    "publish_tree",
    "put",
    "read",
    "read_checked",
    "read_json",
    "require_create_only",
    "same",
    "stat",
    "sync",
    "timed",
    "written_at",
]

CHECKED_READS = 3  # of an object that doesn't pass its own check
COPY_THREADS = 4

T = TypeVar("T")


# ---- list and look ----


def list_objects(prefix_uri: str) -> Iterator[Stat]:
    """Every object below a prefix or folder, at any depth, sorted by uri; a prefix that isn't there has none."""
    return iter(sorted(_listed(prefix_uri), key=lambda each: each.uri))


def glob(pattern: str, marks: re.Pattern[str] | None = None) -> Listing:
    """One object, a folder's objects at any depth, or what a pattern of * ** ? [] matches.

    A folder, also one that a pattern matches, means all that is below it. Hidden names (patterns.HIDDEN) are passed
    over unless they are named. Of a store, the listing's marks are the URIs at any depth below its root in which
    `marks` is found; who wants them of a local folder asks `peek`. Raises NotFound if a name without wildcards is
    absent.
    """
    uri = normalize(pattern)
    if is_remote(uri):
        return _remote_glob(uri, pattern.endswith("/"), marks)
    if before_wildcards(uri) == uri or os.path.lexists(uri):  # a name may hold a bracket
        if not os.path.isdir(uri):
            return Listing(uri[: uri.rindex("/")], [local.look(uri)])
        return local.search(Pattern(uri, is_folder=True))
    return local.search(Pattern(uri, is_folder=False))


def _remote_glob(uri: str, is_folder: bool, marks: re.Pattern[str] | None) -> Listing:
    literal = before_wildcards(uri)
    if literal.count("/") < 3 and literal != uri:
        raise ConfigError(f"{uri}: a bucket's name can't be a pattern")
    one = None if is_folder else _stat_if_there(uri)
    if one and one.size:
        return Listing(uri[: uri.rindex("/")], [one])
    # An object of no bytes may be the marker of a folder: those of Azure's data lakes have the folder's own name.
    listing = remote_listing.search(Pattern(uri, is_folder=one is not None or literal == uri), marks)
    if one and not listing.found:
        return Listing(uri[: uri.rindex("/")], [one])
    if literal == uri and not (listing.found or listing.hidden or listing.special):
        raise NotFound(f"{uri}: no such file, folder or object")
    return listing


def folders(prefix_uri: str) -> list[str]:
    """Names of the folders directly below a prefix or folder, sorted; one that isn't there has none."""
    prefix = normalize(prefix_uri)
    return sorted(remote_listing.folders(prefix) if is_remote(prefix) else local.folders(prefix))


def peek(folder: str) -> list[str]:
    """Names of some objects in a folder, or below it; one that isn't there, or mustn't be listed, has none."""
    return remote_listing.peek(folder) if is_remote(folder) else local.peek(folder)


def stat(uri: str) -> Stat:
    """Size and etag of one object. Raises NotFound."""
    return remote.stat(uri) if is_remote(uri) else local.stat(uri)


def written_at(uri: str) -> float:
    """When an object was written, in seconds since 1970 by the store's own clock. Raises NotFound."""
    return remote.written_at(uri) if is_remote(uri) else local.written_at(uri)


def exists(uri: str) -> bool:
    """Whether an object (not a folder) of that name is there."""
    return _stat_if_there(uri) is not None


def _stat_if_there(uri: str) -> Stat | None:
    try:
        return stat(uri)
    except NotFound:
        return None


def _listed(prefix_uri: str) -> Iterator[Stat]:
    """Every object below a prefix, in the store's order."""
    prefix = normalize(prefix_uri)
    return remote_listing.listed(prefix) if is_remote(prefix) else local.listed(prefix)


# ---- read ----


def read(
    uri: str,
    start: int | None = None,
    length: int | None = None,
    *,
    suffix: int | None = None,
    etag: str | None = None,
) -> bytes:
    """The whole object, `length` bytes from `start` (fewer at its end), or its last `suffix` bytes.

    Raises NotFound, and Changed if `etag` is given and the object is another one now.
    """
    if not is_remote(uri) or (suffix is not None and uri.startswith("az://")):  # Azure has no suffix ranges
        with open_read(uri, etag=etag) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(start or 0 if suffix is None else max(0, size - suffix))
            return file.read(-1 if length is None else length)
    return remote.read(uri, start, length, suffix, etag)


def read_checked(uri: str, parse: Callable[[bytes], T], *, suffix: int | None = None) -> T:
    """What `parse` makes of an object that carries its own check. Bytes that it refuses with a ValueError are read
    again, because they may have been damaged on their way; raises the ValueError of the last time."""
    for attempt in range(CHECKED_READS):
        try:
            return parse(read(uri, suffix=suffix))
        except ValueError:
            if attempt == CHECKED_READS - 1:
                raise
    raise AssertionError("unreachable")


def read_json(uri: str, parse: Callable[[bytes], dict[str, Any]] = json.loads) -> dict[str, Any]:
    """A small record. Raises NotFound, and StorageError if it is no JSON, or not what `parse` takes."""
    try:
        return read_checked(uri, parse)
    except ValueError as error:
        raise StorageError(f"{uri}: is damaged; move it away and run again") from error


def open_read(uri: str, *, etag: str | None = None) -> BinaryIO:
    """Open one object for reading and seeking; memory stays within MAX_RANGE, whatever its size.

    A remote file reads in ranges that grow while it is read in order; each asks for the same etag, and one that breaks
    off is asked for again from its start. Raises NotFound, and Changed, at once or on a later read.
    """
    return remote.open_read(uri, etag) if is_remote(uri) else local.open_read(uri, etag)


# ---- write ----


def create(uri: str, data: Data, staging: str | None = None) -> Stat:
    """Write an object whole, only if the name is free.

    Raises AlreadyExists if it is taken; after a lost reply the object there may be ours: read it back. Any other
    StorageError leaves open whether it was written.

    A local file is written and synced under `staging` and then hard-linked to its name, so that a writer killed at any
    moment leaves nothing at or beside the name. `staging` is a folder on the same file system; None takes .tmp in the
    file's own folder, which listings leave out.
    """
    view = memoryview(data).cast("B")
    return remote.create(uri, view) if is_remote(uri) else local.create(uri, view, staging)


def put(uri: str, data: Data) -> Stat:
    """Write an object whole, replacing what is there; readers see the old one or the new one. For one owner's files."""
    view = memoryview(data).cast("B")
    return remote.put(uri, view) if is_remote(uri) else local.put(uri, view)


def require_create_only(uri: str, data: Data, staging: str | None = None) -> None:
    """Prove that the store refuses a second create: try it on an object that `create` has just made of `data`.

    `staging` as in `create`. Raises NoConditionalWrites if the store accepts.
    """
    try:
        create(uri, data, staging)
    except AlreadyExists:
        return
    raise overwrites(uri)


def delete(uri: str) -> None:
    """Remove one object; nothing happens if it isn't there."""
    if is_remote(uri):
        remote.delete(uri)
    else:
        local.delete(uri)


def delete_prefix(prefix_uri: str) -> None:
    """Remove every object below a prefix or folder, and a local folder itself, unless somebody writes there meanwhile.

    Raises ConfigError for a whole bucket or file system.
    """
    prefix = normalize(prefix_uri)
    if is_remote(prefix):
        remote.delete_prefix(prefix)
    else:
        local.delete_folder(prefix)


# ---- folders of large files ----


def fetch_tree(prefix_uri: str, folder: Path) -> None:
    """Copy every object below a prefix into a local folder, streamed, each file whole or not there.

    Raises NotFound if there is none.
    """
    prefix = normalize(prefix_uri)
    objects = list(_listed(prefix))
    if not objects:
        raise NotFound(f"{prefix}: no objects there")

    def fetch(obj: Stat) -> None:
        target = folder / obj.uri[len(prefix) + 1 :]
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with open_read(obj.uri, etag=obj.etag) as source, translated(str(target)):
                with partial.open("wb") as copy:
                    shutil.copyfileobj(source, copy, remote.MAX_RANGE)
                partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    with ThreadPoolExecutor(COPY_THREADS) as threads:
        list(threads.map(fetch, objects))


def publish_tree(folder: Path, prefix_uri: str) -> None:
    """Copy every file below a local folder to a prefix, streamed, each object whole or not there; replaces."""
    root, prefix = local_path(str(folder)), normalize(prefix_uri)

    def publish(file: Stat) -> None:
        uri = join(prefix, file.uri[len(root) + 1 :])
        if is_remote(prefix):
            remote.upload(Path(file.uri), uri)
        else:
            local.copy(file.uri, uri, join(os.path.dirname(prefix), local.STAGING))

    with ThreadPoolExecutor(COPY_THREADS) as threads:
        list(threads.map(publish, list(_listed(root))))
