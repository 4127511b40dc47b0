"""What tests share: a tiny model, a real S3 server, a cache of their own, and a job to run."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchq.pool import connection
from tests.helpers import LABELS
from tests.s3 import S3, s3_server
from tests.shared_ray import SharedRay
from tests.tiny import make_tiny_model

# Tests never reach for a hub, and their Ray never for the outside.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


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


@pytest.fixture(scope="session", autouse=True)
def one_ray() -> Iterator[SharedRay]:
    shared = SharedRay()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "connect", shared.connect)
        patch.setattr(connection, "close", shared.close)
        yield shared
        shared.finish()


@pytest.fixture
def own_ray(one_ray: SharedRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that connects and closes as batchq does."""
    one_ray.finish()
    monkeypatch.setattr(connection, "connect", one_ray.start)
    monkeypatch.setattr(connection, "close", one_ray.end)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a real tokenizer and chat template."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty folder, local and on S3."""
    if request.param == "local":
        return str(tmp_path / "root")
    return remote_root(request.getfixturevalue("s3"), monkeypatch)


@pytest.fixture
def remote(s3: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    return remote_root(s3, monkeypatch)


def remote_root(s3: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return f"{s3.make_bucket('storage')}/{uuid.uuid4().hex}"


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
