"""What a run tells of itself: the same to a webhook, standard error and the JSON log, and never at its expense."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from batchq.account import webhook
from batchq.account.events import Events, Kind
from batchq.account.webhook import Webhook
from batchq.cli import main
from batchq.config import Config, EventsConfig
from batchq.errors import ConfigError, Stopped
from batchq.job import label, session
from batchq.job.session import open_session
from batchq.machine import log
from batchq.machine.log import LogSetting
from tests.helpers import rows_of, write_jsonl
from tests.jobs import OneWorker

SECRET = "T0/B0/canary-of-a-hook"
CANARY = "a caller says"


class Receiver(ThreadingHTTPServer):
    """Takes POSTs. `statuses` are answered in turn, then 200; `hang`: it takes a request and answers nothing."""

    daemon_threads = True

    def __init__(self, statuses: tuple[int, ...], hang: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses, self.hang = list(statuses), hang
        self.got: list[dict[str, Any]] = []
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{SECRET}"


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.hang:
            self.server.over.wait(30)
            return
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        if status == 200:
            self.server.got.append(json.loads(body))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def receiver(*statuses: int, hang: bool = False) -> Iterator[Receiver]:
    with Receiver(statuses, hang) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "PAUSES", (0.01, 0.01))
    monkeypatch.setattr(webhook, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(webhook, "CLOSE_SECONDS", 2.0)


def told(url: str, events: int = 1, **post: Any) -> list[str]:
    """Post so many, close; the warnings."""
    warnings: list[str] = []
    hook = Webhook(url, warnings.append)
    for number in range(events):
        hook.post(json.dumps({"number": number}).encode(), **post)
    hook.close()
    return warnings


def test_a_webhook_gets_every_event_in_order() -> None:
    with receiver() as server:
        assert told(server.url, 20) == []
        assert [event["number"] for event in server.got] == list(range(20))


@pytest.mark.parametrize("status", [500, 503, 429])
def test_what_another_attempt_may_change_is_tried_again(status: int) -> None:
    with receiver(status, status) as server:
        assert told(server.url) == []
        assert len(server.got) == 1


@pytest.mark.parametrize(("status", "left"), [(500, 0), (404, 2), (302, 2)])
def test_what_is_refused_is_warned_of_once_and_the_rest_goes_on(status: int, left: int) -> None:
    with receiver(status, status, status) as server:
        (warning,) = told(server.url)
        assert warning == f"events: 1 of 1 couldn't be delivered to 127.0.0.1: HTTP {status}"
        assert SECRET not in warning and len(server.statuses) == left


def test_a_webhook_that_hangs_or_is_gone_costs_a_few_seconds_at_the_end_and_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(webhook, "CLOSE_SECONDS", 0.3)
    with receiver(hang=True) as server:
        began = time.monotonic()
        (warning,) = told(server.url, 5)
        assert time.monotonic() - began < 2
    assert warning.startswith("events: 5 of 5 couldn't be delivered to 127.0.0.1: ")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    (warning,) = told(url)
    assert warning == "events: 1 of 1 couldn't be delivered to 127.0.0.1: Connection refused"


def test_more_events_than_can_wait_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(webhook, "WAITING", 3)
    with receiver(hang=True) as server:
        (warning,) = told(server.url, 50)
    assert warning.startswith("events: 50 of 50 ")


def test_the_same_object_goes_to_webhook_and_standard_error_and_the_json_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with receiver() as server, log.configured(LogSetting(format="json", run="r1")) as progress:
        events = Events(EventsConfig(server.url, stderr=True), "r1", "mine", "/out", progress)
        heard: list[Kind] = []
        events.listeners.append(lambda event: heard.append(event.kind))
        events.emit(Kind.started, shards=3)
        events.emit(Kind.failed, exit_code=1, reason="no engine")
        events.close()
        assert heard == [Kind.started, Kind.failed]
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    logged, printed = [r for r in lines if "event" in r], [r for r in lines if "event" not in r]
    assert server.got == printed == [record["event"] for record in logged]
    assert [record["level"] for record in logged] == ["info", "info"]
    assert set(printed[0]) == {"kind", "time", "run", "job", "output", "data"}
    assert printed[0]["kind"] == "started" and printed[0]["data"] == {"shards": 3}


def test_a_text_log_has_no_events(capsys: pytest.CaptureFixture[str]) -> None:
    with log.configured(LogSetting()) as progress:
        Events(EventsConfig(), "r1", "mine", "/out", progress).emit(Kind.failed, reason="no engine")
    assert capsys.readouterr().err == ""


def test_a_run_that_is_stopped_says_so_last_and_another_command_says_nothing(
    compose: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose("events.stderr=true")
    for verb in ("run", "quantize"):
        with pytest.raises(Stopped), open_session(config, verb):
            raise Stopped("stopped before anything was started")
    (event,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (event["kind"], event["data"]["exit_code"]) == ("stopped", 3)
    assert event["output"].endswith("/out") and event["job"] == "mine"


def test_a_run_tells_from_plan_to_completion_and_holds_no_text_of_a_row(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", [{**row, "text": CANARY} for row in rows_of(60)])
    monkeypatch.setattr(session, "Pool", OneWorker)
    monkeypatch.setattr(label, "EVENT_SECONDS", 0.0)
    monkeypatch.setattr(label, "BUDGET_SHARES", (1e-9, 1e-8))
    with receiver() as server:
        monkeypatch.setenv("BATCHQ_WEBHOOK", server.url)
        assert main(["job=mine", "engine=fake", "pricing.budget=1e3", "pricing.per_hour.cpu_core=3600"]) == 0
        assert "60 = 60 answers" in capsys.readouterr().out
        kinds = [event["kind"] for event in server.got]
        seldom = [kind for kind in kinds if kind != "progress"]  # which the last ones overtake
        assert seldom == ["planned", "started", "budget", "budget", "completed"]
        data = {event["kind"]: event["data"] for event in server.got}
        assert data["planned"]["shards"] == 3 and data["started"]["shards"] == 3
        assert data["completed"]["rows"] == 60 and data["completed"]["exit_code"] == 0
        assert CANARY not in str(server.got) and SECRET not in str(server.got)
        assert main(["job=mine", "engine=fake"]) == 0
        assert server.got[-1]["kind"] == "completed", "a run that has nothing to do says so"


@pytest.mark.parametrize(
    "url",
    [f"https://me:{SECRET}@host/x", f"https://host/x?token={SECRET}", f"https://host/x#{SECRET}", f"ftp://{SECRET}"],
)
def test_a_secret_in_the_configuration_is_refused_and_not_shown(url: str, compose: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(f'events.webhook="{url}"')
    assert "events.webhook" in str(refused.value) and SECRET not in str(refused.value)


def test_the_environment_may_hold_any_url(compose: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHQ_WEBHOOK", f"https://host/x?token={SECRET}")
    assert SECRET not in str(compose())
    monkeypatch.setenv("BATCHQ_WEBHOOK", f"host/{SECRET}")
    with pytest.raises(ConfigError, match="BATCHQ_WEBHOOK: must be a URL") as refused:
        compose()
    assert SECRET not in str(refused.value)
