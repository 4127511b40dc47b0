"""The live line: on a terminal rewritten in place, in a log a line now and then. Goes to stderr."""

from __future__ import annotations

import shutil
import sys
import time
import unicodedata
from typing import TextIO

LOG_SECONDS = 30.0  # between lines where there is no terminal
LIVE_SECONDS = 0.5
BAR = 20  # characters
UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # categories of characters that aren't shown as they are
JOINERS = "\u200c\u200d"  # of these, but words and emoji are spelled with them


class Progress:
    """Prints what it is told; keeps no numbers but the time of its last line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self._began = time.monotonic()
        self._last = 0.0
        self._open = False  # a live line stands unfinished

    def step(self, text: str) -> None:
        """A step of the run has begun: always a line of its own."""
        self.clear()
        self.stream.write(f"[{duration(time.monotonic() - self._began)}] {visible(text)}\n")
        self.stream.flush()

    def update(self, text: str, share: float | None = None) -> None:
        """The current step goes on; printed only when a line is due, on a terminal with a bar if `share`, of the step,
        is known."""
        now = time.monotonic()
        if now - self._last < (LIVE_SECONDS if self.live else LOG_SECONDS):
            return
        self._last = now
        line = f"[{duration(now - self._began)}] {visible(text)}"
        if self.live:
            if share is not None:
                line = f"{'#' * round(share * BAR):.<{BAR}} {line}"
            self.stream.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
            self._open = True
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def clear(self) -> None:
        if self._open:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
            self._open = False


def visible(text: str) -> str:
    """One line of text in which nothing hides: what a terminal would obey (control characters), what reorders or
    hides its neighbours (directions, marks without width) and what can't be encoded is written as \\x1b or \\u202e."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_spelled(c) if unicodedata.category(c) in UNSEEN and c not in JOINERS else c for c in text)


def _spelled(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def labelling(
    rows: int, failures: int, share: float | None, elapsed: float, new_tokens: int, phases: list[str], cost: str
) -> str:
    """The line of a run that labels. `share`: of the corpus, 0 to 1, where its rows can be counted; `elapsed`: seconds
    since the first answer."""
    busy = ", ".join(f"{phases.count(p)} {p}" for p in dict.fromkeys(phases)) or "starting"
    rate = f"{new_tokens / elapsed:,.0f} tokens/s" if elapsed > 1 and new_tokens else "- tokens/s"
    done = "" if share is None else f" ({share:.0%})"
    failed = f" · {failures:,} failures" if failures else ""
    return f"{rows:,} rows{done}{failed} · {rate} · replicas: {busy}{cost}"


def eta(share_done: float | None, share_at_start: float, elapsed: float) -> str:
    """Time to go, from how much of the corpus this invocation has labelled."""
    if share_done is None:
        return ""
    gained = share_done - share_at_start
    if gained <= 0 or elapsed < 2:
        return " · ETA -"
    return f" · ETA {duration((1 - share_done) / gained * elapsed)}"


def duration(seconds: float) -> str:
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 60}:{whole % 60:02d}"
