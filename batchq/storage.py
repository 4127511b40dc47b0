"""URIs: list, read, create once, publish. The only module that touches a store.

A URI is a local path or s3://bucket/key, gs://bucket/key, az://container/key. Remote stores go through obstore, local
files through the operating system: a killed local "create" of obstore leaves strays beside the final name, and readers
count those twice. Credentials come from the environment or the provider's own chain, never from a URI.

Every function raises errors of one line that name the URI: NotFound, Changed, AlreadyExists, NoConditionalWrites, or
StorageError for a store that failed after its retries; ConfigError for a URI that isn't one.
"""

from __future__ import annotations

import errno
import glob as globbing
import io
import json
import os
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import unquote

from batchq import failpoint
from batchq.errors import (
    AlreadyExists,
    Changed,
    ConfigError,
    NoConditionalWrites,
    NotFound,
    StorageError,
)

if TYPE_CHECKING:
    from typing import TypeAlias

    import pyarrow as pa
    from obstore.store import ClientConfig, ObjectStore

    Data: TypeAlias = bytes | bytearray | memoryview | pa.Buffer

SCHEMES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}  # and the prefix of its settings in the environment
TIMEOUT = "600s"  # of one request; the library's 30 s fail a slow link
CHECKED_READS = 3  # of an object that doesn't pass its own check
ATTEMPTS = 6  # at a body that breaks off, or a create that the store calls contended; above the library's own retries
MIN_RANGE = 64 * 1024  # bytes of a request after a seek: a Parquet footer
MAX_RANGE = 16 * 1024 * 1024  # bytes of a request in a sequential read; also the memory an open file holds
COPY_THREADS = 4
STAGING = ".tmp"  # this module's own folder for local files under way; listings leave it out
NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}  # what link() says on FAT, FUSE and others

T = TypeVar("T")

_MAGIC = re.compile(r"[*?\[]")
_METADATA = re.compile(r"://[^/]+/latest/(api/token|meta-data)")  # where the provider looks last for credentials
_SIGNED = re.compile(r"[?&](X-(Amz|Goog)-\w+|AWSAccessKeyId|Signature|sig|sv|token)=", re.IGNORECASE)
_VISIBLE = r"(?![._])[^/]+"  # a path component that a wildcard may stand for: Spark's rule


@dataclass(frozen=True, slots=True)
class Stat:
    """An object as it is now. A local file's etag is its time of change and size: an inode is not the same number on
    every machine that mounts a file system."""

    uri: str
    size: int  # bytes
    etag: str


# ---- names ----


def is_remote(uri: str) -> bool:
    """Whether `uri` names an object store rather than a local file."""
    return "://" in uri and not uri.startswith("file://")


def normalize(uri: str) -> str:
    """One spelling of a URI: an absolute local path (from ~, relative or file://), or a remote URI; no final slash.

    Raises ConfigError for an unknown scheme, a missing bucket, or credentials in the URI.
    """
    if is_remote(uri):
        scheme, bucket, key = _split(uri)
        return f"{scheme}://{bucket}/{key}" if key else f"{scheme}://{bucket}"
    return _local(uri)


def join(base: str, *parts: str) -> str:
    """`parts` below `base`, with single slashes between."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


# ---- list and look ----


def list_objects(prefix_uri: str) -> Iterator[Stat]:
    """Every object below a prefix or folder, at any depth, sorted by uri; a prefix that isn't there has none."""
    return iter(sorted(_listed(prefix_uri), key=lambda found: found.uri))


def glob(pattern: str) -> list[Stat]:
    """One object, a folder's objects at any depth, or what a pattern of * ** ? [] matches; sorted by uri.

    A folder, also one that a pattern matches, stands for what is below it. Folders leave out, and wildcards don't
    match, names that begin with a dot or an underscore. Raises NotFound if a name without wildcards is absent.
    """
    uri = normalize(pattern)
    literal = _MAGIC.split(uri)[0]
    if literal == uri or exists(uri):  # a name may hold a bracket
        return _one_or_folder(uri, folder_first=pattern.endswith("/"))
    root = literal[: literal.rindex("/")]
    wanted = _pattern(uri[len(root) + 1 :])
    return [found for found in _candidates(uri, root) if wanted.fullmatch(found.uri[len(root) + 1 :])]


def root_of(pattern: str, found: list[Stat]) -> str:
    """The folder that the names of what `glob` found are relative to: the file's own, the folder itself, or the part of
    the pattern before its wildcards."""
    uri = normalize(pattern)
    if any(each.uri == uri for each in found):
        return uri[: uri.rindex("/")]
    literal = _MAGIC.split(uri)[0]
    if literal == uri or any(each.uri.startswith(uri + "/") for each in found):
        return uri
    return literal[: literal.rindex("/")]


def stat(uri: str) -> Stat:
    """Size and etag of one object. Raises NotFound."""
    with _errors(uri):
        if not is_remote(uri):
            path = _local(uri)
            found = os.stat(path)
            if not os.path.isfile(path):
                raise NotFound(f"{path}: not a file")
            return _local_stat(path, found)
        import obstore

        store, key = _store(uri)
        if not key:
            raise NotFound(f"{uri}: a bucket, not an object")
        meta = obstore.head(store, key)
        return Stat(uri, meta["size"], _etag(meta["e_tag"]))


def exists(uri: str) -> bool:
    """Whether an object (not a folder) of that name is there."""
    try:
        stat(uri)
    except NotFound:
        return False
    return True


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
    if length == 0 or suffix == 0:
        return b""
    options: dict[str, Any] = {"if_match": etag} if etag else {}
    if suffix is not None:
        options["range"] = {"suffix": suffix}
    elif length is not None:
        options["range"] = (start or 0, (start or 0) + length)
    elif start:
        options["range"] = {"offset": start}
    with _errors(uri):
        return bytes(_get(uri, options))


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
        found = read_checked(uri, parse)
    except ValueError as error:
        raise StorageError(f"{uri}: is damaged; move it away and run again") from error
    return found


def open_read(uri: str, *, etag: str | None = None) -> BinaryIO:
    """Open one object for reading and seeking; memory stays within MAX_RANGE, whatever its size.

    A remote file reads in ranges that grow while it is read in order; each asks for the same etag, and one that breaks
    off is asked for again from its start. Raises NotFound, and Changed, at once or on a later read.
    """
    if is_remote(uri):
        found = stat(uri)
        if etag and found.etag != etag:
            raise _changed(uri)
        return io.BufferedReader(_RangeFile(found), buffer_size=MIN_RANGE)
    with _errors(uri):
        file = open(_local(uri), "rb", buffering=MIN_RANGE)  # noqa: SIM115, it is handed to the caller
    if etag and _local_stat(uri, os.fstat(file.fileno())).etag != etag:
        file.close()
        raise _changed(uri)
    return file


class _RangeFile(io.RawIOBase):
    """A remote object as a file: one block in memory, requested with If-Match."""

    def __init__(self, found: Stat) -> None:
        super().__init__()
        self._object = found
        self._position = 0
        self._block = memoryview(b"")
        self._block_start = 0
        self._window = MIN_RANGE

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._object.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        into = memoryview(buffer).cast("B")
        if not len(into) or self._position >= self._object.size:
            return 0
        at = self._position - self._block_start
        if not 0 <= at < len(self._block):
            self._fetch(len(into))
            at = 0
        count = min(len(into), len(self._block) - at)
        into[:count] = self._block[at : at + count]
        self._position += count
        return count

    def _fetch(self, wanted: int) -> None:
        """Get the block that begins at the position: as much as is wanted, more while reading goes in order."""
        in_order = self._position == self._block_start + len(self._block)
        self._window = min(self._window * 2, MAX_RANGE) if in_order else MIN_RANGE
        stop = min(self._position + max(min(wanted, MAX_RANGE), self._window), self._object.size)
        self._block = memoryview(b"")  # let the old block go before the new one comes
        options: dict[str, Any] = {"range": (self._position, stop)}
        if self._object.etag:
            options["if_match"] = self._object.etag
        with _errors(self._object.uri):
            block = _get(self._object.uri, options)
        if len(block) != stop - self._position:
            raise StorageError(f"{self._object.uri}: the store sent {len(block)} of {stop - self._position} bytes")
        self._block, self._block_start = block, self._position


def _get(uri: str, options: Any) -> memoryview:
    """One GET, asked again if its body breaks off: the library retries a request, not a body that has begun."""
    import obstore
    from obstore.exceptions import GenericError

    store, key = _store(uri)
    for attempt in range(ATTEMPTS):
        result = obstore.get(store, key, options=options)
        try:
            return memoryview(result.bytes())
        except GenericError:
            if attempt == ATTEMPTS - 1:
                raise
            _back_off(attempt)
    raise AssertionError("unreachable")


# ---- write ----


def create(uri: str, data: Data, staging: str | None = None) -> Stat:
    """Write an object whole, only if the name is free.

    Raises AlreadyExists if it is taken; after a lost reply the object there may be ours: read it back. Any other
    StorageError leaves open whether it was written.

    A local file is written and synced under `staging` and then hard-linked to its name, so that a writer killed at any
    moment leaves nothing at or beside the name. `staging` is a folder on the same file system; None takes meta/tmp
    beside a folder named data, else .tmp in the file's own folder, which listings leave out.
    """
    view = memoryview(data).cast("B")
    if is_remote(uri):
        return _create_remote(uri, view)
    final = _local(uri)
    with _errors(uri), _staged(final, view, staging) as temporary:
        try:
            try:
                os.link(temporary, final)
            except FileNotFoundError:  # a folder that was empty is gone: another writer cleaned up behind itself
                _make_folder(os.path.dirname(final))
                os.link(temporary, final)
        except FileExistsError:
            raise _taken(uri) from None
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            raise NoConditionalWrites(
                f"{uri}: this file system has no hard links, so a second run could overwrite the first; "
                "choose an output on a local disk or in an object store"
            ) from error
        failpoint.reach("storage.create.linked")
        _sync(os.path.dirname(final))
        failpoint.reach("storage.create.folder_synced")
        return _local_stat(final, os.stat(final))


def put(uri: str, data: Data) -> Stat:
    """Write an object whole, replacing what is there; readers see the old one or the new one. For one owner's files."""
    view = memoryview(data).cast("B")
    with _errors(uri):
        if is_remote(uri):
            failpoint.reach("storage.put.before_put")
            result = _overwrite(uri, view)
            failpoint.reach("storage.put.after_put")
            return result
        final = _local(uri)
        with _staged(final, view, None) as temporary:
            os.replace(temporary, final)
            failpoint.reach("storage.put.replaced")
            _sync(os.path.dirname(final))
            return _local_stat(final, os.stat(final))


def require_create_only(uri: str, data: Data) -> None:
    """Prove that the store refuses a second create: try it on an object that `create` has just made of `data`.

    Raises NoConditionalWrites if the store accepts.
    """
    try:
        create(uri, data)
    except AlreadyExists:
        return
    raise _overwrites(uri)


def delete(uri: str) -> None:
    """Remove one object; nothing happens if it isn't there."""
    with _errors(uri), suppress(FileNotFoundError):
        if is_remote(uri):
            _delete_remote(uri, _store(uri)[1])
        else:
            os.unlink(_local(uri))


def delete_prefix(prefix_uri: str) -> None:
    """Remove every object below a prefix or folder, and a local folder itself, unless somebody writes there meanwhile.

    Raises ConfigError for a whole bucket or file system.
    """
    prefix = normalize(prefix_uri)
    if not is_remote(prefix):
        if prefix == "/":
            raise ConfigError("/: refusing to delete a whole file system")
        _delete_folder(prefix)
        return
    if not _split(prefix)[2]:
        raise ConfigError(f"{prefix}: refusing to delete a whole bucket")
    keys = [_split(found.uri)[2] for found in _listed(prefix)]
    failpoint.reach("storage.delete_prefix.listed")
    with _errors(prefix), suppress(FileNotFoundError):
        _delete_remote(prefix, keys)


# ---- folders of large files ----


def fetch_tree(prefix_uri: str, folder: Path) -> None:
    """Copy every object below a prefix into a local folder, streamed, each file whole or not there.

    Raises NotFound if there is none.
    """
    prefix = normalize(prefix_uri)
    objects = list(_listed(prefix))
    if not objects:
        raise NotFound(f"{prefix}: no objects there")

    def fetch(found: Stat) -> None:
        target = folder / found.uri[len(prefix) + 1 :]
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with open_read(found.uri, etag=found.etag) as source, _errors(str(target)):
                with partial.open("wb") as copy:
                    shutil.copyfileobj(source, copy, MAX_RANGE)
                partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    with ThreadPoolExecutor(COPY_THREADS) as threads:
        list(threads.map(fetch, objects))


def publish_tree(folder: Path, prefix_uri: str) -> None:
    """Copy every file below a local folder to a prefix, streamed, each object whole or not there; replaces."""
    root, prefix = _local(str(folder)), normalize(prefix_uri)

    def publish(found: Stat) -> None:
        uri = join(prefix, found.uri[len(root) + 1 :])
        if is_remote(prefix):
            import obstore

            store, key = _store(uri)
            with _errors(uri):
                obstore.put(store, key, Path(found.uri), chunk_size=MAX_RANGE, max_concurrency=2)
            return
        with _errors(uri), _staged(uri, None, join(os.path.dirname(prefix), STAGING)) as temporary:
            shutil.copyfile(found.uri, temporary)
            _sync(temporary)
            os.replace(temporary, uri)

    with ThreadPoolExecutor(COPY_THREADS) as threads:
        list(threads.map(publish, list(_listed(root))))


# ---- object stores ----


def _split(uri: str) -> tuple[str, str, str]:
    """scheme, bucket, key. The message of a refusal shows no more than the scheme: the rest may hold a secret."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme not in SCHEMES:
        raise ConfigError(f"{scheme}://: not a store that batchq knows; use a local path, s3://, gs:// or az://")
    if "@" in bucket:
        raise ConfigError(f"{scheme}://: credentials don't belong in a URI; set them in the environment")
    if _SIGNED.search(key):
        raise ConfigError(f"{scheme}://: a signed URI is a secret; give the plain one, and credentials by environment")
    if not bucket:
        raise ConfigError(f"{scheme}://: a bucket's name is missing, as in {scheme}://bucket/folder")
    return scheme, bucket, key.strip("/")


def _store(uri: str) -> tuple[ObjectStore, str]:
    scheme, bucket, key = _split(uri)
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith(SCHEMES[scheme])))
    return _connect(scheme, bucket, settings), key


def _etag(said: str | None) -> str:
    """With its quotes: Azure's listing leaves them out, where its other replies, and If-Match, have them."""
    return f'"{said}"' if said and not said.endswith('"') else said or ""


@lru_cache(maxsize=32)
def _connect(scheme: str, bucket: str, settings: tuple[tuple[str, str], ...]) -> ObjectStore:
    """One client a bucket; `settings`, the environment it was made in, makes a changed environment a new client."""
    from obstore.store import from_url

    client: ClientConfig = {"timeout": TIMEOUT}
    if any("ENDPOINT" in name and value.startswith("http://") for name, value in settings):
        client["allow_http"] = True
    config: Any = {}
    if scheme == "s3" and not any(name == "AWS_CHECKSUM_ALGORITHM" for name, _ in settings):
        config["checksum_algorithm"] = "SHA256"  # else a byte flipped on its way up is stored: seen in 20 of 20
    return from_url(f"{scheme}://{bucket}", client_options=client, config=config)


def _create_remote(uri: str, view: memoryview) -> Stat:
    """One conditional PUT. A store also refuses one that raced another (409), and then the name may still be free."""
    import obstore
    from obstore.exceptions import AlreadyExistsError, GenericError

    for attempt in range(ATTEMPTS):
        with _errors(uri):
            store, key = _store(uri)
            try:
                failpoint.reach("storage.create.before_put")
                result = obstore.put(store, key, view, mode="create", use_multipart=False)
                failpoint.reach("storage.create.after_put")
                return Stat(uri, len(view), _etag(result["e_tag"]))
            except AlreadyExistsError:
                if exists(uri):
                    raise
            except NotImplementedError:  # a user's AWS_CONDITIONAL_PUT=disabled
                raise _overwrites(uri) from None
            except GenericError as error:  # if it was the reply that was lost, the next one finds the name taken
                if not (_arrived_damaged(error) or _unanswered(error)) or attempt == ATTEMPTS - 1:
                    raise
        _back_off(attempt)
    raise StorageError(f"{uri}: the store kept refusing to create it, though nothing is there")


def _overwrite(uri: str, view: memoryview) -> Stat:
    import obstore
    from obstore.exceptions import GenericError

    store, key = _store(uri)
    for attempt in range(ATTEMPTS):
        try:
            result = obstore.put(store, key, view, mode="overwrite", use_multipart=False)
            return Stat(uri, len(view), _etag(result["e_tag"]))
        except GenericError as error:
            if not _arrived_damaged(error) or attempt == ATTEMPTS - 1:
                raise
        _back_off(attempt)
    raise AssertionError("unreachable")


def _arrived_damaged(error: Exception) -> bool:
    """Whether the store refused bytes because they aren't those that were sent: nothing is written, send them again.
    The library doesn't, because the answer is a 400."""
    return re.search("BadDigest|XAmzContentSHA256Mismatch|XAmzContentChecksumMismatch", str(error)) is not None


def _unanswered(error: Exception) -> bool:
    """Whether the connection broke before a reply came: done or not, nobody knows. The library asks again only where
    that can't matter to anybody, which leaves out a conditional put and a delete."""
    return re.search("kind: (Interrupted|Timeout)", str(error)) is not None


def _delete_remote(uri: str, keys: str | list[str]) -> None:
    import obstore
    from obstore.exceptions import GenericError

    for attempt in range(ATTEMPTS):
        try:
            obstore.delete(_store(uri)[0], keys)
            return
        except GenericError as error:
            if not _unanswered(error) or attempt == ATTEMPTS - 1:
                raise
        _back_off(attempt)


def _back_off(attempt: int) -> None:
    time.sleep(random.uniform(0, 0.1 * 2**attempt))


# ---- local files ----


def _local(uri: str) -> str:
    path = unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri
    return os.path.abspath(os.path.expanduser(path))


def _local_stat(path: str, found: os.stat_result) -> Stat:
    return Stat(path, found.st_size, f"{found.st_mtime_ns:x}-{found.st_size:x}")


@contextmanager
def _staged(final: str, view: memoryview | None, staging: str | None) -> Iterator[str]:
    """A temporary file of these bytes (None: yet to be written), synced, gone when the block ends."""
    folder = os.path.dirname(final)
    _make_folder(folder)
    if staging is None:
        parent, name = os.path.split(folder)
        staging = os.path.join(parent, "meta", "tmp") if name == "data" else os.path.join(folder, STAGING)
    _make_folder(_local(staging))
    temporary = os.path.join(_local(staging), f"{os.path.basename(final)}.{uuid.uuid4().hex}")
    try:
        if view is not None:
            with open(temporary, "wb", buffering=0) as file:
                failpoint.reach("storage.stage.opened")
                while view:
                    view = view[file.write(view) :]
                failpoint.reach("storage.stage.written")
                os.fsync(file.fileno())
            failpoint.reach("storage.stage.synced")
        yield temporary
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _make_folder(path: str) -> None:
    """Make a folder and those above it, so that they outlive a power cut."""
    if os.path.isdir(path):
        return
    _make_folder(os.path.dirname(path))
    with suppress(FileExistsError):
        os.mkdir(path)
    _sync(os.path.dirname(path))


def _delete_folder(path: str) -> None:
    """Remove files and empty folders below a folder, and it. A file that appears meanwhile stays, and its folders."""
    with _errors(path):
        for folder, folders, files in os.walk(path, topdown=False):
            for name in files:
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, name))
            for name in folders:  # a link to a folder, which rmdir leaves alone, goes; what it leads to stays
                with suppress(FileNotFoundError, NotADirectoryError):
                    if os.path.islink(link := os.path.join(folder, name)):
                        os.unlink(link)
            try:
                os.rmdir(folder)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise


def _sync(path: str) -> None:
    """Put a file's bytes, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- listing ----


def _listed(prefix_uri: str) -> Iterator[Stat]:
    """Every object below a prefix, in the store's order."""
    prefix = normalize(prefix_uri)
    if not is_remote(prefix):
        with _errors(prefix):
            yield from _walk(prefix, ())
        return
    import obstore

    scheme, bucket, key = _split(prefix)
    root = f"{scheme}://{bucket}/"
    with _errors(prefix):
        for chunk in obstore.list(_store(prefix)[0], key or None, chunk_size=10_000):
            for meta in chunk:
                if meta["path"] != key:  # a folder's own marker, which some tools leave
                    yield Stat(root + meta["path"], meta["size"], _etag(meta["e_tag"]))


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[Stat]:
    """Files below a folder, following links; `above` are the folders that led here, so that a loop ends."""
    try:
        entries = list(os.scandir(folder))
        here = os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    if (identity := (here.st_dev, here.st_ino)) in above:
        return
    for entry in entries:
        if entry.is_dir():
            if entry.name != STAGING:
                yield from _walk(entry.path, (*above, identity))
            continue
        try:
            yield _local_stat(entry.path, entry.stat())
        except FileNotFoundError:
            if entry.is_symlink():
                raise NotFound(f"{entry.path}: a link to a file that isn't there") from None
            # else it went between the listing and the look: another process's temporary file


def _visible(folder: str) -> Iterator[Stat]:
    below = re.compile(f"{_VISIBLE}(?:/{_VISIBLE})*")
    return (found for found in list_objects(folder) if below.fullmatch(found.uri[len(folder) + 1 :]))


def _one_or_folder(uri: str, folder_first: bool) -> list[Stat]:
    if not folder_first and exists(uri):
        return [stat(uri)]
    found = list(_visible(uri))
    if not found and (is_remote(uri) or not os.path.isdir(uri)):
        raise NotFound(f"{uri}: no such file, folder or object")
    return found


def _candidates(pattern: str, root: str) -> Iterator[Stat]:
    """What a pattern may match: for local files no more folders are opened than it needs."""
    if is_remote(pattern):
        yield from list_objects(root)
        return
    seen: set[str] = set()
    for path in sorted(globbing.glob(pattern, recursive=True)):
        for found in _visible(path) if os.path.isdir(path) else [stat(path)]:
            if found.uri not in seen:
                seen.add(found.uri)
                yield found


def _pattern(pattern: str) -> re.Pattern[str]:
    """A pattern, relative to its root, as an expression that also matches what is below a folder it matches."""
    parts = pattern.split("/")
    text = ""
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if part == "**":
            text += f"(?:{_VISIBLE}/)*" + (_VISIBLE if last else "")
        else:
            text += ("(?![._])" if part[:1] in ("*", "?", "[") else "") + _component(part) + ("" if last else "/")
    return re.compile(f"{text}(?:/{_VISIBLE})*")


def _component(part: str) -> str:
    text, position = "", 0
    while position < len(part):
        char = part[position]
        end = part.find("]", position + 2) if char == "[" else -1
        if end > 0:
            inside = part[position + 1 : end].replace("\\", r"\\").replace("[", r"\[")
            text += "[" + ("^/" + inside[1:] if inside[0] == "!" else inside.replace("^", r"\^")) + "]"
            position = end
        else:
            text += {"*": "[^/]*", "?": "[^/]"}.get(char) or re.escape(char)
        position += 1
    return text


# ---- errors ----


def _taken(uri: str) -> AlreadyExists:
    return AlreadyExists(f"{uri}: already exists")


def _overwrites(uri: str) -> NoConditionalWrites:
    return NoConditionalWrites(
        f"{uri}: this store lets a second create overwrite the first, so two runs could undo each other; "
        "choose a store that honours If-None-Match"
    )


def _changed(uri: str) -> Changed:
    return Changed(f"{uri}: was replaced since it was listed")


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Turn what a store or the operating system raises into one of ours, in one line."""
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"{uri}: no such file or object") from None
    except OSError as error:
        raise StorageError(f"{uri}: {error.strerror or type(error).__name__}") from error
    except Exception as error:
        if not type(error).__module__.startswith("obstore"):
            if isinstance(error, ValueError) and "Could not parse path" in str(error):
                raise StorageError(f"{uri}: not a name that object stores agree on") from None
            raise
        raise _remote_error(uri, error) from None  # its own text is a page of internals


def _remote_error(uri: str, error: Exception) -> StorageError:
    from obstore import exceptions as library

    reason = _reason(str(error))
    if isinstance(error, library.AlreadyExistsError):
        return _taken(uri)
    if isinstance(error, (library.PreconditionError, library.NotModifiedError)):
        return _changed(uri)
    if "NoSuchBucket" in reason:
        return NotFound(f"{uri}: no such bucket")
    if _METADATA.search(str(error)):
        return StorageError(f"{uri}: no credentials in the environment or from the provider (AWS_ACCESS_KEY_ID, ...)")
    if "error sending request" in reason:
        return StorageError(f"{uri}: the store can't be reached; is its endpoint right, and up?")
    if isinstance(error, (library.PermissionDeniedError, library.UnauthenticatedError)):
        return StorageError(f"{uri}: access denied ({reason}); check the credentials in the environment")
    return StorageError(f"{uri}: {reason}")


def _reason(text: str) -> str:
    """The store's own code and message, or the library's last words, without URLs: those may be signed."""
    text = text.partition("\n\nDebug source")[0]
    if said := re.search(r"<Code>(.*?)</Code>\s*<Message>(.*?)</Message>", text, re.DOTALL):
        text = f"{said[1]}: {said[2]}"
    else:
        text = re.sub(r"^Generic \w+ error: ", "", text.rpartition(" - ")[2])
    return re.sub(r"https?://\S+", "the store", " ".join(text.split()))[:200]
