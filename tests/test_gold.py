"""Gold values: which label each means, and that no accuracy is told of those that mean none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from batchq.cli import main
from batchq.config import Config, TaskConfig, TaskKind
from batchq.records import Answer
from batchq.task import answers
from batchq.task.gold import Gold
from tests.helpers import LABELS, write_jsonl
from tests.jobs import finished

WORDS = ["positive", "Negative", "none"]
NUMBERS = ["1", "2", "10"]
BOOLEANS = ["true", "false"]

MEANT: list[tuple[list[str], Any, str | None]] = [
    *((WORDS, value, "positive") for value in ("positive", "Positive ", " POSITIVE\n", b"positive")),
    *((WORDS, value, "Negative") for value in ("Negative", "negative")),
    (WORDS, "none", "none"),
    (WORDS, "None", "none"),
    (WORDS, None, None),
    *((NUMBERS, value, "1") for value in (1, 1.0, "1", "1.0", " 01 ", Decimal("1.00"))),
    (NUMBERS, 10.0, "10"),
    *((BOOLEANS, value, "true") for value in (True, "True", "TRUE")),
    (BOOLEANS, False, "false"),
    *((NUMBERS, value, None) for value in (None, math.nan, "nan", "NaN", "", "  ", "None", "null", "<NA>")),
    (NUMBERS, 1.5, "1.5"),
    (NUMBERS, "one", "one"),
    (WORDS, "good", "good"),
    (["A", "a"], "a", "a"),
    (["A", "a"], " a", " a"),  # which of them, nobody knows
    (["12345678901234567890", "12345678901234567891"], 12345678901234567891, "12345678901234567891"),
]


@pytest.mark.parametrize(("labels", "value", "meant"), MEANT)
def test_a_gold_value_means_its_label_however_it_is_written(labels: list[str], value: Any, meant: str | None) -> None:
    assert Gold(TaskConfig(labels=labels, gold="gold")).of({"gold": value}) == meant


@pytest.mark.parametrize(
    ("value", "meant"), [("None", "None"), ("", None), ("nan", None), (math.nan, None), (None, None), ("Yes ", "Yes ")]
)
def test_where_the_answer_is_free_a_word_for_nothing_may_be_the_answer(value: Any, meant: str | None) -> None:
    gold = Gold(TaskConfig(kind=TaskKind.generate, gold="gold"))
    assert gold.of({"gold": value}) == meant
    assert Gold(TaskConfig(kind=TaskKind.generate)).of({"gold": "x"}) is None


def test_a_generated_number_is_right_however_it_is_written() -> None:
    space = answers.of(TaskConfig(kind=TaskKind.generate, name="said"))
    said: list[Any] = [Answer({"said": text, "said_finish": "stop"}, 1, 0, 1) for text in ("1", "2", "2.50")]
    assert space.counts(said, ["1.0", "3.0", "2.5"]).correct == 2


def test_generated_text_is_right_whatever_its_case_and_the_spaces_around() -> None:
    space = answers.of(TaskConfig(kind=TaskKind.generate, name="said"))
    said: list[Any] = [Answer({"said": f" {text}\n", "said_finish": "stop"}, 1, 0, 1) for text in ("Yes", "no", "no")]
    counts = space.counts(said, ["yes ", "No", "yes"])
    assert (counts.gold, counts.correct, counts.gold_unknown) == (3, 2, 0)


def rows(golds: list[Any]) -> list[dict[str, Any]]:
    return [{"id": i, "text": f"row {i} says that all is well", "gold": gold} for i, gold in enumerate(golds)]


def accuracy_line(project: Path, compose: Callable[..., Config], golds: list[Any]) -> tuple[str, dict[str, Any]]:
    """What a run's end says of accuracy, and its report."""
    write_jsonl(project / "rows.jsonl", rows(golds))
    from batchq.report import facts

    finished(compose())
    report = json.loads((project / "out/meta/report.json").read_text())
    lines = [line for line in facts.terminal_text(report).splitlines() if line.startswith("  accuracy ")]
    assert "<html" in (page := (project / "out/meta/report.html").read_text())
    assert not lines or lines[0].split(maxsplit=1)[1][:7] in page
    return "".join(lines), report


def test_gold_of_another_spelling_is_compared(project: Path, compose: Callable[..., Config]) -> None:
    plain = accuracy_line(project, compose, [LABELS[i % 3] for i in range(12)])[1]["accuracy"]
    for path in sorted((project / "out").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    line, report = accuracy_line(project, compose, [f" {LABELS[i % 3].upper()} " for i in range(12)])
    assert report["accuracy"] == plain and f"{plain:.3f} against gold on 12 rows" in line


END: dict[str, tuple[list[Any], str]] = {
    "none known": (["x"] * 6, "unknown: passed over: 6 rows whose gold value is none of the labels"),
    "some known": (
        ["good", "bad", "fine", "x", None, "nan"],
        "against gold on 3 rows; passed over: 1 rows whose gold value is none of the labels",
    ),
    "empty": ([None, "", "nan"], "unknown: no answered row has a value in task.gold=gold"),
}


@pytest.mark.parametrize("case", END)
def test_a_run_s_end_says_what_of_gold_tells_nothing(case: str, project: Path, compose: Callable[..., Config]) -> None:
    golds, words = END[case]
    assert words in accuracy_line(project, compose, golds)[0]


PLAN: dict[str, tuple[list[Any], str]] = {
    "none known": (["x", "good", None], "1 of 2 sampled gold values in task.gold=gold are none of task.labels"),
    "empty": ([None, ""], "task.gold=gold is empty in all of the 2 sampled rows"),
    "spelled otherwise": (["GOOD", "bad "], ""),
}


@pytest.mark.parametrize("case", PLAN)
def test_plan_says_it_before(case: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golds, words = PLAN[case]
    write_jsonl(project / "rows.jsonl", rows(golds))
    assert main(["plan", "job=mine", "engine=fake"]) == 0
    said = capsys.readouterr().out
    assert f"warning    {words}" in said if words else "warning" not in said
