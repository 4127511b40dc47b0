"""The group `log`: what is said while a command works, and in which form."""

from __future__ import annotations

from dataclasses import dataclass

from batchq.config.enums import LogFormat, LogLevel


@dataclass
class LogConfig:
    """What driver and replicas say of their work: the driver on standard error, each replica in a file of its own.

    level: what is less than this isn't said: debug, info, warning or error.
    format: text for people, or json: one object a line, with time, level, run, replica, shard, code, exit_code and
        message.
    """

    level: LogLevel = LogLevel.info
    format: LogFormat = LogFormat.text
