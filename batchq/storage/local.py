"""Local files, by way of the operating system: whole or not there at their names, whenever a writer is killed."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from batchq.errors import ConfigError, NoConditionalWrites, NotFound
from batchq.storage import failpoint
from batchq.storage.faults import changed, taken, translated
from batchq.storage.names import Stat, local_path

BUFFER = 64 * 1024  # bytes of a read: as many as of a remote file's first
STAGING = ".tmp"  # this module's own folder for files under way; listings leave it out
NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}  # what link() says on FAT, FUSE and others


def stat(uri: str) -> Stat:
    path = local_path(uri)
    with translated(uri):
        status = os.stat(path)
        if not os.path.isfile(path):
            raise NotFound(f"{path}: not a file")
        return _stat_of(path, status)


def open_read(uri: str, etag: str | None) -> BinaryIO:
    with translated(uri):
        file = open(local_path(uri), "rb", buffering=BUFFER)  # noqa: SIM115, it is handed to the caller
    if etag and _stat_of(uri, os.fstat(file.fileno())).etag != etag:
        file.close()
        raise changed(uri)
    return file


def create(uri: str, view: memoryview, staging: str | None) -> Stat:
    """Hard-link to the name what was written and synced under `staging`."""
    final = local_path(uri)
    with translated(uri), _staged(final, view, staging) as temporary:
        try:
            try:
                os.link(temporary, final)
            except FileNotFoundError:  # a folder that was empty is gone: another writer cleaned up behind itself
                _make_folder(os.path.dirname(final))
                os.link(temporary, final)
        except FileExistsError:
            raise taken(uri) from None
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            raise NoConditionalWrites(
                f"{uri}: this file system has no hard links, so a second run could overwrite the first; "
                "choose an output on a local disk or in an object store"
            ) from error
        failpoint.reach("storage.create.linked")
        sync(os.path.dirname(final))
        failpoint.reach("storage.create.folder_synced")
        return _stat_of(final, os.stat(final))


def put(uri: str, view: memoryview) -> Stat:
    final = local_path(uri)
    with translated(uri), _staged(final, view, None) as temporary:
        os.replace(temporary, final)
        failpoint.reach("storage.put.replaced")
        sync(os.path.dirname(final))
        return _stat_of(final, os.stat(final))


def copy(source: str, final: str, staging: str) -> None:
    """Copy a file, replacing what is there."""
    with translated(final), _staged(final, None, staging) as temporary:
        shutil.copyfile(source, temporary)
        sync(temporary)
        os.replace(temporary, final)


def delete(uri: str) -> None:
    with translated(uri), suppress(FileNotFoundError):
        os.unlink(local_path(uri))


def delete_folder(path: str) -> None:
    """Remove files and empty folders below a folder, and it. A file that appears meanwhile stays, and its folders."""
    if path == "/":
        raise ConfigError("/: refusing to delete a whole file system")
    with translated(path):
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


def sync(path: str | Path) -> None:
    """Put a file's bytes, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def listed(folder: str) -> Iterator[Stat]:
    """Every file below a folder, at any depth."""
    with translated(folder):
        yield from _walk(folder, ())


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[Stat]:
    """Files below a folder, following links; `above` are the folders that led here, so that a loop ends."""
    try:
        entries = list(os.scandir(folder))
        status = os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    if (identity := (status.st_dev, status.st_ino)) in above:
        return
    for entry in entries:
        if entry.is_dir():
            if entry.name != STAGING:
                yield from _walk(entry.path, (*above, identity))
            continue
        try:
            yield _stat_of(entry.path, entry.stat())
        except FileNotFoundError:
            if entry.is_symlink():
                raise NotFound(f"{entry.path}: a link to a file that isn't there") from None
            # else it went between the listing and the look: another process's temporary file


def _stat_of(path: str, status: os.stat_result) -> Stat:
    return Stat(path, status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}")


@contextmanager
def _staged(final: str, view: memoryview | None, staging: str | None) -> Iterator[str]:
    """A temporary file of these bytes (None: yet to be written), synced, gone when the block ends."""
    folder = os.path.dirname(final)
    _make_folder(folder)
    staging = os.path.join(folder, STAGING) if staging is None else local_path(staging)
    _make_folder(staging)
    temporary = os.path.join(staging, f"{os.path.basename(final)}.{uuid.uuid4().hex}")
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
    sync(os.path.dirname(path))
