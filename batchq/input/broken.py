"""Rows that can't be read: each with its error, and its text where there is some."""

from __future__ import annotations

from batchq.records import Row

MAX_LINE = 64 * 1024 * 1024  # bytes; a longer line becomes an error row, so that one can't fill the memory
TOO_LONG = ("line_too_long", f"longer than {MAX_LINE // 1024**2} MiB")
NOT_UTF8 = ("invalid_utf8", "not valid UTF-8")


def row(prefix: str, position: int, code: str, message: str, raw: str | None = None) -> Row:
    return Row(f"{prefix}{position}", position, {}, (code, message), raw)


def too_long(prefix: str, position: int) -> Row:
    return row(prefix, position, *TOO_LONG)


def not_utf8(prefix: str, position: int, line: bytes) -> Row:
    return row(prefix, position, *NOT_UTF8, line.decode(errors="replace"))
