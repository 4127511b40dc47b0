"""Answers of a finished run, looked up by batchq_key, wherever their rows are now.

Where they lie says an index on disk. The answers themselves are read a whole part at a time when one of them is wanted,
and the parts that were read last are cached, up to CACHE bytes. Rows in their former order need a part or two at a
time. A corpus that was shuffled reads parts again whenever they have left the cache: slow, not wrong.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence

import pyarrow as pa

from batchq import storage
from batchq.config import TaskConfig
from batchq.errors import StorageError
from batchq.output import layout, parts
from batchq.output.schema import COUNTS
from batchq.records import Answer
from batchq.task import answers
from batchq.worker.index import Index

logger = logging.getLogger(__name__)

CACHE = 256 * 1024 * 1024  # bytes of answers; 5 million rows of three labels


def open_reuse(output: str, task: TaskConfig, lenient: bool) -> Reuse | None:
    """The answers of the run at `output`; None where none is named. Raises as Reuse; if `lenient`, a line in the log
    says so instead, and all is asked."""
    try:
        return Reuse(output, task, lenient) if output else None
    except StorageError as error:
        if not lenient:
            raise
        logger.warning("%s; no answer is taken over, all rows are asked", error)
        return None


class Reuse:
    """One run's answers. Thread-safe."""

    def __init__(self, output: str, task: TaskConfig, lenient: bool = False) -> None:
        """Open the index of what is committed at `output`, which is made unless this machine has it. If `lenient`, the
        rows of a part that turns out to be damaged later are asked.

        Raises NotFound if no run is there (any more: all rows would be asked), StorageError for a part that is damaged.
        """
        storage.stat(layout.plan(output))
        self._columns = [f.name for f in answers.of(task).fields()]
        self._tokens = [field.name for field in COUNTS]
        self._index = Index(output)
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._held = 0  # bytes in the cache
        self._lock = threading.Lock()
        self._lenient, self._damaged = lenient, set[int]()

    def __len__(self) -> int:
        return len(self._index)

    def find(self, keys: Sequence[str]) -> dict[str, Answer]:
        """The answers that were given to these keys, those that are known."""
        by_key: dict[str, Answer] = {}
        for part, hits, rows in self._index.find(keys):
            with self._lock:
                if (table := self._part(part)) is None:
                    continue
            found = table.take(pa.array(rows))
            for hit, row in zip(hits.tolist(), found.to_pylist(), strict=True):
                tokens = [row[name] for name in self._tokens]
                by_key[keys[hit]] = Answer({name: row[name] for name in self._columns}, *tokens)
        return by_key

    def _part(self, number: int) -> pa.Table | None:
        """A part's answers; None if it is damaged and that is no reason to stop. Raises StorageError if it is one."""
        if number in self._damaged:
            return None
        if number not in self._cache:
            try:
                self._cache[number] = parts.read(self._index.parts[number], [*self._columns, *self._tokens])
            except StorageError as error:
                if not self._lenient:
                    raise
                logger.warning("%s; its rows are asked again", error)
                self._damaged.add(number)
                return None
            self._held += self._cache[number].nbytes
            while self._held > CACHE and len(self._cache) > 1:
                self._held -= self._cache.popitem(last=False)[1].nbytes
        self._cache.move_to_end(number)
        return self._cache[number]
