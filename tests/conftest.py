"""What tests share: a tiny model, a real S3 server, a cache of their own, and a job to run."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.s3 import S3, s3_server
from tests.tiny import make_tiny_model

# Tests never reach for a hub, and their Ray never for the outside.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LABELS = ["good", "bad", "fine"]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own, so that nothing of this machine's is read or left behind."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("BATCHQ_CACHE")
    os.environ["BATCHQ_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["BATCHQ_CACHE"]
    else:
        os.environ["BATCHQ_CACHE"] = before


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a real tokenizer and chat template."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


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


@pytest.fixture
def project(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own folder with conf/job/mine.yaml, in which the test stands."""
    (tmp_path / "conf/job").mkdir(parents=True)
    (tmp_path / "conf/job/mine.yaml").write_text(
        f"""# @package _global_
job: {{name: mine}}
task:
  prompt: |
    Is this {{{{ choices }}}}?
    {{{{ text }}}}
  labels: [{", ".join(LABELS)}]
  gold: gold
model: {{path: "{tiny}"}}
quantization: {{scheme: none}}
engine: {{max_model_len: 256}}
input: {{path: rows.jsonl}}
output: {{path: out, rows_per_shard: 20}}
"""
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def compose(project: Path) -> Callable[..., Any]:
    """The user's job, composed as the command line would, on the fake engine unless told otherwise."""
    from batchq.cli import compose as real

    def composed(*overrides: str, engine: str = "fake") -> Any:
        return real(["job=mine", f"engine={engine}", *overrides])

    return composed
