"""tune: which settings an engine gets and why, and the fastest of those that were tried."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchq import hardware, models, settings
from batchq.cli import main
from batchq.config import Config, EngineConfig, KvCache, QuantizationConfig, Scheme, TaskConfig, TaskKind
from batchq.hardware import Gpu, Hardware
from batchq.job import tune
from batchq.job.served import Served, served_on
from batchq.plan.draft import make_plan
from batchq.plan.sample import Lengths
from batchq.quantize import Checkpoint
from batchq.records import Plan
from tests.helpers import rows_of, write_jsonl
from tests.machines import GIB, LLAMA_8B, cpu, cuda

DRAFT = Plan("", {}, "mine", (), (), "jsonl", "", ("text",), 1, "fp8", "m" * 64)
WEIGHTS = 9 * 10**9
H200 = cuda("NVIDIA H200", 9, 0, 140 * GIB)
THOUSAND = Lengths((1000,) * 100)
L4 = cuda("NVIDIA L4", 8, 9, 22 * GIB)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"max_position_embeddings": 8192}))
    return str(tmp_path)


def job(generate: bool = False, **engine: Any) -> Config:
    kind = TaskKind.generate if generate else TaskKind.classify
    return Config(task=TaskConfig(kind=kind, max_tokens=500), engine=EngineConfig(**engine))


def settle(
    config: Config, here: Hardware, folder: str, lengths: Lengths = THOUSAND
) -> tuple[EngineConfig, dict[str, settings.Reason]]:
    settled, reasons = settings.settled(config, DRAFT, folder, WEIGHTS, here, lengths)
    assert all(r.why and "\n" not in r.why for r in reasons)
    return settled.engine, {r.name: r for r in reasons}


# ---- chosen ----


def test_a_large_gpu_gets_large_steps_and_leaves_a_tenth_of_its_memory_free(folder: str) -> None:
    engine, reasons = settle(job(), H200, folder)
    assert (engine.max_num_batched_tokens, engine.max_num_seqs) == (16384, 1024)
    assert engine.options == {"gpu_memory_utilization": 0.9, "compilation_config": {"cudagraph_mode": "NONE"}}
    assert set(reasons) >= {"max_model_len", "max_num_batched_tokens", "max_num_seqs", "kv_cache_dtype"}
    assert "there is room" in reasons["kv_cache_dtype"].why


def test_graphs_are_captured_only_for_decoding(folder: str) -> None:
    """They take memory and 11 s of each start, and a prefill's steps are too large for them."""
    scored, reasons = settle(job(), H200, folder)
    assert scored.options["compilation_config"] == {"cudagraph_mode": "NONE"}
    assert "512 tokens" in reasons["compilation_config"].why
    generated, _ = settle(job(generate=True), H200, folder)
    assert "compilation_config" not in generated.options
    for given in ({"compilation_config": {"cudagraph_mode": "FULL"}}, {"enforce_eager": True}):
        kept, _ = settle(job(options=given), H200, folder)
        assert given.items() <= kept.options.items() and len(kept.options) == 2


def test_a_small_gpu_gets_smaller_steps(folder: str) -> None:
    assert settle(job(), L4, folder)[0].max_num_batched_tokens == 8192


def test_rows_that_generate_are_as_many_as_the_cache_holds(folder: str) -> None:
    """9 GB of weights leave some 8 GiB of 22, a token takes 128 KiB, a row 1,500 tokens: tens of rows, not 1,024."""
    engine, reasons = settle(job(generate=True), L4, folder)
    room = (0.95 * 22 * GIB - 2 * GIB - WEIGHTS) / 131072
    assert engine.max_num_seqs == int(int(room) / 1500)
    assert engine.options["gpu_memory_utilization"] == 0.95
    assert "quantization.kv_cache=fp8" in reasons["kv_cache_dtype"].why
    shorter, _ = settle(job(generate=True), L4, folder, Lengths((100,) * 100))
    assert engine.max_num_seqs < (shorter.max_num_seqs or 0) < 1024
    large, _ = settle(job(generate=True), H200, folder, Lengths((100,) * 100))
    assert large.max_num_seqs == 1024


def test_half_the_cache_type_is_twice_the_rows(folder: str) -> None:
    config = job(generate=True)
    half = dataclasses.replace(config, quantization=QuantizationConfig(kv_cache=KvCache.fp8))
    whole_rows, half_rows = (settle(c, L4, folder)[0].max_num_seqs or 0 for c in (config, half))
    assert half_rows == pytest.approx(2 * whole_rows, abs=1)


def test_a_gpu_that_is_in_use_keeps_the_usual_share(folder: str) -> None:
    used = dataclasses.replace(L4.gpus[0], free=20 * GIB)
    engine, _ = settle(job(generate=True), dataclasses.replace(L4, gpus=(used,)), folder)
    assert engine.options["gpu_memory_utilization"] == 0.9


def test_what_is_configured_stands(folder: str) -> None:
    options = {"gpu_memory_utilization": 0.5, "enforce_eager": True}
    engine, reasons = settle(job(max_num_batched_tokens=4096, max_num_seqs=7, options=options), H200, folder)
    assert (engine.max_num_batched_tokens, engine.max_num_seqs, engine.options) == (4096, 7, options)
    assert {reasons[name].why for name in ("max_num_batched_tokens", "max_num_seqs", *options)} == {"as configured"}


def test_a_cpu_takes_a_row_in_one_step(folder: str) -> None:
    engine, reasons = settle(job(max_model_len=4096), cpu(memory=64 * GIB), folder)
    assert (engine.max_num_batched_tokens, engine.max_num_seqs, engine.options) == (4096, 64, {"enforce_eager": True})
    assert "kv_cache_memory_bytes" in reasons and "compiling takes minutes" in reasons["enforce_eager"].why


def test_on_a_cpu_compiling_is_tried_first_and_kept(forgetful: Path, folder: str) -> None:
    config, here = job(), cpu(memory=64 * GIB)
    assert tune._axes(config, here)[0] == ("enforce_eager", [False])
    settings.remember(config, DRAFT, here, settings.Tuned({"enforce_eager": False}, 3865.0, 3388.0, 1000, "2026-11-24"))
    engine, reasons = settle(config, here, folder)
    assert engine.options == {"enforce_eager": False} and "1.14 times" in reasons["enforce_eager"].why
    given, _ = settle(job(options={"enforce_eager": True}), here, folder)
    assert given.options == {"enforce_eager": True}


def test_an_engine_starts_with_what_the_plan_says(compose: Callable[..., Config], project: Path, tiny: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(3))
    config: Config = compose(engine="vllm")
    found = served(config, cpu(memory=8 * GIB))
    assert (found.engine.max_num_batched_tokens, found.engine.max_num_seqs, found.in_flight) == (2048, 64, 128)


def served(config: Config, here: Hardware) -> Served:
    model = models.resolve(config.model)
    plan, checkpoint = (
        make_plan(config, model.digest, Scheme.none, ""),
        Checkpoint(model.path, model.digest, 10**6, 0.0, True),
    )
    return served_on(config, here, plan, model, checkpoint)


# ---- how long the rows are ----


def test_lengths_are_ranks_of_what_was_seen() -> None:
    found = Lengths.of([[0] * n for n in range(100, 0, -1)])
    assert (found.median, found.percentile(99), found.longest, found.mean) == (50, 99, 100, 50.5)
    assert found.above(90) == 10 and Lengths(()).longest == 0


def test_rows_that_would_be_failures_are_told_before(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(40)
    for row in rows[10:14]:
        row["text"] = "all is well " * 120
    write_jsonl(project / "rows.jsonl", rows)
    assert main(["plan", "job=mine", "engine=fake"]) == 0
    said = capsys.readouterr().out
    assert "warning    10.0% of the sampled rows (4 of 40) are longer than engine.max_model_len=256" in said
    (advice,) = [word for word in said.split() if word.startswith("engine.max_model_len=") and "256" not in word]
    assert main(["plan", "job=mine", "engine=fake", advice]) == 0
    assert "warning" not in capsys.readouterr().out
    rows[0]["text"] = "all is well " * 2000
    write_jsonl(project / "rows.jsonl", rows)
    assert main(["plan", "job=mine", "engine=fake"]) == 0
    assert "the model reads 2,048: shorten it in task.prompt" in capsys.readouterr().out


# ---- tried ----


@pytest.fixture
def forgetful(tmp_path: Path) -> Iterator[Path]:
    """A cache of this test's own."""
    before = os.environ["BATCHQ_CACHE"]
    os.environ["BATCHQ_CACHE"] = str(tmp_path / "cache")
    yield tmp_path / "cache"
    os.environ["BATCHQ_CACHE"] = before


SPEEDS = "+engine.options.tokens_per_s={2048: 5000, 4096: 25000}"  # with 8192 it doesn't start


def test_the_fastest_is_kept_used_and_forgotten(
    project: Path, forgetful: Path, compose: Callable[..., Config], tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(300))
    asked = ["job=mine", "engine=fake", SPEEDS]
    assert main(["tune", *asked, "tune.engines=3"]) == 0
    out, told = capsys.readouterr()
    assert "max_num_batched_tokens 4,096" in out and "times what is chosen without" in out
    assert told.count(" tokens/s (") == 2 and told.count("didn't run: the fake engine doesn't start") == 1
    assert not (project / "out").exists()

    assert main(["plan", *asked]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "max_num_batched_tokens" in x)
    assert "4,096  tuned on 20" in line and "tune again" not in line
    here = hardware.detect()
    for overrides, tokens in {(): 4096, ("engine.max_num_batched_tokens=512",): 512, ("tune.use=false",): 2048}.items():
        config: Config = compose(*overrides)
        assert served(config, here).engine.max_num_batched_tokens == tokens
    assert main(["run", *asked]) == 0
    assert main(["clean", *asked, "clean.cache_days=0.0000001"]) == 0
    assert "tuned settings" in capsys.readouterr().out and not list(forgetful.glob("*/*.json"))


def test_what_was_found_on_other_rows_says_so(forgetful: Path, folder: str) -> None:
    config, here = job(), H200
    settings.remember(config, DRAFT, here, settings.Tuned({"max_num_seqs": 256}, 2.0, 1.0, 100, "2026-11-24"))
    engine, reasons = settle(config, here, folder)
    assert engine.max_num_seqs == 256
    assert "2.00 times what is chosen without" in reasons["max_num_seqs"].why
    assert "rows of 100 tokens where these have 1,000, so tune again" in reasons["max_num_seqs"].why
    other = dataclasses.replace(here, gpus=(Gpu("NVIDIA H100", 80 * GIB, 80 * GIB, (9, 0), ""),))
    assert settle(config, other, folder)[0].max_num_seqs == 1024


def test_a_try_is_bounded_in_time_and_in_engines(
    project: Path, forgetful: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 2,000 tokens/s the rows would take a minute an engine. What is chosen without trying is twice as fast."""
    write_jsonl(project / "rows.jsonl", rows_of(3000))
    slow = ["engine=fake", "+engine.options.tokens_per_s={2048: 2000, 4096: 1000}", "engine.in_flight=4"]
    assert main(["tune", "job=mine", *slow, "tune.seconds=1", "tune.engines=2"]) == 0
    out, told = capsys.readouterr()
    assert "nothing else was faster by 2%" in out and "2 engines in" in out
    asked = [int(rows.replace(",", "")) for rows in re.findall(r"\(([\d,]+) rows in", told)]
    assert len(asked) == 2 and all(0 < rows < 1000 for rows in asked)


def test_without_rows_or_engines_a_try_is_one_line(
    project: Path, forgetful: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    assert main(["tune", "job=mine", "engine=fake"]) == 2
    assert "tune: only 5 rows of this job can be asked" in capsys.readouterr().err
    write_jsonl(project / "rows.jsonl", rows_of(50))
    assert main(["tune", "job=mine", "engine=fake", "+engine.options.tokens_per_s={1: 1}"]) == 1
    assert "no engine ran" in capsys.readouterr().err
    assert not list(forgetful.glob("tune/*"))
