"""Standard output and error, whatever they are connected to: a terminal, a pipe, a full disk, nothing."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from batchq.errors import BatchqError
from batchq.machine import log
from batchq.machine.progress import visible


def prepare() -> None:
    """Open what was closed before we started, or the next file opened would get its number and take what is printed;
    and write what an encoding doesn't have as \\xe9, instead of ending in a traceback after all is labelled."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 open until we end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print lines in which a terminal finds nothing to obey, whatever rows, names and messages are in them.

    Raises BatchqError where standard output can't be written, and BrokenPipeError where nobody reads it any more.
    """
    with to_stdout():
        print("\n".join(map(visible, text.expandtabs().split("\n"))), flush=True)


@contextmanager
def to_stdout() -> Iterator[None]:
    """For code that prints: afterwards all is written, or raised as `say` does."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Python, as it ends, puts what it couldn't write
        if isinstance(error, BrokenPipeError):
            raise
        raise BatchqError(f"standard output: {error.strerror}") from error


def complain(error: BatchqError) -> int:
    """One line on standard error, if that can be written, in the log's format once that is known; the exit code."""
    words = " ".join(str(error).split())
    if not log.last_word(words, error.run):
        warn(f"batchq: {visible(words)}")
    return error.exit_code


def warn(line: str) -> None:
    """A line on standard error, if that can be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def close() -> None:
    """What standard error can't take is let go, or Python, as it ends, would make an exit code of it."""
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def warn_at_once(line: str) -> None:
    """The same from a signal's handler or beside a thread that may hold the stream: past Python's buffers."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())
