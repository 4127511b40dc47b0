"""OpenLineage's events on a real HTTP server: what a run reads and writes, and how it ended; never at its expense."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from batchq.cli import main
from batchq.job import session
from batchq.telemetry.lineage import _dataset, asked, folder_of
from tests.helpers import rows_of, write_jsonl
from tests.jobs import OneWorker
from tests.receiver import Receiver, receiver

pytest.importorskip("openlineage.client")


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "Pool", OneWorker)


def told(server: Receiver) -> list[dict[str, Any]]:
    return [json.loads(post.body) for post in server.got]


def run(server: Receiver, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    monkeypatch.setenv("OPENLINEAGE_URL", f"http://{server.address}")
    return main(["job=mine", "engine=fake", *overrides])


def test_a_run_tells_what_it_reads_and_writes(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(project / "in/ds=1/rows.jsonl", rows_of(40))
    monkeypatch.setenv("OPENLINEAGE_NAMESPACE", "nightly")
    monkeypatch.setenv("OPENLINEAGE_PARENT_ID", "airflow://host/team/dag.task/0193c5e2-7c1c-7a5a-9d4b-2f1f6f0f6a00")
    with receiver() as server:
        assert run(server, monkeypatch, "input.path=in/ds=1/*.jsonl") == 0
    events = told(server)
    assert [event["eventType"] for event in events] == ["START", "RUNNING", "COMPLETE"]
    assert {post.path for post in server.got} == {"/api/v1/lineage"}
    assert len({event["run"]["runId"] for event in events}) == 1
    for event in events:
        assert event["job"] == {"namespace": "nightly", "name": "mine", "facets": {}}
        (read,), (written,) = event["inputs"], event["outputs"]
        assert (read["namespace"], read["name"]) == ("file", str(project / "in/ds=1"))
        assert (written["namespace"], written["name"]) == ("file", str(project / "out/data"))
        parent = event["run"]["facets"]["parent"]
        assert parent["job"]["namespace"] == "airflow://host/team" and parent["job"]["name"] == "dag.task"
    assert events[-1]["outputs"][0]["outputFacets"]["outputStatistics"]["rowCount"] == 40


def test_a_run_that_fails_says_why(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as server:
        assert run(server, monkeypatch, "input.path=absent.jsonl") == 2
    start, fail = told(server)
    assert (start["eventType"], fail["eventType"]) == ("START", "FAIL")
    assert "absent.jsonl" in fail["run"]["facets"]["errorMessage"]["message"]


def test_a_server_that_refuses_is_a_warning(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(20))
    with receiver(403) as server:
        assert run(server, monkeypatch) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "OpenLineage" in line)
    assert line.endswith("OpenLineage: 3 events couldn't be delivered: HTTP 403")


def test_a_client_that_is_not_installed_is_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(20))
    monkeypatch.setitem(sys.modules, "openlineage.client", None)
    with receiver() as server:
        assert run(server, monkeypatch) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "OPENLINEAGE" in line)
    assert "pip install 'batchq[lineage]'" in line and not server.got


def test_data_sets_are_named_by_openlineages_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "team")
    assert _dataset("s3://bucket/a/b") == ("s3://bucket", "a/b")
    assert _dataset("gs://bucket") == ("gs://bucket", "/")
    assert _dataset("az://box/a") == ("abfss://box@team.dfs.core.windows.net", "a")
    assert folder_of("s3://bucket/a/ds=*/x.csv") == "s3://bucket/a" and folder_of("/a/b.csv") == "/a/b.csv"


def test_who_asks_for_events() -> None:
    assert asked({}) is None and asked({"OPENLINEAGE_URL": ""}) is None
    assert asked({"OPENLINEAGE_URL": "http://x", "OPENLINEAGE_DISABLED": "True"}) is None
    assert asked({"OPENLINEAGE__TRANSPORT__TYPE": "console"}) == "OPENLINEAGE__TRANSPORT__TYPE"
