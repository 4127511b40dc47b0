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
POLL_SECONDS = 0.5


class Lease:
    """Held from construction to `close`. `lost` is set when another driver has taken over, `taken_by` says which."""

    def __init__(
        self, output: str, notify: Callable[[str], None], stop: threading.Event, lost: threading.Event
    ) -> None:
        """Raises OtherDriver when one is at work on this output, Stopped when `stop` is set meanwhile."""
        self.folder = layout.lease(output)
        self.taken_by: str | None = None
        self._lost = lost
        self._beat = 0
        self._began = time.monotonic()
        self._over = threading.Event()
        mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        while True:
            last = self._last()
            if last and not _over(self.folder, last, notify, stop):
                raise OtherDriver(
                    f"{output}: {_owner(self.folder, last)} is at work on it, so nothing was started here; "
                    "wait for it, or end it and give the same command again"
                )
            self.number = last + 1
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
                if (last := self._last()) > self.number:
                    self.taken_by = _owner(self.folder, last)
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

    def _last(self) -> int:
        names = (re.search(r"/(\d+)\.json$", s.uri) for s in storage.list_objects(self.folder))
        return max((int(name[1]) for name in names if name), default=0)


def _over(folder: str, number: int, notify: Callable[[str], None], stop: threading.Event) -> bool:
    """Whether that lease has ended: it says so, or its number doesn't rise for WATCH_BEATS of its beats."""
    first = _read(_beat_uri(folder, number))
    if first.get("over"):
        return True
    seconds = WATCH_BEATS * float(first.get("every", BEAT_SECONDS[0]))
    notify(f"{_owner(folder, number)} was at work here; watching {seconds:.0f} s whether it still is")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if stop.wait(POLL_SECONDS):
            raise Stopped("stopped before anything was started")
        now = _read(_beat_uri(folder, number))
        if now.get("over"):
            return True
        if now.get("beat") != first.get("beat"):
            return False
    notify("it is not; going on from where it was")
    return True


def _owner(folder: str, number: int) -> str:
    owner = _read(_uri(folder, number))
    return f"another run (process {owner.get('pid', '?')} on {owner.get('host', '?')})"


def _read(uri: str) -> dict[str, Any]:
    try:
        return storage.read_json(uri)
    except NotFound:  # killed between its lease and its first beat
        return {}


def _uri(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:04d}.json")


def _beat_uri(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:04d}.beat.json")
