"""`run.deadline`: nothing new is asked from `cluster.grace_seconds` before it; and whether that is likely to cut a run
short."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from batchq.config import Config, deadline_after, is_clock
from batchq.errors import LimitReached, Stopped
from batchq.job.session import Session
from batchq.machine.progress import duration

HOLD_SECONDS = 30.0  # that a forecast has to be another for, before anybody is told; less where less is left
HOLD_SHARE = 0.1  # of what is left until the end of intake
RELIEF = 0.05  # of what is left: so much has to be to spare before a run is no longer at risk


@dataclass(slots=True)
class Risk:
    """Whether a run will be cut short by its deadline, without flapping: it is once its forecast has been later for
    HOLD_SECONDS on end, and isn't any more once that has been earlier, by RELIEF, for as long. Pure arithmetic."""

    at_risk: bool = False
    _since: float | None = None  # when the forecast began to say otherwise

    def look(self, now: float, needed: float | None, left: float) -> bool:
        """Whether `at_risk` has changed. `now` is any clock's; `needed`: seconds of labelling to go, None where they
        aren't known; `left`: seconds until nothing new is asked."""
        if needed is None:
            return False
        late = needed > (left * (1 - RELIEF) if self.at_risk else left)
        if late == self.at_risk:
            self._since = None
            return False
        if self._since is None:
            self._since = now
        if now - self._since < min(HOLD_SECONDS, HOLD_SHARE * max(0.0, left)):
            return False
        self.at_risk, self._since = late, None
        return True


class Deadline:
    """That of one invocation, from its start. It is counted on a clock that goes on while a machine sleeps and that no
    change of the wall clock moves."""

    def __init__(self, config: Config, stop: threading.Event) -> None:
        """Sets `stop` when it comes, until `close`."""
        self.asked = config.run.deadline
        self.at: datetime | None = None
        self.reached = False  # and nothing else had asked for an end before
        self._stop = stop
        self._over = threading.Event()
        if self.asked is not None:
            now = datetime.now(UTC)
            self.at = deadline_after(self.asked, now)
            self._ends = _clock() + (self.at - now).total_seconds() - config.cluster.grace_seconds
            threading.Thread(target=self._wait, name="batchq-deadline", daemon=True).start()

    def close(self) -> None:
        self._over.set()

    def seconds_left(self) -> float | None:
        """Until nothing new is asked; None without a deadline."""
        return None if self.asked is None else self._ends - _clock()

    def require(self) -> None:
        """Raises LimitReached once it has come."""
        if self.reached:
            raise LimitReached(self.words("nothing was labelled by this invocation"))

    @contextmanager
    def obeyed(self) -> Iterator[None]:
        """Inside, what was stopped because it has come raises LimitReached."""
        try:
            yield
        except Stopped as error:
            if type(error) is Stopped:
                self.require()
            raise

    def words(self, standing: str) -> str:
        """Why the run ends here, how far it is, and how it goes on."""
        how = "the same command with a later one, or with run.deadline=null, goes on"
        if is_clock(self.asked or ""):
            how = "the same command goes on, until it is that time again"
        return f"run.deadline={self.asked}: its time has come; {standing}; {how}"

    def _wait(self) -> None:
        while (left := self._ends - _clock()) > 0:
            if self._over.wait(min(left, 1.0)):  # a wait doesn't count the time that a machine sleeps
                return
        if not self._over.is_set() and not self._stop.is_set():
            self.reached = True
            self._stop.set()


@contextmanager
def deadline_of(session: Session) -> Iterator[Deadline]:
    """Inside, the session is stopped when its deadline comes, and what was stopped so before it labelled raises
    LimitReached."""
    deadline = Deadline(session.config, session.stop)
    if deadline.at is not None:
        session.invocation.deadline = deadline.at
        left = (deadline.at - datetime.now(UTC)).total_seconds()
        session.progress.step(f"deadline: {deadline.at:%Y-%m-%d %H:%M:%S} UTC, in {duration(max(0.0, left))}")
    try:
        with deadline.obeyed():
            yield deadline
    finally:
        deadline.close()


def _clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
