"""Local files, by way of the operating system: whole or not there at their names, whenever a writer is killed."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import BinaryIO

from batchq.errors import ConfigError, NoConditionalWrites, NotFound, StorageError
from batchq.storage import failpoint
from batchq.storage.faults import changed, taken, translated
from batchq.storage.names import Listing, Stat, local_path, same
from batchq.storage.patterns import Pattern

BUFFER = 64 * 1024  # bytes of a read: as many as of a remote file's first
DENIED, NOWHERE = "permission denied", "a link that leads nowhere"
SPECIAL = "a pipe, a socket or a device, which isn't read; save what comes out of it to a file"
UNSEEN = {errno.EACCES: DENIED, errno.EPERM: DENIED, errno.ELOOP: "a link that leads back to itself"}
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
    if etag and not same(etag, _stat_of(uri, os.fstat(file.fileno())).etag):
        file.close()
        raise changed(uri)
    return file


def create(uri: str, view: memoryview, staging: str | None) -> Stat:
    """Hard-link to the name what was written and synced under `staging`."""
    final = local_path(uri)
    with translated(uri):
        with _staged(final, view, staging) as temporary:
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
        return _stat_of(final, os.stat(final))  # with its second name gone, which counts as a change


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


def written_at(path: str) -> float:
    stat(path)  # a folder is none
    with translated(path):
        return os.stat(path).st_mtime


def folders(path: str) -> list[str]:
    """Names of the folders directly below one, which need not be there."""
    with translated(path), suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
        return [entry.name for entry in entries if entry.name != STAGING and entry.is_dir()]
    return []


def listed(folder: str) -> Iterator[Stat]:
    """Every file below a folder, at any depth. Raises StorageError for one that can't be looked at."""
    with translated(folder):
        for path, status in _walk(folder, (), lambda entry: entry.name != STAGING):
            if isinstance(status, str):
                raise StorageError(f"{path}: {status}")
            if S_ISREG(status.st_mode):
                yield _stat_of(path, status)


def search(pattern: Pattern) -> Listing:
    """The files that a pattern means. Folders that can't hold one aren't opened, and other names aren't looked at."""
    listing, skipped = Listing(pattern.root, []), len(pattern.root) + 1

    def wanted(entry: os.DirEntry[str]) -> bool:
        name = entry.path[skipped:]
        if pattern.means(name) or pattern.enters(name):
            return True
        if hidden := pattern.hidden(name, entry.is_dir(follow_symlinks=False)):
            listing.hidden.add(f"{pattern.root}/{hidden}")
        return False

    with translated(pattern.root):
        for path, status in _walk(pattern.root or "/", (), wanted):
            if not path.endswith("/") and not pattern.means(path[skipped:]):
                continue  # entered because it might have been a folder
            if isinstance(status, str):
                listing.found.append(Stat(path, 0, "", status))
            elif S_ISREG(status.st_mode):
                listing.found.append(_readable(_stat_of(path, status)))
            else:
                listing.special.add(path)
    listing.found.sort(key=lambda each: each.uri)
    return listing


def look(path: str) -> Stat:
    """What a listing has of a file, a link, or what else has this name. Raises NotFound if nothing has."""
    with translated(path):
        try:
            status = os.stat(path)
        except FileNotFoundError:
            os.lstat(path)
            return Stat(path, 0, "", NOWHERE)
    return _readable(_stat_of(path, status)) if S_ISREG(status.st_mode) else Stat(path, 0, "", SPECIAL)


def peek(folder: str) -> list[str]:
    """Names in a folder; one that isn't there, or mustn't be read, has none."""
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        return os.listdir(folder)
    return []


def identities(path: str) -> list[tuple[int, int]]:
    """What tells folders apart, however they are spelt: of a folder, links followed, and of each above it. Of what
    isn't there nothing."""
    found, path = list[tuple[int, int]](), os.path.realpath(path)
    while os.path.exists(path):
        status = os.stat(path)
        found.append((status.st_dev, status.st_ino))
        if path == (path := os.path.dirname(path)):
            break
    return found


def folder_of(path: str) -> str:
    """The folder that a file lies in; if it is a link, the one of what it leads to."""
    return os.path.dirname(os.path.realpath(path) if os.path.islink(path) else path)


def _walk(
    folder: str, above: tuple[tuple[int, int], ...], wanted: Callable[[os.DirEntry[str]], bool]
) -> Iterator[tuple[str, os.stat_result | str]]:
    """Paths below a folder and their status, following links; in words, if it can't be had. `above` are the folders
    that led here, so that a loop ends; what isn't `wanted` isn't looked at."""
    try:
        status = os.stat(folder)
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError:
        yield f"{folder}/", DENIED
        return
    if (identity := (status.st_dev, status.st_ino)) in above:
        return
    for entry in filter(wanted, entries):
        try:
            status = entry.stat()
        except FileNotFoundError:  # a file that went meanwhile is another process's temporary one
            if entry.is_symlink():
                yield entry.path, NOWHERE
            continue
        except OSError as error:
            if error.errno not in UNSEEN:
                raise
            yield entry.path, UNSEEN[error.errno]
            continue
        if S_ISDIR(status.st_mode):
            yield from _walk(entry.path, (*above, identity), wanted)
        else:
            yield entry.path, status


def _stat_of(path: str, status: os.stat_result) -> Stat:
    return Stat(path, status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ctime_ns:x}")


def _readable(stat: Stat) -> Stat:
    """With an error, if it can't be read."""
    try:
        stat.uri.encode()
    except UnicodeEncodeError:
        return Stat(stat.uri, 0, "", "its name isn't UTF-8")
    return stat if os.access(stat.uri, os.R_OK, effective_ids=True) else Stat(stat.uri, 0, "", DENIED)


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
