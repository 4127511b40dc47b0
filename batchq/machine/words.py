"""Figures and texts in words for a person."""

from __future__ import annotations

GIB = 1 << 30


def gib(size: int) -> str:
    """Bytes in words: "1.3 GiB"."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.0f} MiB"


def last_line(text: str) -> str:
    """The last line that isn't blank; empty if there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
