"""preview and plan: what a user sees of a job before it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from batchq.cli import main
from tests.helpers import rows_of, write_jsonl


def test_preview_shows_the_first_rows_with_prompt_and_answer(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(30)
    rows[1]["text"] = "word " * 400
    write_jsonl(project / "rows.jsonl", rows)
    assert main(["preview", "job=mine", "engine=fake"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("── ") and said.out.count("── answer (") == 4
    assert rows[0]["text"] in said.out and rows[5]["text"] not in said.out
    assert "── no answer (too_long)" in said.out and "leaves 255 for the prompt" in said.out
    assert not (project / "out").exists()
    assert "the engine starts (log: " in said.err


@pytest.mark.engine
def test_preview_leaves_the_engines_chatter_to_the_log(project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(3))
    command = [sys.executable, "-m", "batchq", "preview", "job=mine", "engine=vllm"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("── ") and "INFO" not in done.stdout + done.stderr
    log = Path(done.stderr.partition("(log: ")[2].partition(")")[0])
    assert "vLLM imported in" in log.read_text()
    broken = subprocess.run([*command, "+engine.options.nonsense=1"], capture_output=True, text=True)
    assert broken.returncode == 1 and "Traceback" not in broken.stderr
    assert "engine.options.nonsense" in broken.stderr and f"log: {log.parent.parent}/" in broken.stderr


def test_gold_values_that_are_no_label_are_told_before(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By how many they are: what they are is rows' text."""
    rows = rows_of(40)
    for row in rows[:10]:
        row["gold"] = row["gold"].upper()
    rows[10]["gold"] = "secret"
    rows[11]["gold"] = None
    write_jsonl(project / "rows.jsonl", rows)
    assert main(["plan", "job=mine", "engine=fake"]) == 0
    said = capsys.readouterr().out
    told = "1 of 39 sampled gold values in task.gold=gold are none of task.labels"
    assert f"warning    {told}" in said and "secret" not in said
    write_jsonl(project / "rows.jsonl", rows_of(40))
    assert main(["plan", "job=mine", "engine=fake"]) == 0
    assert "gold values" not in capsys.readouterr().out
