"""Standard output and error, whatever they are connected to: a terminal, a pipe, a full disk, nothing."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from batchq.errors import BatchqError, exit_code_of, words_of
from batchq.machine import log
from batchq.machine.progress import visible


class Closed(io.TextIOWrapper):
    """What stands for a stream that was closed before we started: it takes everything, and only knows that it did."""

    used = False

    def write(self, text: str) -> int:
        self.used = True
        return len(text)


def prepare() -> None:
    """Open what was closed before we started, or the next file opened would get its number and take what is printed;
    and write what an encoding doesn't have as \\xe9, instead of ending in a traceback after all is labelled."""
    for name, mode in (("stdin", "rb"), ("stdout", "wb"), ("stderr", "wb")):
        if getattr(sys, name) is None:
            setattr(sys, name, Closed(open(os.devnull, mode)))  # noqa: SIM115 open until we end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> bool:
    """Print lines in which a terminal finds nothing to obey, whatever rows, names and messages are in them.

    False where standard output can't be written, after a line on standard error, and where its reader has left: what
    was done stays done, and only a command that was for its words alone has failed then.
    """
    try:
        with to_stdout():
            print("\n".join(map(visible, text.expandtabs().split("\n"))), flush=True)
    except BrokenPipeError:  # `| head`: the reader has seen enough
        return False
    except BatchqError as error:
        complain(error)
        return False
    return True


@contextmanager
def to_stdout() -> Iterator[None]:
    """For code that prints: afterwards all is written. Raises BatchqError where standard output can't be written, and
    BrokenPipeError where nobody reads it any more."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        _let_go(1)  # where Python, as it ends, puts what it couldn't write
        if isinstance(error, BrokenPipeError):
            raise
        raise BatchqError(f"standard output: {error.strerror}") from error
    if isinstance(sys.stdout, Closed) and sys.stdout.used:
        raise BatchqError("standard output: it is closed")


def _let_go(number: int) -> None:
    """Lead a stream to nowhere, also where no more files may be opened."""
    os.close(number)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def complain(error: BatchqError | OSError) -> int:
    """One line on standard error, if that can be written, in the log's format once that is known; the exit code."""
    if not log.last_word(error):
        warn(f"batchq: {visible(words_of(error))}")
    return exit_code_of(error)


def warn(line: str) -> None:
    """A line on standard error, if that can be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _let_go(2)


def close() -> None:
    """What standard error can't take is let go, or Python, as it ends, would make an exit code of it."""
    try:
        sys.stderr.flush()
    except OSError:
        _let_go(2)


def warn_at_once(line: str) -> None:
    """The same from a signal's handler or beside a thread that may hold the stream: past Python's buffers."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())
