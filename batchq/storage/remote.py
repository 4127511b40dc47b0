"""Objects in a store, by way of obstore: ranges, conditional puts, and what is asked again."""

from __future__ import annotations

import io
import random
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from batchq.errors import ConfigError, NotFound, StorageError
from batchq.storage import failpoint
from batchq.storage.clients import client, quoted
from batchq.storage.faults import changed, overwrites, translated
from batchq.storage.names import Stat, split
from batchq.storage.remote_listing import listed

ATTEMPTS = 6  # at a body that breaks off, or a create that the store calls contended; above the library's own retries
MIN_RANGE = 64 * 1024  # bytes of a request after a seek: a Parquet footer
MAX_RANGE = 16 * 1024 * 1024  # bytes of a request in a sequential read; also the memory an open file holds


# ---- look and read ----


def stat(uri: str) -> Stat:
    with translated(uri):
        import obstore
        from obstore.exceptions import GenericError, PermissionDeniedError

        store, key = client(uri)
        if not key:
            raise NotFound(f"{uri}: a bucket, not an object")
        try:
            meta = obstore.head(store, key)
        except (GenericError, PermissionDeniedError):
            obstore.get(store, key, options={"range": (0, 1)})  # says why: a HEAD's reply has no body
            raise
        return Stat(uri, meta["size"], quoted(meta["e_tag"]))


def written_at(uri: str) -> float:
    with translated(uri):
        import obstore

        return obstore.head(*client(uri))["last_modified"].timestamp()


def read(uri: str, start: int | None, length: int | None, suffix: int | None, etag: str | None) -> bytes:
    """One request; see `storage.read`."""
    if length == 0 or suffix == 0:
        return b""
    options: dict[str, Any] = {"if_match": etag} if etag else {}
    if suffix is not None:
        options["range"] = {"suffix": suffix}
    elif length is not None:
        options["range"] = (start or 0, (start or 0) + length)
    elif start:
        options["range"] = {"offset": start}
    with translated(uri):
        return bytes(_get(uri, options))


def open_read(uri: str, etag: str | None) -> BinaryIO:
    obj = stat(uri)
    if etag and obj.etag != etag:
        raise changed(uri)
    return io.BufferedReader(_RangeFile(obj), buffer_size=MIN_RANGE)


class _RangeFile(io.RawIOBase):
    """A remote object as a file: one block in memory, requested with If-Match."""

    def __init__(self, obj: Stat) -> None:
        super().__init__()
        self._object = obj
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
        with translated(self._object.uri):
            block = _get(self._object.uri, options)
        if len(block) != stop - self._position:
            raise StorageError(f"{self._object.uri}: the store sent {len(block)} of {stop - self._position} bytes")
        self._block, self._block_start = block, self._position


def _get(uri: str, options: Any) -> memoryview:
    """One GET, asked again if its body breaks off: the library retries a request, not a body that has begun."""
    import obstore
    from obstore.exceptions import GenericError

    store, key = client(uri)
    for attempt in range(ATTEMPTS):
        result = obstore.get(store, key, options=options)
        try:
            return memoryview(result.bytes())
        except GenericError:
            if attempt == ATTEMPTS - 1:
                raise
            _back_off(attempt)
    raise AssertionError("unreachable")


# ---- write and delete ----


def create(uri: str, view: memoryview) -> Stat:
    """One conditional PUT. A store also refuses one that raced another (409), and then the name may still be free."""
    import obstore
    from obstore.exceptions import AlreadyExistsError, GenericError

    for attempt in range(ATTEMPTS):
        with translated(uri):
            store, key = client(uri)
            try:
                failpoint.reach("storage.create.before_put")
                result = obstore.put(store, key, view, mode="create", use_multipart=False)
                failpoint.reach("storage.create.after_put")
                return Stat(uri, len(view), quoted(result["e_tag"]))
            except AlreadyExistsError:
                with suppress(NotFound):
                    stat(uri)
                    raise
            except NotImplementedError:  # a user's AWS_CONDITIONAL_PUT=disabled
                raise overwrites(uri) from None
            except GenericError as error:  # if it was the reply that was lost, the next one finds the name taken
                if not (_arrived_damaged(error) or _unanswered(error)) or attempt == ATTEMPTS - 1:
                    raise
        _back_off(attempt)
    raise StorageError(f"{uri}: the store refuses to create it, though nothing is there")


def put(uri: str, view: memoryview) -> Stat:
    with translated(uri):
        failpoint.reach("storage.put.before_put")
        result = _overwrite(uri, view)
        failpoint.reach("storage.put.after_put")
        return result


def _overwrite(uri: str, view: memoryview) -> Stat:
    import obstore
    from obstore.exceptions import GenericError

    store, key = client(uri)
    for attempt in range(ATTEMPTS):
        try:
            result = obstore.put(store, key, view, mode="overwrite", use_multipart=False)
            return Stat(uri, len(view), quoted(result["e_tag"]))
        except GenericError as error:
            if not _arrived_damaged(error) or attempt == ATTEMPTS - 1:
                raise
        _back_off(attempt)
    raise AssertionError("unreachable")


def upload(path: Path, uri: str) -> None:
    """Copy a file, streamed, replacing what is there."""
    import obstore

    store, key = client(uri)
    with translated(uri):
        obstore.put(store, key, path, chunk_size=MAX_RANGE, max_concurrency=2)


def delete(uri: str) -> None:
    with translated(uri), suppress(FileNotFoundError):
        _delete(uri, split(uri)[2])


def delete_prefix(prefix: str) -> None:
    """Remove every object below a prefix, except a whole bucket's."""
    if not split(prefix)[2]:
        raise ConfigError(f"{prefix}: refusing to delete a whole bucket")
    keys = [split(each.uri)[2] for each in listed(prefix) if not each.error]
    failpoint.reach("storage.delete_prefix.listed")
    with translated(prefix), suppress(FileNotFoundError):
        _delete(prefix, keys)


def _delete(uri: str, keys: str | list[str]) -> None:
    import obstore
    from obstore.exceptions import GenericError

    for attempt in range(ATTEMPTS):
        try:
            obstore.delete(client(uri)[0], keys)
            return
        except GenericError as error:
            if not _unanswered(error) or attempt == ATTEMPTS - 1:
                raise
        _back_off(attempt)


# ---- asking again ----


def _arrived_damaged(error: Exception) -> bool:
    """Whether the store refused bytes because they aren't those that were sent: nothing is written, send them again.
    The library doesn't, because the answer is a 400."""
    return re.search("BadDigest|XAmzContentSHA256Mismatch|XAmzContentChecksumMismatch", str(error)) is not None


def _unanswered(error: Exception) -> bool:
    """Whether the connection broke before a reply came, so that nobody knows whether it was done. The library asks
    again only where that doesn't matter, and for a conditional put and a delete it does."""
    return re.search("kind: (Interrupted|Timeout)", str(error)) is not None


def _back_off(attempt: int) -> None:
    time.sleep(random.uniform(0, 0.1 * 2**attempt))
