"""No secret leaks: canaries in environment, command line and URIs, looked for in everything that is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from batchq import storage
from batchq.config import Config
from batchq.errors import BatchqError
from tests.helpers import rows_of, write_jsonl
from tests.jobs import finished
from tests.s3 import S3

ROOT = Path(__file__).parent.parent
CANARY = "canary-7f3a-of-a-secret"
NAMES = ("AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_ACCOUNT_KEY", "GOOGLE_SERVICE_ACCOUNT_KEY", "HF_TOKEN")


def everything_below(*folders: Path) -> str:
    files = (p for folder in folders for p in folder.rglob("*") if p.is_file())
    return "\n".join(str(p) + p.read_bytes().decode(errors="replace") for p in files)


def test_a_run_leaves_no_secret_of_its_environment_anywhere(project: Path, tmp_path: Path) -> None:
    """The real entry with real Ray: outputs, receipts, ledger, report, replicas' logs, both streams."""
    write_jsonl(project / "rows.jsonl", rows_of(25))
    environment = {**os.environ, **dict.fromkeys(NAMES, CANARY), "PYTHONPATH": str(ROOT)}
    environment["BATCHQ_CACHE"] = str(tmp_path / "cache-of-its-own")
    batchq = [sys.executable, "-m", "batchq"]
    said = ""
    for command in (["plan", f"+engine.options.api_key={CANARY}"], ["run"]):
        arguments = [*batchq, command[0], "job=mine", "engine=fake", *command[1:]]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    assert json.loads((project / "out/meta/report.json").read_text())["rows"] == 25
    assert CANARY not in said + everything_below(project / "out", tmp_path / "cache-of-its-own")
    assert not (project / "outputs").exists(), "Hydra saves no copy of the command line"


def test_what_reaches_a_store_holds_none_of_its_credentials(
    s3: S3,
    compose: Callable[..., Config],
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    write_jsonl(project / "rows.jsonl", rows_of(5))
    output = s3.make_bucket("secrets") + "/out"
    config = compose(f"output.path={output}")
    with pytest.raises(FileNotFoundError):  # `labelled` reads a local manifest
        finished(config)
    stored = [(found.uri, storage.read(found.uri)) for found in storage.list_objects(output)]
    assert any(uri.endswith("report.json") for uri, _ in stored)
    said = "".join(capfd.readouterr())
    for secret in (s3.env["AWS_SECRET_ACCESS_KEY"], s3.env["AWS_ACCESS_KEY_ID"]):
        assert not any(secret in uri or secret.encode() in data for uri, data in stored)
        assert secret not in said


@pytest.mark.parametrize("uri", ["s3://id:{}@b/x.jsonl", "s3://b/x.jsonl?X-Amz-Signature={}", "az://b/x?sv=1&sig={}"])
@pytest.mark.parametrize("field", ["input.path", "output.path"])
def test_a_secret_in_a_uri_is_refused_and_not_shown(
    uri: str, field: str, compose: Callable[..., Config], project: Path
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    given = uri.format(CANARY)
    with pytest.raises(BatchqError) as refused:
        finished(compose(f'{field}="{given}"'))
    assert CANARY not in str(refused.value)
    assert CANARY not in everything_below(project)
