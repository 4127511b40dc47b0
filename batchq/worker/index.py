"""Where each key's answer lies in a finished output: an index on disk, made once per machine for all processes there.

Three arrays, sorted by a key's first eight bytes: these, the four bytes after them, and the answer's ordinal among all
rows of the output: 16 bytes per answer. Each process maps them, so their pages are held once, however many processes
look keys up, and the system drops them where memory is short. They are made in little memory: keys go to 256 files by
their first byte, and each of these is sorted by itself. No text of a row is in an index.

An index belongs to the objects that it was made of. Whoever has one open holds a lock on it. When one is made, those go
that nobody has open and nobody has opened for KEPT_SECONDS; `clean` removes that of its run at once.
"""

from __future__ import annotations

import binascii
import fcntl
import json
import os
import shutil
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batchq import storage
from batchq.errors import ConfigError, StorageError
from batchq.machine.cache import BUILDING, build_once, cache_dir, is_writable
from batchq.machine.digests import digest_of
from batchq.output import objects, parts
from batchq.output.objects import Rows

AT_ONCE = 8  # parts whose keys are on their way
GROUP = 500_000  # keys between two writes, at least: 10 MB; a row group of a compacted object has up to a million
KEPT_SECONDS = 12 * 3600.0  # by the next night, that of the night before is gone
BYTES = 16  # of a key
HALVES = np.dtype([("first", ">u8"), ("second", ">u4"), ("rest", ">u4")])  # how a key is read
ENTRY = np.dtype([("first", "u8"), ("second", "u4"), ("place", "u8")])  # of a key, on its way to the index
FIELDS = ENTRY.names or ()
LOCK, STARTS = "lock", "starts.json"  # the other files of an index are called as ENTRY's fields
NARROW = 1 << 32  # rows of an output whose places take four bytes each


class Index:
    """One output's keys, opened. Thread-safe."""

    def __init__(self, output: str) -> None:
        """Make the index of all that is committed at `output`, unless this machine has it.

        Raises StorageError for a part that is damaged, ConfigError where no index can be written.
        """
        self.parts = objects.pieces(output)
        there = {each.uri: (each.size, each.etag) for each in storage.list_objects(objects.folder(output))}
        wanted = dict.fromkeys(rows.uri for rows in self.parts)
        if gone := next((uri for uri in wanted if uri not in there), None):
            raise StorageError(f"{gone}: was announced and isn't there")
        content = digest_of([[uri, *there[uri]] for uri in wanted])
        folder = _folder() / f"{_prefix(output)}{content[:24]}"
        while not self._opened(folder):
            if build_once(folder, self._build):
                remove_unused(KEPT_SECONDS)

    def __len__(self) -> int:
        """Keys; one that several rows have counts once."""
        return len(self._first)

    def find(self, keys: Sequence[str]) -> Iterator[tuple[int, Any, Any]]:
        """Where those of the keys that are known have their answers: for each part, its number, positions in `keys`,
        and the rows of the part."""
        if not keys or not len(self):
            return
        asked = np.frombuffer(bytes.fromhex("".join(keys)), HALVES)
        first = asked["first"].astype("u8")
        order = np.argsort(first)  # neighbours are looked for in the same pages
        at = np.empty(len(keys), np.int64)
        at[order] = np.searchsorted(self._first, first[order])
        at = np.minimum(at, len(self) - 1)
        # Keys that agree in 96 bits and differ don't happen by chance: 1e-13 among 100 million looked up in as many.
        hits = np.flatnonzero((self._first[at] == first) & (self._second[at] == asked["second"]))
        places = self._place[at[hits]].astype(np.int64)
        numbers = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(numbers).tolist():
            here = numbers == number
            yield number, hits[here], places[here] - self._starts[number]

    def _opened(self, folder: Path) -> bool:
        """Map the index and hold its lock; False if it isn't there, or was just being removed."""
        try:
            self._lock = (folder / LOCK).open()
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            with suppress(PermissionError):  # another user's, whose runs keep it
                os.utime(folder / LOCK)
            self._starts = np.array(json.loads((folder / STARTS).read_text()), np.int64)
            kinds = {**{name: ENTRY[name] for name in FIELDS}, "place": _place(int(self._starts[-1]))}
            self._first, self._second, self._place = (_mapped(folder / name, kinds[name]) for name in FIELDS)
        except FileNotFoundError:
            return False
        return True

    def _build(self, folder: Path) -> None:
        (folder / LOCK).touch()
        starts, held, count = [0], [], 0
        for entries, rows in _ahead(self.parts):
            entries["place"] += starts[-1]
            starts.append(starts[-1] + rows)
            held.append(entries)
            count += len(entries)
            if count >= GROUP:
                _deal(_sorted(np.concatenate(held)), folder)
                held, count = [], 0
        if held:
            _deal(_sorted(np.concatenate(held)), folder)
        (folder / STARTS).write_text(json.dumps(starts))
        _join(folder, _place(starts[-1]))


def remove_unused(seconds: float, output: str = "") -> int:
    """Remove the indexes, of one output or of all, that no process has open and none has opened for so long; returns
    how many bytes they had."""
    size = 0
    for folder in _folder().glob(f"{_prefix(output) if output else ''}*/"):
        with suppress(OSError), (folder / LOCK).open() as file:  # in use, another user's, or removed meanwhile
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(file.fileno()).st_mtime >= seconds:
                size += sum(path.stat().st_size for path in folder.iterdir())
                gone = folder.rename(folder.parent / BUILDING / f"{folder.name}.{uuid.uuid4().hex}")
                shutil.rmtree(gone)
    return size


def _folder() -> Path:
    """In the cache; where that can only be read, among temporary files."""
    folder = cache_dir() / "reuse"
    if is_writable(folder):
        return folder
    private = Path(tempfile.gettempdir(), f"batchq-reuse-{os.getuid()}")
    private.mkdir(0o700, exist_ok=True)
    if private.lstat().st_uid != os.getuid():
        raise ConfigError(f"{private}: is another user's; set BATCHQ_CACHE to a folder that can be written")
    return private


def _prefix(output: str) -> str:
    return f"{digest_of(output)[:24]}-"


def _ahead(pieces: Sequence[Rows]) -> Iterator[tuple[Any, int]]:
    """`_entries` of each, in order; a few are on their way, where map would read all of them ahead of us."""
    waiting: deque[Future[tuple[Any, int]]] = deque()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for piece in pieces:
            waiting.append(threads.submit(_entries, piece))
            if len(waiting) == AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _entries(piece: Rows) -> tuple[Any, int]:
    """One part's keys, placed by their rows in it, and how many rows it has. A failure has no key."""
    column = parts.read(piece, ["batchq_key"]).column(0)
    rows = np.flatnonzero(column.is_valid().to_numpy())
    try:
        keys = column.drop_null().cast(pa.binary()).cast(pa.binary(2 * BYTES)).combine_chunks()
        halves = np.frombuffer(binascii.unhexlify(_text(keys)), HALVES)
    except (pa.ArrowInvalid, binascii.Error) as error:
        raise StorageError(f"{piece.uri}: damaged: its keys aren't batchq's") from error
    entries = np.empty(len(rows), ENTRY)
    entries["first"], entries["second"], entries["place"] = halves["first"], halves["second"], rows
    return entries, len(column)


def _place(rows: int) -> Any:
    """The type of a place among so many rows."""
    return np.dtype("u4") if rows < NARROW else np.dtype("u8")


def _text(keys: pa.FixedSizeBinaryArray) -> bytes:
    """All keys, one after the other."""
    data = keys.buffers()[1]
    return data.slice(2 * BYTES * keys.offset, 2 * BYTES * len(keys)).to_pybytes() if data else b""


def _sorted(entries: Any) -> Any:
    """Each key once, with its first place. Two that agree in their first half don't happen by chance; one of them would
    be asked again."""
    entries = entries[np.argsort(entries["first"], kind="stable")]
    return entries[np.diff(entries["first"], prepend=~entries["first"][:1]) != 0]


def _deal(entries: Any, folder: Path) -> None:
    """Append sorted entries to the files of their first bytes."""
    ends = np.searchsorted(entries["first"] >> np.uint64(56), np.arange(256), side="right").tolist()
    for byte, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end > start:
            with (folder / f"{byte:02x}").open("ab") as file:
                entries[start:end].tofile(file)


def _join(folder: Path, place: Any) -> None:
    """Make the arrays of the files by first byte, one after the other."""
    with ExitStack() as stack:
        files = [stack.enter_context((folder / name).open("wb")) for name in FIELDS]
        for dealt in sorted(folder.glob("[0-9a-f][0-9a-f]")):
            entries = _sorted(np.fromfile(dealt, ENTRY))
            dealt.unlink()
            for name, file in zip(FIELDS, files, strict=True):
                entries[name].astype(place if name == "place" else ENTRY[name]).tofile(file)


def _mapped(path: Path, kind: Any) -> Any:
    """An array on disk; a file of no bytes can't be mapped."""
    return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)
