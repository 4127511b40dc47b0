"""What several tests do: rows and files of them, waiting for a process, looking at those it started."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LABELS = ["good", "bad", "fine"]


def rows_of(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"id": i, "text": f"row {i} says that all is well", "gold": LABELS[i % 3], **more} for i in range(count)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def wait_for(process: subprocess.Popen[str], done: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)  # polling another process; nothing here depends on how long


def processes_below(root: int, name: bytes) -> list[int]:
    """Ids of the processes that `root` started, or that these did, whose command line has `name`."""
    parents: dict[int, int] = {}
    titles: dict[int, bytes] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:  # it ended between the listing and this line
                continue
    found, size = {root}, 0
    while len(found) > size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return sorted(pid for pid in found if name in titles.get(pid, b""))
