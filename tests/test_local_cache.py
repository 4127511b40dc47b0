"""local_cache: small results of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from batchq.engine.protocol import Completion
from batchq.job import gate
from batchq.machine import local_cache
from batchq.records import Failure
from batchq.sizing.estimate import Throughput
from batchq.sizing.tuned import Tuned

FORMS = {
    "throughput": lambda kept: Throughput(**kept),
    "tune": lambda kept: Tuned(**kept),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("BATCHQ_CACHE", str(tmp_path))
    yield tmp_path


@pytest.mark.parametrize("content", ["", "{", '{"rate": ', "[1, 2]", "null", '{"other": 1}', "\x00\x00"])
@pytest.mark.parametrize("kind", FORMS)
def test_a_damaged_one_is_named_and_found_out_again(
    kind: str, content: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert local_cache.read(kind, "a", FORMS[kind]) is None
    assert not caplog.text, "nothing was kept yet"
    local_cache.path_of(kind, "a").parent.mkdir()
    local_cache.path_of(kind, "a").write_text(content)
    assert local_cache.read(kind, "a", FORMS[kind]) is None
    assert f"{cache}/{kind}/a.json is damaged and not used" in caplog.text


def test_what_is_kept_takes_the_damaged_ones_place(cache: Path) -> None:
    local_cache.path_of("throughput", "a").parent.mkdir()
    local_cache.path_of("throughput", "a").write_text("{")
    local_cache.write("throughput", "a", {"rate": 2.5, "answer": 1.0, "date": "2026-11-25"})
    assert local_cache.read("throughput", "a", FORMS["throughput"]) == Throughput(2.5, 1.0, "2026-11-25")
    assert [p.name for p in cache.glob("throughput/*")] == ["a.json"], "no temporary file stays"


def test_the_gates_answers_come_back_as_they_were(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[Completion | Failure] = [
        Completion((-0.25, -1.5), "", "stop", 20, 4, 1, (5,), -3.5),
        Failure("too_long", "300 tokens"),
    ]
    gate.remember_answers("a", answers)
    assert gate.recall_answers("a") == answers
    local_cache.path_of("gate", "a").write_text('[{"code": "too_long"}]')
    assert gate.recall_answers("a") is None
    assert "gate/a.json is damaged" in caplog.text
