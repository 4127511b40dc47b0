"""Which driver works on an output: whoever made the last numbered lease, as long as its heart beats.

`meta/lease/0007.json` is created once, by one driver; `0007.beat.json` beside it is rewritten with a higher number at
every beat while that driver works, and says so at its end. Beats come every 2 seconds in a run's first minute and every
15 in the end: on a bucket that keeps versions each is one, 2,000 in a night of 8 hours instead of 14,400. A newcomer
that finds the last lease open watches its number for WATCH_BEATS beats on a clock of its own: no wall clock of another
machine is trusted. If the number rises it
leaves; if not, it makes the next lease, which only one newcomer can. The loser, and a driver that was only suspended
and finds a later lease than its own, leave too. All this saves work and money; that rows are never doubled rests on
the create-only commit of every part.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from batchq import storage
from batchq.errors import AlreadyExists, NotFound, OtherDriver, Stopped, StorageError
from batchq.output import layout

logger = logging.getLogger(__name__)

BEAT_SECONDS = (2.0, 15.0)  # between beats: of a driver that has just begun, of one that has worked for long
SLOWING = 30.0  # a driver's age over the time to its next beat, in between
WATCH_BEATS = 4  # one may be late by what a store's retries take
POLL_SECONDS = 0.5  # between looks at another driver's beat


class Lease:
    """Held from construction to `close`. `lost` is set when another driver has taken over, `taken_by` says which."""

    def __init__(
        self,
        output: str,
        notify: Callable[[str], None],
        stop: threading.Event,
        lost: threading.Event,
        run: str = "",
    ) -> None:
        """`run`: the invocation's id. Raises OtherDriver when one is at work on this output, Stopped when `stop` is set
        meanwhile."""
        self.folder = layout.lease(output)
        self.taken_by: str | None = None
        self._lost = lost
        self._beat = 0
        self._began = time.monotonic()
        self._over = threading.Event()
        mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "run": run}).encode()
        while True:
            number = _last(self.folder)
            if number and not _over(heart := Heart(self.folder, number), notify, stop):
                raise OtherDriver(
                    f"{output}: {_another(heart)} is at work on it, so nothing was started here; "
                    "wait for it, or end it and give the same command again"
                )
            self.number = number + 1
            try:
                storage.create(_uri(self.folder, self.number), mine)
                break
            except AlreadyExists:
                continue  # another newcomer was quicker: now that one is watched
        self._write(over=False)
        self._thread = threading.Thread(target=self._run, name="batchq-heartbeat", daemon=True)
        self._thread.start()

    def close(self, forget: bool = False) -> None:
        """Say that this driver's work is over: the next one need not watch. `forget`: as if it had never been."""
        self._over.set()
        self._thread.join()
        if forget:
            storage.delete(_beat_uri(self.folder, self.number))
            storage.delete(_uri(self.folder, self.number))
        else:
            self._write(over=True)

    def _run(self) -> None:
        while not self._over.wait(self._interval()):
            try:
                self._write(over=False)
                if (number := _last(self.folder)) > self.number:
                    self.taken_by = _another(Heart(self.folder, number))
                    self._lost.set()
                    return
            except StorageError as error:  # the next beat may get through; a newcomer at worst works beside us
                logger.warning("a heartbeat failed: %s", error)

    def _write(self, over: bool) -> None:
        self._beat += 1
        said = {"beat": self._beat, "over": over, "every": round(self._interval(), 1)}
        storage.put(_beat_uri(self.folder, self.number), json.dumps(said).encode())

    def _interval(self) -> float:
        """Seconds from this beat to the next."""
        first, last = BEAT_SECONDS
        return min(last, max(first, (time.monotonic() - self._began) / SLOWING))


class Heart:
    """Whether the driver that made a lease is at work, as far as its beats tell, on this process's own clock."""

    def __init__(self, folder: str, number: int, now: Callable[[], float] = time.monotonic) -> None:
        self.number = number
        self.over = False  # it said so
        self._folder, self._now = folder, now
        owner = _read(_uri(folder, number))
        self.run = str(owner.get("run", ""))  # the invocation's id; leases of 0.1.0 don't say
        self.owner = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
        beat = _read(_beat_uri(folder, number))
        self._seen: tuple[Any, Any] = (beat.get("beat"), None)
        self._changed: float | None = None  # when it rose while we watched
        self._began = now()
        self._every = float(beat.get("every", BEAT_SECONDS[0]))

    @property
    def watch_seconds(self) -> float:
        """So long without a sign of life it takes to be taken for dead."""
        return WATCH_BEATS * self._every

    @property
    def silent_seconds(self) -> float | None:
        """Since its last sign of life; None where none was seen yet."""
        return None if self._changed is None else self._now() - self._changed

    def look(self, sign: object = None) -> bool | None:
        """True: at work. False: it said that it is over, or gave no sign of life for `watch_seconds`. None: too early
        to tell. `sign`: anything else that its owner alone changes, so that it is known sooner."""
        beat = _read(_beat_uri(self._folder, self.number))
        if beat.get("over") or (not beat and self._seen[0] is not None):  # forgotten: it planned nothing
            self.over = True
            return False
        self._every = float(beat.get("every", self._every))
        number, before = beat.get("beat"), self._seen[1]
        if number != self._seen[0] or (before is not None and sign is not None and sign != before):
            self._changed = self._now()
        self._seen = (number, before if sign is None else sign)
        if self._now() - (self._began if self._changed is None else self._changed) >= self.watch_seconds:
            return False
        return None if self._changed is None else True


def last(output: str) -> Heart | None:
    """That of the last lease on an output, if there is one."""
    folder = layout.lease(output)
    number = _last(folder)
    return Heart(folder, number) if number else None


def _last(folder: str) -> int:
    names = (re.search(r"/(\d+)\.json$", s.uri) for s in storage.list_objects(folder))
    return max((int(name[1]) for name in names if name), default=0)


def _over(heart: Heart, notify: Callable[[str], None], stop: threading.Event) -> bool:
    """Whether that lease has ended: it says so, or its number doesn't rise for WATCH_BEATS of its beats."""
    at_work = heart.look()
    if at_work is None:
        notify(f"{_another(heart)} was at work here; watching {heart.watch_seconds:.0f} s whether it still is")
        while (at_work := heart.look()) is None:
            if stop.wait(POLL_SECONDS):
                raise Stopped("stopped before anything was started")
    if not at_work and not heart.over:
        notify("it is not; going on from where it was")
    return not at_work


def _another(heart: Heart) -> str:
    return f"another run ({heart.owner})"


def _read(uri: str) -> dict[str, Any]:
    try:
        return storage.read_json(uri)
    except NotFound:  # killed between its lease and its first beat
        return {}


def _uri(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:04d}.json")


def _beat_uri(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:04d}.beat.json")
