"""A process beside the driver that outlives its being killed, ends the engines that it leaves and records what it held.

Nothing of it costs a request as long as the driver lives: each second that writes its account to a local file, and the
witness looks at what the driver started. It runs by path, in an interpreter without batchq, and imports that once there
is something to record. It isn't killed by a signal to the driver's process group, nor by what asks processes to end;
where the machine or the container is lost, it is lost too.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

TELL_SECONDS = 1.0  # between accounts
LOOK_SECONDS = 2.0  # between looks at what the driver has started
DIE_SECONDS = 10.0  # given to what was killed
ENGINES = (b"ray::Replica", b"compress.py")  # in their command lines: these, and what they start, hold devices
REASON = "killed: the driver ended without a word; what it held is counted until the last of its engines was gone"


class Witness:
    """The driver's side: from construction to `close` what it holds is told once a second."""

    def __init__(self, folder: Path, tell: Callable[[], dict[str, Any] | None]) -> None:
        """`tell` gives what `main` needs, None once nothing is left to be witnessed; it is called in a thread."""
        self._tell = tell
        self._file = folder / "witness.json"
        self._over = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "witness.log").open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", __file__, str(os.getpid()), str(self._file)],
                    stdin=subprocess.PIPE,  # never written to: it ends with this process, however that ends
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            logger.warning("nobody will record what this run held if it is killed: %s", error)
        self._thread = threading.Thread(target=self._run, name="batchq-account", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        with suppress(OSError):  # a folder that takes no files, which a warning has told of
            self._file.unlink()  # there is nothing to record
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(DIE_SECONDS)

    def _run(self) -> None:
        told = True
        while not self._over.is_set():
            account = self._tell()
            try:
                if account is None:
                    self._file.unlink(missing_ok=True)
                else:
                    new = self._file.with_suffix(".new")
                    new.write_text(json.dumps(account))
                    new.replace(self._file)
                told = True
            except OSError as error:  # a full disk; the next one may fit
                if told:
                    logger.warning("a kill now would cost what was held since: %s", error)
                told = False
            self._over.wait(TELL_SECONDS)


# ---- the witness's side: the standard library alone, until there is something to record ----


@dataclass
class Known:
    """A process that the driver has started: a descriptor that no other process's id takes, and whether it is an
    engine, or below one."""

    alive: int
    engine: bool

    def gone(self) -> bool:
        return bool(select.select([self.alive], [], [], 0)[0])


def main(driver: int, file: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    known: dict[int, Known] = {}
    while not select.select([0], [], [], LOOK_SECONDS)[0]:
        look({driver: False}, known)
    if not file.exists():
        return
    look({}, known)
    end(known)
    told = json.loads(file.read_text())
    seconds = time.monotonic() - told["at"]  # the same clock in all processes
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from batchq import storage
    from batchq.account.usage import account_from_json, killed
    from batchq.records import sealed

    record = killed(account_from_json(told["run"]), seconds, REASON)
    storage.put(told["uri"], sealed(dataclasses.asdict(record)))
    file.unlink()


def look(roots: dict[int, bool], known: dict[int, Known]) -> None:
    """Know the processes below the roots and below those that are known and alive; forget those that are gone."""
    for process in [process for process, each in known.items() if each.gone()]:
        os.close(known.pop(process).alive)
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, IndexError):  # it ended meanwhile
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    todo = [*roots.items(), *((process, each.engine) for process, each in known.items())]
    while todo:
        parent, inside = todo.pop()
        for child in children.get(parent, []):
            if child not in known:
                with suppress(OSError):  # it ended, or a container forbids this
                    known[child] = Known(os.pidfd_open(child), False)
                    todo.append((child, inside))
            if child in known:
                known[child].engine |= inside or _is_engine(child)


def _is_engine(process: int) -> bool:
    try:
        line = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return any(title in line for title in ENGINES)


def end(known: dict[int, Known]) -> None:
    """Kill the engines that are left, and wait until they are gone."""
    engines = [each.alive for each in known.values() if each.engine]
    for alive in engines:
        with suppress(OSError):
            signal.pidfd_send_signal(alive, signal.SIGKILL)
    until = time.monotonic() + DIE_SECONDS
    for alive in engines:
        select.select([alive], [], [], max(0.0, until - time.monotonic()))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
