"""Rows that can't be read: each with its error, and its text where there is some."""

from __future__ import annotations

from batchq.input.sizes import text_bytes
from batchq.records import Row

MAX_LINE = (
    32 * 1024 * 1024
)  # bytes of a line, a record or a table's row; a longer one is an error row, for the memory's sake
TOO_LONG = ("line_too_long", f"longer than {MAX_LINE // 1024**2} MiB")
NOT_UTF8 = ("invalid_utf8", "not valid UTF-8")


def row(prefix: str, position: int, code: str, message: str, raw: str | None = None) -> Row:
    return Row(f"{prefix}{position}", position, {}, (code, message), raw, text_bytes(raw or ""))


def too_long(prefix: str, position: int) -> Row:
    return row(prefix, position, *TOO_LONG)


def not_utf8(prefix: str, position: int, line: bytes) -> Row:
    return row(prefix, position, *NOT_UTF8, line.decode(errors="replace"))
