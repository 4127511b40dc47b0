"""What a person sees while a run goes on: on a terminal a bar, in a log a line now and then."""

from __future__ import annotations

import io

import pytest

from batchq import progress
from batchq.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_that_grows_and_leaves() -> None:
    screen = Terminal()
    show = Progress(screen)
    show.update("1 rows", 0.25)
    assert "\r" in screen.getvalue() and "#####..............." in screen.getvalue()
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


def test_the_line_of_a_run_says_how_far_and_how_long() -> None:
    line = progress.labelling(1200, 0, 0.25, 10.0, 50_000, ["infer", "load"], " · 0.01 USD so far")
    assert line == "1,200 rows (25%) · 5,000 tokens/s · replicas: 1 infer, 1 load · 0.01 USD so far"
    assert progress.eta(0.25, 0.05, 10.0) == " · ETA 0:37"  # a fifth took ten seconds, three quarters are left
    assert progress.eta(0.25, 0.25, 10.0) == " · ETA -"


def test_rows_that_cannot_be_counted_have_no_share_and_no_eta() -> None:
    assert progress.labelling(1200, 34, None, 10.0, 50_000, ["infer"], "").startswith(
        "1,200 rows · 34 failures · 5,000 tokens/s"
    )
    assert progress.eta(None, 0.0, 10.0) == ""
