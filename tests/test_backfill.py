"""A backfill whose process is killed, again and again; and what the engine is asked for of a night.

The engine notes each prompt that it is asked in a file of its own; batchq's receipts are held against that.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from batchq.cli import main
from batchq.job import session
from batchq.model.tokenizer import open_tokenizer
from tests.helpers import rows_of, write_jsonl
from tests.jobs import OneWorker

ROOT = Path(__file__).resolve().parent.parent
JOB = ["job=mine", "engine=fake", "gate=off", "input.path=in/ds={date}", "output.path=out/{date}"]
JOB += ["output.incremental=true"]
# The command line in a process of its own, which is the worker too: what kills the engine kills the whole run.
ALONE = (
    "import sys; from batchq.cli import main; from batchq.job import session; from tests.jobs import OneWorker; "
    "session.Pool = OneWorker; sys.exit(main())"
)


def snapshot(project: Path, day: int, rows: list[dict[str, Any]]) -> None:
    write_jsonl(project / f"in/ds=2026-11-{day:02}/rows.jsonl", rows)


def asked(project: Path) -> Counter[str]:
    """How often each prompt was asked since the last look, by the engine's own notes."""
    notes = project / "asked"
    found = Counter(notes.read_text().split()) if notes.exists() else Counter()
    notes.unlink(missing_ok=True)
    return found


def report(project: Path, day: int) -> dict[str, Any]:
    return json.loads((project / f"out/2026-11-{day:02}/meta/report.json").read_text())  # type: ignore[no-any-return]


def test_five_percent_changed_some_added_some_removed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "Pool", OneWorker)
    noting = f"+engine.options.asked={project / 'asked'}"
    first = [{**row, "extra": "as it was"} for row in rows_of(200)]
    snapshot(project, 1, first)
    assert main([*JOB, "input.date=2026-11-01", noting]) == 0
    whole = asked(project)
    assert whole.total() == 200

    changed = [
        {**row, "text": f"changed {i}"} if i % 20 == 7 else {**row, "extra": "new"} for i, row in enumerate(first)
    ]
    added = [{**first[0], "id": f"new-{i}", "text": f"added {i}"} for i in range(6)]
    second = [*added[:3], *reversed(changed[8:]), *added[3:]]  # 8 rows are gone, one of them a changed one
    snapshot(project, 2, second)
    assert main([*JOB, "input.date=2026-11-02", noting]) == 0
    night = asked(project)
    assert night.total() == len(night) == 9 + 6, "5% that changed and what was added, each once"
    assert not night.keys() & whole.keys(), "nothing that the first night was asked"
    told = report(project, 2)
    assert (told["rows"], told["copied_rows"]) == (len(second), len(second) - 15)
    assert main(["verify", *JOB, "input.date=2026-11-02"]) == 0

    snapshot(project, 3, second)
    assert main([*JOB, "input.date=2026-11-03", noting]) == 0
    assert not asked(project), "a night without changes asks nothing"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("task.prompt='Say: {{ text }}'", "another task.prompt or task.system"),
        ("task.labels=[yes, no]", "task.labels"),
        ("model.path=other", "model"),
        ("quantization.scheme=int8", "scheme"),
    ],
)
def test_a_changed_recipe_asks_all_and_says_so(
    project: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
    words: str,
) -> None:
    monkeypatch.setattr(session, "Pool", OneWorker)
    shutil.copytree(tiny, project / "other")
    weights = project / "other/config.json"
    weights.write_text(json.dumps(json.loads(weights.read_text()) | {"rms_norm_eps": 0.5}))
    noting = f"+engine.options.asked={project / 'asked'}"
    for day in (1, 2):
        snapshot(project, day, rows_of(40))
    assert main([*JOB, "input.date=2026-11-01", noting]) == 0
    asked(project)
    capsys.readouterr()
    assert main([*JOB, "input.date=2026-11-02", noting, change]) == 0
    said = capsys.readouterr().err
    assert asked(project).total() == 40
    assert words in said


def test_a_backfill_that_is_killed_three_times_is_gone_on_with_by_the_same_command(
    project: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL in the first night, in the third and in the last, each in the middle of its rows."""
    tokenizer = open_tokenizer(tiny).backend_tokenizer
    rows, marks = rows_of(40), {1: "~", 3: "^", 6: "`"}
    killing: list[list[str]] = []
    for day, mark in marks.items():
        (token,) = tokenizer.encode(mark, add_special_tokens=False).ids
        killing.append([f"+engine.options.exit_token={token}", f"+engine.options.once={project / f'killed-{day}'}"])
    for day in range(1, 7):
        for i in range(2 * day, 2 * day + 2):
            rows[i]["text"] = f"row {i} changed on day {day}"
        if day in marks:
            rows[2 * day]["text"] += f" {marks[day]}"
        snapshot(project, day, rows)
    backfill = [*JOB, "input.date=2026-11-01..2026-11-06", f"+engine.options.asked={project / 'asked'}"]
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r}); {ALONE}", *backfill]
    for strike in killing:
        killed = subprocess.run([*command, *strike], cwd=project, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = asked(project)
    assert len(seen) == 40 + 5 * 2, "each change is a prompt of its own"
    twice = [key for key, times in seen.items() if times > 1]
    assert max(seen.values()) <= 2 and len(twice) <= 40 + 2 + 2, (
        f"a kill repeats what was in flight in its night: {seen}"
    )
    assert main(["verify", *JOB, "input.date=2026-11-01..2026-11-06"]) == 0
    assert capsys.readouterr().out.count("each of the input's rows once") == 6
    assert [report(project, day)["copied_rows"] for day in range(1, 7)] == [0, 38, 38, 38, 38, 38]
    again = subprocess.run([*command, "input.date=2026-11-04"], cwd=project, capture_output=True, text=True)
    assert again.returncode == 0 and not asked(project), "a single night of it is complete"
