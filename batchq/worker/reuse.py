"""Answers of a finished run, looked up by batchq_key, wherever their rows are now.

An index is made once per process from the key columns: 24 bytes per answer, so 10 million take 240 MB, and more while
it is sorted. The answers themselves are read a whole part at a time when one of them is wanted, and the parts that were
read last are cached, up to CACHE bytes. Rows in their former order need a part or two at a time. A corpus that was
shuffled reads parts again whenever they have left the cache: slow, not wrong.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from batchq import storage
from batchq.config import TaskConfig
from batchq.output import layout, parts
from batchq.output.schema import COUNTS
from batchq.records import Answer
from batchq.task import answers

CACHE = 256 * 1024 * 1024  # bytes of answers; 5 million rows of three labels
AT_ONCE = 8  # key columns on their way


class Reuse:
    """One run's answers. Thread-safe."""

    def __init__(self, output: str, task: TaskConfig) -> None:
        """Read the keys of all that is committed at `output`.

        Raises NotFound if no run is there (any more: all rows would be asked), StorageError for a part that is damaged.
        """
        storage.stat(layout.plan(output))
        self._columns = [f.name for f in answers.of(task).fields()]
        self._tokens = [field.name for field in COUNTS]
        self._parts = [s.uri for s in storage.list_objects(layout.data(output)) if layout.parse_part(s.uri)]
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._held = 0  # bytes in the cache
        self._lock = threading.Lock()
        self._first, self._second, self._place = self._index()

    def __len__(self) -> int:
        return len(self._place)

    def find(self, keys: Sequence[str]) -> dict[str, Answer]:
        """The answers that were given to these keys, those that are known."""
        if not keys or not len(self):
            return {}
        halves = _halves(keys)
        at = np.minimum(np.searchsorted(self._first, halves[:, 0]), len(self) - 1)
        # Two keys that differ in their second half only don't happen by chance; one of them would be asked again.
        hits = np.flatnonzero((self._first[at] == halves[:, 0]) & (self._second[at] == halves[:, 1]))
        places = self._place[at[hits]]
        by_key: dict[str, Answer] = {}
        with self._lock:
            for part in np.unique(places >> 32).tolist():
                in_part = np.flatnonzero(places >> 32 == part)
                rows = self._part(part).take(pa.array(places[in_part] & 0xFFFFFFFF)).to_pylist()
                for hit, row in zip(hits[in_part].tolist(), rows, strict=True):
                    tokens = [row[name] for name in self._tokens]
                    by_key[keys[hit]] = Answer({name: row[name] for name in self._columns}, *tokens)
        return by_key

    def _part(self, number: int) -> pa.Table:
        if number not in self._cache:
            self._cache[number] = parts.read(self._parts[number], [*self._columns, *self._tokens])
            self._held += self._cache[number].nbytes
            while self._held > CACHE and len(self._cache) > 1:
                self._held -= self._cache.popitem(last=False)[1].nbytes
        self._cache.move_to_end(number)
        return self._cache[number]

    def _index(self) -> tuple[Any, Any, Any]:
        """Both halves of every key and its place (part << 32 | row), uint64 each, in the order of the first halves."""
        pieces: list[Any] = []
        with ThreadPoolExecutor(AT_ONCE) as threads:
            numbers = iter(range(len(self._parts)))
            while group := list(islice(numbers, 16 * AT_ONCE)):  # map alone would read them all ahead of us
                pieces += threads.map(self._keys, group)
        halves = np.concatenate([h for h, _ in pieces]) if pieces else np.empty((0, 2), np.uint64)
        place = np.concatenate([p for _, p in pieces]) if pieces else np.empty(0, np.uint64)
        pieces.clear()
        order = np.argsort(halves[:, 0], kind="stable")
        place = place[order]
        second = halves[order, 1]
        return halves[order, 0], second, place

    def _keys(self, number: int) -> tuple[Any, Any]:
        """One part's keys, shape [answers, 2], and their places. A failure has no key."""
        column = parts.read(self._parts[number], ["batchq_key"]).column(0)
        rows = np.flatnonzero(column.is_valid().to_numpy()).astype(np.uint64)
        return _halves(column.drop_null().to_pylist()), rows | np.uint64(number << 32)


def _halves(keys: Sequence[str]) -> Any:
    return np.frombuffer(bytes.fromhex("".join(keys)), np.uint64).reshape(-1, 2)
