"""gate: what two models' answers come to, and how sure that is."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from batchq.cli import main
from batchq.config import Config, GateConfig, Scheme
from batchq.engine.protocol import Completion, Prompt
from batchq.errors import ConfigError
from batchq.job import gate
from batchq.job.run import ingredients_after
from batchq.job.scheme import _refused
from batchq.model.source import resolve
from batchq.model.tokenizer import open_tokenizer
from batchq.plan import sample
from batchq.plan.draft import make_plan
from batchq.plan.sample import Sample
from batchq.quantize.verdict import Verdict, judge
from batchq.records import Failure
from batchq.task.task import Task
from tests.helpers import rows_of, write_jsonl

LABELS = ["positive", "negative"]


def answers(said: np.ndarray, sure: float = 0.9) -> list[Completion | Failure]:
    """One scored answer a row; `said` holds label indices."""
    low, high = math.log(1 - sure), math.log(sure)
    return [Completion((high, low) if label == 0 else (low, high), "", "length", 5, 0, 1) for label in said]


def verdict(rows: int, lost: float, config: GateConfig | None = None, gold: bool = True) -> Verdict:
    """A baseline that is right on 80% of the rows, and a quantized model that loses `lost` of those."""
    random = np.random.default_rng(7)
    truth = random.integers(0, 2, rows)
    first = np.where(random.random(rows) < 0.8, truth, 1 - truth)
    second = np.where((first == truth) & (random.random(rows) < lost), 1 - first, first)
    asked = Sample([Prompt([1, 2])] * rows, [LABELS[t] if gold else None for t in truth])
    return judge("int8", asked, answers(first), answers(second), LABELS, config or GateConfig())


def test_the_same_answers_keep_everything() -> None:
    found = verdict(300, 0.0)
    assert (found.verdict, found.recovery, found.low, found.high) == ("pass", 1.0, 1.0, 1.0)
    assert found.agreement == 1.0 and found.kl == pytest.approx(0.0) and found.flips == {"lost": 0, "gained": 0}
    assert found.baseline == found.quantized == pytest.approx(0.8, abs=0.08)


def test_a_large_loss_fails_and_a_small_sample_cannot_tell() -> None:
    bad = verdict(2000, 0.2)
    assert bad.verdict == "fail" and bad.recovery == pytest.approx(0.8, abs=0.04)
    assert bad.high is not None and bad.high < 0.99
    assert not bad.accepts(strict=False) and "fails 99.0%" in bad.words()
    few = verdict(200, 0.02)
    assert few.verdict == "undecided" and few.needs and few.accepts(strict=False) and not few.accepts(strict=True)
    assert f"about {few.needs:,} would do" in few.words()


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """100 samples from a model that truly keeps 95%: a 95% interval misses about 5 of them, and is as wide as that of
    a share of the 320 rows that the baseline gets right."""
    random, covered, width = np.random.default_rng(0), 0, 0.0
    for _ in range(100):
        first = (random.random(400) > 0.8).astype(int)
        second = np.where((first == 0) & (random.random(400) < 0.05), 1, first)
        asked = Sample([Prompt([1])] * 400, ["positive"] * 400)
        found = judge("x", asked, answers(first), answers(second), LABELS, GateConfig())
        assert found.low is not None and found.high is not None
        covered += found.low <= 0.95 <= found.high
        width += (found.high - found.low) / 100
    assert 88 <= covered <= 99, "one that never misses says nothing"
    assert width == pytest.approx(2 * 1.96 * math.sqrt(0.95 * 0.05 / 320), rel=0.1)


def test_without_gold_the_labels_that_stay_are_judged() -> None:
    found = verdict(1000, 0.3, gold=False)
    assert found.measure == "agreement" and found.verdict == "fail"
    assert found.recovery == found.agreement == pytest.approx(1 - 0.3 * 0.8, abs=0.05)
    few = GateConfig(min_gold=5000)
    assert verdict(1000, 0.3, few).measure == "agreement"


def test_rows_that_one_model_cannot_answer_are_left_out_and_counted() -> None:
    asked = Sample([Prompt([1])] * 100, ["positive"] * 100)
    first, second = answers(np.zeros(100)), answers(np.zeros(100))
    second[3] = Failure("engine_refused", "no")
    second[4] = Completion((math.nan, 0.0), "", "length", 1, 0, 1)
    found = judge("int8", asked, first, second, LABELS, GateConfig())
    assert (found.rows, found.failed, found.verdict) == (98, 2, "pass")
    nothing = judge("int8", asked, first, [Failure("x", "y")] * 100, LABELS, GateConfig())
    assert nothing.verdict == "undecided" and nothing.judged == 0


def test_a_baseline_that_is_never_right_leaves_the_upper_bound_open() -> None:
    """Infinity is no number that a report in JSON could hold: such a run ended in a traceback."""
    wrong = answers(np.ones(100))
    found = judge("int8", Sample([Prompt([1])] * 100, ["positive"] * 100), wrong, wrong, LABELS, GateConfig())
    assert (found.verdict, found.high, found.needs) == ("undecided", None, None)
    assert "[0.0%, ?]" in found.words() and json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_text_is_judged_by_perplexity_and_by_its_tokens() -> None:
    def texts(loss: float, ids: tuple[int, ...]) -> list[Completion | Failure]:
        return [Completion((), "", "stop", 11, 0, 3, ids, -loss * 10 - i % 3) for i in range(200)]

    asked = Sample([Prompt([1] * 11)] * 200, [None] * 200)
    found = judge("fp8", asked, texts(2.0, (5, 6, 7, 8)), texts(2.1, (5, 6, 9, 8)), [], GateConfig())
    assert found.measure == "perplexity" and found.agreement == 0.5 and found.verdict == "fail"
    assert found.recovery == pytest.approx(math.exp(-0.1)) == pytest.approx(found.baseline / found.quantized)


@pytest.mark.parametrize(
    "named",
    [
        [],
        ["quantization.calibration=rows.jsonl"],
        ["gate.input=rows.jsonl"],
        ["quantization.calibration=copy.jsonl"],
        ["gate.input=copy.jsonl", "quantization.calibration=rows.jsonl"],
    ],
    ids=["corpus", "calibration is the corpus", "gate.input is the corpus", "calibration is a copy", "both named"],
)
def test_no_row_is_judged_by_that_was_calibrated_on(
    named: list[str], compose: Callable[..., Config], project: Path
) -> None:
    """By what they ask: a row that stands twice, or in a copy of the corpus, would be seen in both otherwise."""
    corpus = [{**row, "text": f"row {row['id'] % 150} says that all is well"} for row in rows_of(400)]
    write_jsonl(project / "rows.jsonl", corpus)
    write_jsonl(project / "copy.jsonl", corpus[:200][::-1])
    config = compose("quantization.scheme=int8", "quantization.samples=60", *named)
    model = resolve(config.model)
    draft = make_plan(config, model.digest, Scheme.int8, "")
    task = Task(config.task, open_tokenizer(model.path), draft.columns)
    calibrated = {tuple(ids) for ids in sample.calibration(config, draft, task)}
    judged = {tuple(prompt.token_ids) for prompt in sample.judging(config, draft, task).prompts}
    assert len(calibrated) >= 30 and len(judged) >= 30
    assert not calibrated & judged


def test_a_gate_without_a_row_that_was_not_calibrated_on_says_so(compose: Callable[..., Config], project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(40))
    config = compose("quantization.scheme=int8", "quantization.calibration=rows.jsonl", "gate.input=rows.jsonl")
    model = resolve(config.model)
    draft = make_plan(config, model.digest, Scheme.int8, "")
    task = Task(config.task, open_tokenizer(model.path), draft.columns)
    with pytest.raises(ConfigError, match="no row to judge by but the 40 that were calibrated on; name others in gate"):
        sample.judging(config, draft, task)


def test_answers_are_remembered_without_text(cache: object) -> None:
    kept: list[Completion | Failure] = [
        Completion((-0.1, -2.0), "private", "stop", 3, 0, 1, (4,), -1.0),
        Failure("too_long", "too long"),
    ]
    assert gate.recall_answers("k") is None
    gate.remember_answers("k", kept)
    found = gate.recall_answers("k")
    assert found is not None and found[1] == kept[1]
    assert isinstance(found[0], Completion) and found[0].text == "" and found[0].logprobs == (-0.1, -2.0)


@pytest.mark.parametrize(
    ("fallback", "served", "resumes"),
    [
        (None, Scheme.none, True),
        (None, Scheme.int8_rtn, False),
        ([], Scheme.none, False),
        ([Scheme.fp8], Scheme.fp8, True),
    ],
    ids=["further up the ladder", "below the asked one", "no fallback", "the named one"],
)
def test_a_run_that_fell_back_is_resumed_and_another_scheme_is_not(
    fallback: list[Scheme] | None, served: Scheme, resumes: bool, compose: Callable[..., Config], project: Path
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    config = compose("quantization.scheme=int8")
    config.gate.fallback = fallback
    model = resolve(config.model)
    before = make_plan(config, model.digest, served, "")
    assert (ingredients_after(config, model, before) == before.ingredients) is resumes


def test_a_strict_gate_says_what_it_could_not_tell() -> None:
    few = verdict(200, 0.02)
    assert few.needs and _refused(few).endswith(f"undecided under gate.strict (about {few.needs:,} rows would decide)")


# ---- the whole of it, on the real engine ----


@pytest.mark.engine
def test_a_real_engine_walks_the_ladder_and_refuses_scrambled_scales(
    project: Path, cache: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a recovery that nothing reaches: every rung is asked, then exit code 5, or the model itself. And a
    checkpoint whose scales stand in the wrong rows is no model any more."""
    texts = [
        {"id": i, "text": f"order {i} {'came late' if i % 3 else 'is fine'} and number {i * i}"} for i in range(160)
    ]
    write_jsonl(project / "rows.jsonl", [{**row, "gold": None} for row in texts])
    asked = ["job=mine", "quantization.scheme=int8_rtn", "quantization.samples=8", "gate.recovery=1.5"]
    assert main([*asked, "gate.fallback=[int8]"]) == 5
    refused = capsys.readouterr().err
    assert "int8_rtn keeps" in refused and "; int8 keeps" in refused
    assert not (project / "out/data").exists() and not (project / "out/meta/plan.json").exists()

    assert main(asked) == 0  # the ladder's own end: the model as it is; both verdicts were kept
    report = json.loads((project / "out/meta/report.json").read_text())
    assert (report["quantization"], report["rows"], report["answers"]) == ("none", 160, 160)
    assert [v["verdict"] for v in report["gate"]] == ["fail", "fail"]
    refused, done = report["runs"]
    assert refused["state"] == "refused" and refused["device_seconds"]["gate"] > 0 and refused["cost"] > 0
    assert done["device_seconds"]["gate"] == 0

    cards = {json.loads(p.read_text())["recipe"]["scheme"]: p.parent for p in cache.glob("checkpoints/*/batchq.json")}
    from safetensors.torch import load_file, save_file

    shutil.copytree(cards["int8_rtn"], project / "scrambled")
    weights = project / "scrambled/model.safetensors"
    tensors = load_file(weights)
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name] = tensors[name].flip(0).contiguous() * 4
    save_file(tensors, weights, {"format": "pt"})
    scrambled = ["job=mine", f"model.path={project / 'scrambled'}", f"gate.baseline={tiny}", "output.path=other"]
    assert main(scrambled) == 5
    assert "none keeps" in capsys.readouterr().err
    assert not (project / "other/data").exists()
