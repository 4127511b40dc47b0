"""Ray that doesn't start, or a cluster that can't be joined: one line with what Ray knows, no traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.utils import check_version_info

from batchq.errors import ConfigError, EngineError
from batchq.machine.cache import cache_dir, lend_home
from batchq.pool import connection

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


@pytest.fixture(autouse=True)
def closed(own_ray: None) -> Iterator[None]:
    """What a test connects, it gives up: Ray stays hushed in this process else, whatever test comes next."""
    yield
    connection.close()


class Ray:
    """In place of ray.init, since no test can order a machine that is too busy: `errors`, one a call, then it is up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
        self.errors = list(errors)
        monkeypatch.setattr(ray, "init", self)

    def __call__(self, **_: Any) -> None:
        if self.errors:
            raise self.errors.pop(0)


def test_a_machine_that_was_too_busy_is_tried_once_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Ray(monkeypatch, Exception(SLOW))
    connection.connect(None)
    (line,) = caplog.messages
    assert "started once more" in line and "timed out during startup" in line
    ours = Ray(monkeypatch, *[Exception(SLOW)] * 2, Exception("a third time"))
    with pytest.raises(EngineError, match=r"^Ray doesn't start on this machine: The current node timed out") as raised:
        connection.connect(None)
    assert "\n" not in str(raised.value) and len(ours.errors) == 1


def test_a_cluster_of_other_versions_is_named_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError) as theirs:
        check_version_info({"ray_version": "2.50.0", "python_version": "3.9.1"}, "process")
    Ray(monkeypatch, theirs.value)
    monkeypatch.setattr(connection, "_require_answer", lambda _: None)
    with pytest.raises(ConfigError) as raised:
        connection.connect("10.0.0.1:6379")
    said = str(raised.value)
    assert said.startswith("cluster.address=10.0.0.1:6379: Version mismatch") and "\n" not in said
    assert all(version in said for version in ("Ray: 2.50.0", "Python: 3.9.1", f"Ray: {ray.__version__}"))


def test_without_a_home_there_is_one_for_the_libraries_and_the_caches_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BATCHQ_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nowhere")
    lend_home()
    lent = Path.home()
    assert os.access(lent, os.W_OK) and cache_dir() == Path("/nowhere/.cache/batchq")
    assert os.environ["HF_HOME"] == "/nowhere/.cache/huggingface"
    lend_home()
    assert Path.home() == lent, "once"
    lent.rmdir()


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("x" * 100, r"AF_UNIX path length cannot exceed 107 bytes: .*; set RAY_TMPDIR to a folder with a shorter name"),
        ("file/folder", r"file/.*: Not a directory; Ray's files go to RAY_TMPDIR, TMPDIR or /tmp"),
    ],
)
def test_a_folder_that_ray_can_t_use(folder: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", os.path.join(tmp_path, folder))
    with pytest.raises(EngineError, match=rf"^Ray doesn't start on this machine: .*{words}") as raised:
        connection.connect(None)
    assert "\n" not in str(raised.value) and not ray.is_initialized()
