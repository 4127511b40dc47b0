"""What an output has come to, in an exit code and in words: 4 is never without its reason, nor before the end."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from batchq.account import ledger
from batchq.cli.status import status
from batchq.config import Config
from batchq.errors import BatchqError, EngineError, ExitCode, LimitReached, OtherDriver, OutputTaken, UserError
from batchq.job.session import open_session
from batchq.plan.committed import read_committed
from batchq.report.outcome import compose_report, summarise, unplanned
from tests.helpers import rows_of, write_jsonl
from tests.jobs import labelled, planned

BLANK = [{"id": 100 + i, "text": "", "gold": None} for i in range(10)]
FAILED = "of the rows failed, above output.max_error_rate=0.05"
UNREADABLE = "1 input files can't be read, or not to their ends"


@pytest.mark.parametrize(
    ("failures", "unreadable", "complete", "code", "notes"),
    [
        (False, False, True, ExitCode.COMPLETE, []),
        (True, False, True, ExitCode.TOO_MANY_FAILURES, [f"{FAILED}: exit code 4"]),
        (False, True, True, ExitCode.TOO_MANY_FAILURES, [f"{UNREADABLE}: exit code 4"]),
        (True, True, True, ExitCode.TOO_MANY_FAILURES, [f"{FAILED}: exit code 4", f"{UNREADABLE}: exit code 4"]),
        (True, True, False, ExitCode.COMPLETE, [FAILED, UNREADABLE]),
    ],
)
def test_an_exit_code_has_its_reason_and_is_of_a_complete_output(
    failures: bool,
    unreadable: bool,
    complete: bool,
    code: ExitCode,
    notes: list[str],
    project: Path,
    compose: Callable[..., Config],
) -> None:
    write_jsonl(project / "in/a.jsonl", [*(BLANK if failures else []), *rows_of(40)])
    if unreadable:
        (project / "in/b.jsonl").write_bytes("a row".encode("utf-16"))
    config = compose("input.path=in", "input.unreadable=quarantine")
    plan = planned(config)
    asyncio.run(labelled(config, plan if complete else dataclasses.replace(plan, shards=plan.shards[:1])))
    result = compose_report(config)
    assert result.exit_code == code
    said = [line for line in result.text.splitlines() if line.startswith("  note ")]
    assert len(said) == len(notes) and all(line.endswith(note) for line, note in zip(said, notes, strict=True))


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (EngineError("an engine was not ready;\n  log: a.log"), 1, "an engine was not ready; log: a.log"),
        (OSError(28, "No space left on device", "/out/meta"), 1, "/out/meta: No space left on device"),
        (
            UserError("rows.jsonl: it isn't the file that was planned"),
            2,
            "rows.jsonl: it isn't the file that was planned",
        ),
        (LimitReached("pricing.budget=6: 6.1 USD are spent"), 6, "pricing.budget=6: 6.1 USD are spent"),
        (TypeError("of a row"), 1, "TypeError: a defect of batchq's; standard error has where"),
    ],
)
def test_the_reason_of_an_end_is_on_record_and_shown(
    error: Exception, code: int, reason: str, project: Path, compose: Callable[..., Config]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(40))
    config = compose()
    planned(config)
    with pytest.raises(type(error)), open_session(config, "run"):
        raise error
    (record,) = ledger.read_runs(str(project / "out"))
    assert (record.exit_code, record.reason) == (code, reason)
    for text in (status(config), compose_report(config).text, (project / "out/meta/report.html").read_text()):
        assert f"exit code {code}: {reason}".replace("'", "&#39;") in text.replace("'", "&#39;")


@pytest.mark.parametrize("error", [OutputTaken("another model"), OtherDriver("node-7 has the lease")])
def test_a_run_that_is_none_of_an_outputs_leaves_no_record_there(
    error: BatchqError, project: Path, compose: Callable[..., Config]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(40))
    config = compose()
    planned(config)
    with pytest.raises(type(error)), open_session(config, "run"):
        raise error
    assert ledger.read_runs(str(project / "out")) == []
    assert "exit code" not in status(config)


def test_a_report_without_a_plan_has_all_that_pages_ask_for(compose: Callable[..., Config], project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(2))
    config = compose()
    plan = planned(config)
    assert set(unplanned(config)) == set(summarise(config, plan, read_committed(plan, str(project / "out")), []))


def test_a_report_that_can_not_be_written_is_the_end_of_a_run_on_record(
    project: Path, compose: Callable[..., Config]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(40))
    with pytest.raises(OSError), open_session(compose(), "run") as session:
        session.invocation.write("complete")
        raise OSError(28, "No space left on device", "out/meta/report.json")
    (record,) = ledger.read_runs(str(project / "out"))
    assert (record.state, record.exit_code) == ("failed", 1) and "No space left" in record.reason
