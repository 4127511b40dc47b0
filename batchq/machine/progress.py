"""The live line: on a terminal rewritten in place, in a log a line now and then. Goes to stderr."""

from __future__ import annotations

import logging
import shutil
import sys
import time
import unicodedata
from dataclasses import dataclass
from typing import TextIO

LOG_SECONDS = 30.0  # between lines where there is no terminal
LIVE_SECONDS = 0.5
BAR = 20  # characters, half of them on a terminal that is narrower than WIDE
WIDE = 100
UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # categories of characters that aren't shown as they are
JOINERS = "\u200c\u200d"  # of these, but words and emoji are spelled with them


class Progress:
    """Prints what it is told; remembers nothing but the time of its last line."""

    def __init__(self, stream: TextIO | None = None, log: logging.Logger | None = None, live: bool = True) -> None:
        """With `log` every line but the live one is a record of it. `live`: whether a terminal has a live line."""
        self.stream: TextIO | None = stream or sys.stderr  # None where it is closed, or once it has failed
        self.log = log
        self.live = live and self.stream is not None and self.stream.isatty()
        self._began = time.monotonic()
        self._last = 0.0
        self._open = False  # the live line is unfinished

    def step(self, text: str) -> None:
        """A step of the run has begun: always a line of its own."""
        self._say(text, time.monotonic() - self._began)

    def warn(self, text: str, *, replica: int | None = None, shard: int | None = None) -> None:
        """Something was lost or may be wrong, and the run goes on; where it is known, of which replica or shard."""
        self._say(text, time.monotonic() - self._began, logging.WARNING, replica=replica, shard=shard)

    def update(self, text: str, share: float | None = None) -> None:
        """The current step goes on; printed only when a line is due, on a terminal with a bar if `share`, of the step,
        is known."""
        now = time.monotonic()
        if now - self._last < (LIVE_SECONDS if self.live else LOG_SECONDS):
            return
        self._last = now
        if self.live:
            line = f"[{duration(now - self._began)}] {visible(text)}"
            columns = shutil.get_terminal_size().columns
            if share is not None:
                bar = BAR if columns >= WIDE else BAR // 2
                line = f"{'#' * round(share * bar):.<{bar}} {line}"
            self._write("\r\x1b[K" + line[: columns - 1])
            self._open = True
        else:
            self._say(text, now - self._began)

    def clear(self) -> None:
        if self._open:
            self._open = False
            self._write("\r\x1b[K")

    def line(self, text: str) -> None:
        """A line of its own, as it is."""
        self.clear()
        self._write(text + "\n")

    def _say(self, text: str, elapsed: float, level: int = logging.INFO, **about: int | None) -> None:
        if self.log:
            self.log.log(level, "%s", text, extra={"elapsed": elapsed, **about})
        else:
            self.line(f"[{duration(elapsed)}] {visible(text)}")

    def _write(self, text: str) -> None:
        if self.stream is None:
            return
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError as error:
                self.stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
            self.stream.flush()
        except (OSError, ValueError):  # a full disk, nobody who reads, closed by a caller: no reason to end a run
            self.stream = None


def visible(text: str) -> str:
    """One line of text in which nothing hides: what a terminal would obey (control characters), what reorders or
    hides its neighbours (directions, marks without width) and what can't be encoded is written as \\x1b or \\u202e."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_spelled(c) if unicodedata.category(c) in UNSEEN and c not in JOINERS else c for c in text)


def _spelled(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


@dataclass(frozen=True, slots=True)
class LabellingLine:
    """What the live line of a run that labels says. `share`: of the corpus, 0 to 1, None where rows can't be counted;
    `phases`: one per replica; `cost`: in words, to be added; `to_spare`: seconds before the deadline, negative if it is
    missed, None without one. What is needed most stands first: a narrow terminal shows no more."""

    rows: int
    failures: int
    truncated: int
    share: float | None
    seconds_left: float | None
    tokens_per_second: float | None
    phases: tuple[str, ...]
    cost: str
    to_spare: float | None = None

    def words(self) -> str:
        phases = self.phases
        busy = ", ".join(f"{phases.count(p)} {p}" for p in dict.fromkeys(phases)) or "starting"
        rate = f"{self.tokens_per_second:,.0f} tokens/s" if self.tokens_per_second else "- tokens/s"
        done = "" if self.share is None else f" ({self.share:.0%})"
        failed = f" · {self.failures:,} failures" if self.failures else ""
        cut = f" · {self.truncated:,} cut off" if self.truncated else ""
        eta = "-" if self.seconds_left is None else duration(self.seconds_left)
        left = "" if self.share is None else f" · ETA {eta}"
        if self.to_spare is not None:
            left += ", in time" if self.to_spare >= 0 else f", late by {duration(-self.to_spare)}"
        return f"{self.rows:,} rows{done}{left}{failed}{cut} · {rate} · replicas: {busy}{self.cost}"


def duration(seconds: float) -> str:
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 60}:{whole % 60:02d}"
