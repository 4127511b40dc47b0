"""What was found out before and is kept in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from batchq import findings
from batchq.engine import Completion
from batchq.estimate import Reached
from batchq.job import gate
from batchq.records import Failure
from batchq.settings import Tuned

FORMS = {
    "reached": lambda kept: Reached(**kept),
    "tune": lambda kept: Tuned(**kept),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("BATCHQ_CACHE", str(tmp_path))
    yield tmp_path


@pytest.mark.parametrize("content", ["", "{", '{"rate": ', "[1, 2]", "null", '{"other": 1}', "\x00\x00"])
@pytest.mark.parametrize("kind", FORMS)
def test_a_damaged_one_is_named_and_found_out_again(
    kind: str, content: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert findings.recall(kind, "a", FORMS[kind]) is None
    assert not capsys.readouterr().err, "nothing was kept yet"
    findings.place(kind, "a").parent.mkdir()
    findings.place(kind, "a").write_text(content)
    assert findings.recall(kind, "a", FORMS[kind]) is None
    assert f"{cache}/{kind}/a.json is damaged and not used" in capsys.readouterr().err


def test_what_is_kept_takes_the_damaged_ones_place(cache: Path) -> None:
    findings.place("reached", "a").parent.mkdir()
    findings.place("reached", "a").write_text("{")
    findings.keep("reached", "a", {"rate": 2.5, "answer": 1.0, "date": "2026-11-25"})
    assert findings.recall("reached", "a", FORMS["reached"]) == Reached(2.5, 1.0, "2026-11-25")
    assert [p.name for p in cache.glob("reached/*")] == ["a.json"], "no temporary file stays"


def test_the_gates_answers_come_back_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    answers: list[Completion | Failure] = [
        Completion((-0.25, -1.5), "", "stop", 20, 4, 1, (5,), -3.5),
        Failure("too_long", "300 tokens"),
    ]
    gate.remember_answers("a", answers)
    assert gate.recall_answers("a") == answers
    findings.place("gate", "a").write_text('[{"code": "too_long"}]')
    assert gate.recall_answers("a") is None
    assert "gate/a.json is damaged" in capsys.readouterr().err
