"""Answers that are sampled, and answers that are cut off."""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batchq.account.usage import Counters
from batchq.config import Config
from batchq.engine.protocol import EngineSpec, Prompt, Sampling
from batchq.engine.vllm import VllmEngine
from batchq.errors import EngineError
from batchq.records import Answer, Failure
from batchq.worker.counters import Tally
from tests.helpers import write_jsonl
from tests.jobs import finished, labelled, planned, worker
from tests.jobs import rows as rows_at

TEXT = ("task.kind=generate", "task.labels=[]", "task.gold=null", "task.prompt='Say: {{ text }}'", "task.name=said")
SAMPLED = (*TEXT, "task.temperature=0.7")


def same_rows(project: Path, count: int = 30) -> None:
    write_jsonl(project / "rows.jsonl", [{"id": i, "text": "all is well"} for i in range(count)])


def said(config: Config) -> list[str]:
    return [row["said"] for row in rows_at(config)]


def test_equal_rows_are_drawn_anew_and_the_same_run_again_is_the_same(
    project: Path, compose: Callable[..., Config]
) -> None:
    same_rows(project)
    found = []
    for out in ("a", "b"):
        config = compose(*SAMPLED, f"output.path={out}")
        finished(config)
        found.append(said(config))
        assert len({row["batchq_key"] for row in rows_at(config)}) == 30, "equal keys have equal answers"
    assert len(set(found[0])) == 30 and found[0] == found[1]
    other = compose(*SAMPLED, "task.seed=1", "output.path=c")
    finished(other)
    assert not set(said(other)) & set(found[0])


def test_without_sampling_equal_rows_have_one_key_and_one_answer(project: Path, compose: Callable[..., Config]) -> None:
    same_rows(project)
    config = compose(*TEXT)
    finished(config)
    assert len({row["batchq_key"] for row in rows_at(config)}) == len(set(said(config))) == 1


def test_draws_outlive_a_death_and_are_reused(project: Path, compose: Callable[..., Config]) -> None:
    same_rows(project)
    whole = compose(*SAMPLED, "output.path=whole")
    finished(whole)
    config = compose(*SAMPLED, "output.rows_per_shard=1000")
    fixed = planned(config)
    with pytest.raises(EngineError):
        asyncio.run(labelled(config, fixed, die_after=10))
    (receipt,) = asyncio.run(labelled(config, fixed))
    assert receipt.from_spill >= 10
    assert said(config) == said(whole)
    again = compose(*SAMPLED, "output.path=again", "output.reuse=out")
    receipts = asyncio.run(labelled(again, planned(again)))
    assert sum(r.from_reuse for r in receipts) == 30 and said(again) == said(whole)


def test_vllm_is_given_each_row_s_seed_and_shares_the_rest() -> None:
    engine = VllmEngine(EngineSpec("vllm", "model", 100, 100, 10))
    sampling, greedy = Sampling(max_tokens=5, temperature=0.7, seed=3), Sampling(max_tokens=5)
    engine._params = {sampling: SimpleNamespace(seed=3, max_tokens=5), greedy: SimpleNamespace(seed=None)}
    one, two, same = (engine.request_params(Prompt([1], seed), sampling) for seed in (11, 12, 11))
    assert (one.seed, two.seed, same.seed) == (11, 12, 11) and one.max_tokens == 5
    assert engine.request_params(Prompt([1]), sampling).seed == 3
    assert engine.request_params(Prompt([1], 11), greedy).seed is None
    assert len(engine._params) == 2, "and none is cached for each row"


def cut(config: Config, project: Path) -> tuple[dict[str, Any], int, str]:
    """A run whose answers are cut off where the fake engine is told so: (report, exit code, what its end says)."""
    from batchq import storage
    from batchq.plan.committed import read_committed
    from batchq.report.outcome import finish

    fixed = planned(config)
    asyncio.run(labelled(config, fixed, cut_every=4))
    result = finish(config, fixed, read_committed(fixed, storage.normalize(config.output.path)), [])
    return json.loads((project / "out/meta/report.json").read_text()), result.exit_code, result.text


LIMITS = {
    "by default": ((), 4, "25.0% of the answers were cut off, above output.max_truncated_rate=0.05: exit code 4"),
    "allowed": (("output.max_truncated_rate=0.25",), 0, ""),
    "never minded": (("output.max_truncated_rate=1",), 0, ""),
}


@pytest.mark.parametrize("case", LIMITS)
def test_answers_that_were_cut_off_are_counted_told_and_end_in_exit_code_4(
    case: str, project: Path, compose: Callable[..., Config]
) -> None:
    overrides, code, words = LIMITS[case]
    same_rows(project, 40)
    report, ended, text = cut(compose(*SAMPLED, *overrides), project)
    assert (report["truncated"], report["answers"], ended) == (10, 40, code)
    assert "  cut off    10 of 40 answers (25.0%) have no end" in text
    assert words in text and ("with too many answers cut off" in text) is (code == 4)
    assert "cut off" in (project / "out/meta/report.html").read_text()
    with (project / "out/meta/report.csv").open() as file:
        assert [line["truncated"] for line in csv.DictReader(file)] == ["10"]


def test_labels_are_never_cut_off(project: Path, compose: Callable[..., Config]) -> None:
    """They are scored, and vLLM calls that an answer that was ended by its length."""
    write_jsonl(project / "rows.jsonl", [{"text": "a", "gold": "good"}])
    finished(compose())
    assert json.loads((project / "out/meta/report.json").read_text())["truncated"] == 0


def test_the_live_counters_count_them_too(project: Path, compose: Callable[..., Config]) -> None:
    same_rows(project, 8)
    config = compose(*SAMPLED)
    fixed = planned(config)

    async def counters() -> Counters:
        made = worker(config, fixed, cut_every=2)
        await made.start()
        try:
            for shard in fixed.shards:
                await made.label(shard)
            return made.snapshot().counters
        finally:
            await made.close()

    assert asyncio.run(counters()).truncated == 4
    tally = Tally()
    tally.answered(Answer({}, 1, 0, 1), True)
    tally.not_asked(Answer({}, 1, 0, 1), True)
    tally.not_asked(Failure("a", "b"))
    assert tally.counters().truncated == 2
    assert (Counters(truncated=1) + Counters(truncated=2)).truncated == 3
