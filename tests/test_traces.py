"""A run as a trace: spans by phase, as the SDK exports them over HTTP; never at the run's expense."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from batchq.cli import main
from batchq.job import session
from batchq.telemetry.traces import asked
from tests.helpers import rows_of, write_jsonl
from tests.jobs import OneWorker
from tests.receiver import Receiver, receiver

proto = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "Pool", OneWorker)


def told(server: Receiver) -> tuple[list[Any], set[str]]:
    """Spans, and the names of services."""
    spans, services = [], set()
    for post in server.got:
        for resource in proto.ExportTraceServiceRequest.FromString(post.body).resource_spans:
            services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
            spans += [span for scope in resource.scope_spans for span in scope.spans]
    return spans, services


def run(server: Receiver, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{server.address}")
    return main(["job=mine", "engine=fake", *overrides])


def test_a_run_is_a_trace_of_its_phases(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(40))
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    monkeypatch.setenv("TRACEPARENT", f"00-{trace}-{parent}-01")
    with receiver() as server:
        assert run(server, monkeypatch) == 0
    all_spans, services = told(server)
    spans = {span.name: span for span in all_spans}
    assert len(all_spans) == len(spans)
    assert set(spans) == {"run", "model", "plan", "gate", "label", "engines start", "report"}
    assert {span.trace_id.hex() for span in all_spans} == {trace}
    assert spans["run"].parent_span_id.hex() == parent
    assert spans["engines start"].parent_span_id == spans["label"].span_id
    for name in ("model", "plan", "gate", "label", "report"):
        assert spans[name].parent_span_id == spans["run"].span_id
    for span in all_spans:
        assert spans["run"].start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
    attributes = {a.key: a.value.string_value for a in spans["run"].attributes}
    assert attributes["batchq.job_name"] == "mine" and attributes["batchq.output"] == str(project / "out")
    assert services == {"batchq"}


def test_an_error_is_the_status_of_its_phase_and_of_the_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as server:
        assert run(server, monkeypatch, "input.path=absent.jsonl") == 2
    spans = {span.name: span for span in told(server)[0]}
    for name in ("plan", "run"):
        assert spans[name].status.code == 2 and "absent.jsonl" in spans[name].status.message
    codes = {a.key: a.value.int_value for a in spans["run"].attributes}
    assert codes["batchq.exit_code"] == 2 and not spans["run"].events


def test_a_collector_that_refuses_is_a_warning(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(20))
    with receiver(400) as server:
        assert run(server, monkeypatch) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "OpenTelemetry" in line)
    assert "spans couldn't be delivered" in line


def test_an_sdk_that_is_not_installed_is_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(20))
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with receiver() as server:
        assert run(server, monkeypatch) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "OTEL_" in line)
    assert "pip install 'batchq[traces]'" in line and not server.got


def test_who_asks_for_traces() -> None:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318"}
    assert asked({}) is None and asked(endpoint) == "OTEL_EXPORTER_OTLP_ENDPOINT"
    assert asked({**endpoint, "OTEL_TRACES_EXPORTER": "none"}) is None
    assert asked({**endpoint, "OTEL_SDK_DISABLED": "true"}) is None
    assert asked({"OTEL_TRACES_EXPORTER": "console"}) == "OTEL_TRACES_EXPORTER"
