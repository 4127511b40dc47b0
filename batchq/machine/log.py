"""What batchq says while it works: records of the logger "batchq", as text or as JSON, on one stream.

The root logger is left alone. A handler is attached to "batchq" only while a command or a session works, and is taken
away after it, so a program that calls batchq keeps its own logging; its handlers hear the same records.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from batchq.config import LogConfig
from batchq.errors import BatchqError, exit_code_of, words_of
from batchq.machine.progress import Progress, duration, visible

ROOT = logging.getLogger("batchq")


@dataclass(frozen=True, slots=True)
class LogSetting:
    """How one process logs. `run` is the invocation's id; the driver has no `replica`."""

    level: str = "info"
    format: str = "text"
    run: str = ""
    replica: int | None = None


AS_SHIPPED = LogSetting()


@dataclass(frozen=True, slots=True)
class LogFile:
    """Where a replica logs, and how. `shown`: its output also goes where it went before, which Ray keeps."""

    path: str
    setting: LogSetting
    shown: bool = False


def setting(config: LogConfig, run: str = "") -> LogSetting:
    """What the configuration asks for."""
    return LogSetting(config.level.value, config.format.value, run)


class JsonFormatter(logging.Formatter):
    """One object a line. What isn't known is null."""

    def __init__(self, asked: LogSetting) -> None:
        super().__init__()
        self.asked = asked

    def format(self, record: logging.LogRecord) -> str:
        replica = getattr(record, "replica", None)  # which one the driver speaks of
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "run": getattr(record, "run", "") or self.asked.run or None,
            "replica": self.asked.replica if replica is None else replica,
            "shard": getattr(record, "shard", None),
            "code": getattr(record, "code", None),
            "exit_code": getattr(record, "exit_code", None),
            "message": record.getMessage(),
        }
        if (event := getattr(record, "event", None)) is not None:  # account/events.py
            entry["event"] = event
        return json.dumps(entry, allow_nan=False)


class TextFormatter(logging.Formatter):
    """A step with the time since the beginning, all else after "batchq: "; then the shard, if it is of one."""

    def format(self, record: logging.LogRecord) -> str:
        elapsed = getattr(record, "elapsed", None)
        before = "batchq: " if elapsed is None else f"[{duration(elapsed)}] "
        if (shard := getattr(record, "shard", None)) is not None:
            before += f"shard {shard}: "
        return before + "\n".join(map(visible, record.getMessage().split("\n")))


class Handler(logging.Handler):
    """Writes where the live line is shown, which is wiped before."""

    def __init__(self, progress: Progress, asked: LogSetting) -> None:
        super().__init__()
        self.progress = progress
        self.setFormatter(JsonFormatter(asked) if asked.format == "json" else TextFormatter())
        if asked.format != "json":  # a person reads the steps, which say the same
            self.addFilter(lambda record: not hasattr(record, "event"))

    def emit(self, record: logging.LogRecord) -> None:
        self.progress.line(self.format(record))


def configure(asked: LogSetting) -> Progress:
    """Log to standard error from now on, in place of what was configured before. Returns what steps are told to."""
    live = asked.format == "text" and asked.level in ("debug", "info")
    progress = Progress(log=logging.getLogger("batchq.progress"), live=live)
    ROOT.handlers = [h for h in ROOT.handlers if not isinstance(h, Handler)] + [Handler(progress, asked)]
    ROOT.setLevel(asked.level.upper())
    return progress


def last_word(error: BatchqError | OSError) -> bool:
    """Log the error that ends a command, if logging is configured; otherwise its words are somebody else's to print."""
    if _handler() is None:
        return False
    run = error.run if isinstance(error, BatchqError) else ""
    about = {"run": run, "code": type(error).__name__, "exit_code": exit_code_of(error)}
    ROOT.error("%s", words_of(error), extra=about)
    return True


def formatted(text: str) -> str:
    """A warning as it would be logged, for a signal's handler, which can't log: the stream may be in use."""
    handler = _handler()
    if handler is None:
        return f"batchq: {text}"
    fields = {"name": ROOT.name, "levelno": logging.WARNING, "levelname": "WARNING", "msg": text}
    return ("\n" if handler.progress.live else "") + handler.format(logging.makeLogRecord(fields))


def _handler() -> Handler | None:
    return next((handler for handler in ROOT.handlers if isinstance(handler, Handler)), None)


@contextmanager
def configured(asked: LogSetting) -> Iterator[Progress]:
    """`configure`, and afterwards the logger is as it was before."""
    handlers, level = list(ROOT.handlers), ROOT.level
    try:
        yield configure(asked)
    finally:
        ROOT.handlers = handlers
        ROOT.setLevel(level)
