"""The time of one command: what is said is said with it, and it may be limited."""

from __future__ import annotations

import time

BEGAN = time.monotonic()  # this module's import, which is the command's begin


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:5.0f} s] {text}", flush=True)


def left(within: float) -> float:
    """Seconds until the command is `within` seconds old."""
    return within - (time.monotonic() - BEGAN)
