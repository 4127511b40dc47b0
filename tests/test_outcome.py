"""What an output has come to, in an exit code and in words: 4 is never without its reason, nor before the end."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from batchq.config import Config
from batchq.errors import ExitCode
from batchq.report.outcome import compose_report
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
