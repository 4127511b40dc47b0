"""What a person sees while a run goes on: on a terminal a bar, in a log a line now and then."""

from __future__ import annotations

import io
from typing import Any

import pytest

from batchq.machine import progress
from batchq.machine.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_a_terminal_has_a_bar_that_grows_and_leaves() -> None:
    screen = Terminal()
    show = Progress(screen)
    show.update("1 rows", 0.25)
    assert "\r" in screen.getvalue() and "##........ " in screen.getvalue()
    show.step("next")
    assert screen.getvalue().endswith("\r\x1b[K[0:00] next\n"), "the bar is wiped before another line"


def test_without_a_share_there_is_no_bar() -> None:
    screen = Terminal()
    Progress(screen).update("loading")
    assert "#" not in screen.getvalue() and "loading" in screen.getvalue()


def test_a_log_has_a_line_now_and_then_and_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    show = Progress(log)
    for rows in range(100):
        show.update(f"{rows} rows", rows / 100)
    assert log.getvalue() == "[0:00] 0 rows\n"
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    show.update("100 rows", 1.0)
    assert log.getvalue().endswith("[0:00] 100 rows\n")


def test_a_stream_that_lacks_a_letter_or_was_closed_ends_nothing() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    show = Progress(stream)
    show.step("größe")
    assert raw.getvalue() == b"[0:00] gr\\xf6\\xdfe\n"
    stream.close()
    show.step("unheard")


def line(**more: Any) -> str:
    shown: dict[str, Any] = {
        "rows": 1200,
        "failures": 0,
        "truncated": 0,
        "share": 0.25,
        "seconds_left": 37.5,
        "tokens_per_second": 5000.0,
        "phases": ("infer", "load"),
        "cost": " · 0.01 USD so far",
    }
    return progress.LabellingLine(**{**shown, **more}).words()


def test_the_line_of_a_run_says_how_far_and_how_long() -> None:
    assert line() == ("1,200 rows (25%) · ETA 0:37 · 5,000 tokens/s · replicas: 1 infer, 1 load · 0.01 USD so far")
    assert "(25%) · ETA - · 5,000" in line(seconds_left=None)
    assert "- tokens/s" in line(tokens_per_second=None) and "replicas: starting" in line(phases=())


def test_80_columns_show_how_far_and_whether_the_deadline_is_met() -> None:
    for to_spare, words in ((3600.0, "ETA 9:12:33, in time"), (-36_061.0, "ETA 9:12:33, late by 10:01:01")):
        screen = Terminal()
        show = Progress(screen)
        show._began -= 36_000
        show.update(line(rows=12_345_678, share=0.25, seconds_left=33_153.0, to_spare=to_spare), 0.25)
        shown = screen.getvalue().rpartition("\x1b[K")[2]
        assert len(shown) < 80 and f"12,345,678 rows (25%) · {words}" in shown


def test_a_wide_terminal_has_a_longer_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    screen = Terminal()
    Progress(screen).update("1 rows", 0.25)
    assert "#####............... [0:00]" in screen.getvalue()


def test_rows_that_cannot_be_counted_have_no_share_and_no_eta() -> None:
    assert line(share=None, failures=34).startswith("1,200 rows · 34 failures · 5,000 tokens/s")
    assert "ETA" not in line(share=None)
