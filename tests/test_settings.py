"""settings: which arguments an engine gets, and why."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchq.cli import main
from batchq.config import Config, EngineConfig, KvCache, QuantizationConfig, Scheme, TaskConfig, TaskKind
from batchq.engine.protocol import Prompt
from batchq.job.served import Served, served_on
from batchq.machine.hardware import Gpu, Hardware
from batchq.model.source import resolve
from batchq.plan.draft import make_plan
from batchq.plan.sample import Lengths
from batchq.quantize.checkpoint import Checkpoint
from batchq.records import Plan
from batchq.sizing import settings, tuned
from batchq.sizing.settings import Reason, Weights
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


@pytest.fixture
def forgetful(tmp_path: Path) -> Iterator[Path]:
    """A cache of this test's own."""
    before = os.environ["BATCHQ_CACHE"]
    os.environ["BATCHQ_CACHE"] = str(tmp_path / "cache")
    yield tmp_path / "cache"
    os.environ["BATCHQ_CACHE"] = before


def job(generate: bool = False, **engine: Any) -> Config:
    kind = TaskKind.generate if generate else TaskKind.classify
    return Config(task=TaskConfig(kind=kind, max_tokens=500), engine=EngineConfig(**engine))


def chosen(
    config: Config, here: Hardware, folder: str, lengths: Lengths = THOUSAND
) -> tuple[EngineConfig, dict[str, Reason]]:
    found, reasons = settings.choose_settings(config, DRAFT, Weights(folder, WEIGHTS), here, lengths)
    assert all(r.why and "\n" not in r.why for r in reasons)
    return found.engine, {r.name: r for r in reasons}


# ---- chosen ----


def test_a_large_gpu_gets_large_steps_and_leaves_a_tenth_of_its_memory_free(folder: str) -> None:
    engine, reasons = chosen(job(), H200, folder)
    assert (engine.max_num_batched_tokens, engine.max_num_seqs) == (16384, 1024)
    graphs = {"compilation_config": {"cudagraph_mode": "NONE"}}
    assert engine.options == {"gpu_memory_utilization": 0.9, "linear_backend": "torch", **graphs}
    assert set(reasons) >= {"max_model_len", "max_num_batched_tokens", "max_num_seqs", "kv_cache_dtype"}
    assert "there is memory enough" in reasons["kv_cache_dtype"].why


@pytest.mark.parametrize(
    ("scheme", "here", "generate", "backend", "step"),
    [
        ("fp8", H200, False, "torch", 16384),
        ("fp8_gptq", H200, False, "torch", 16384),
        ("fp8", H200, True, None, 8192),
        ("fp8_block", H200, False, None, 16384),
        ("int8", H200, False, None, 8192),
        ("none", H200, False, None, 16384),
        ("fp8", L4, False, None, 8192),
    ],
)
def test_fp8_is_multiplied_by_cublas_where_that_was_seen_to_be_faster(
    folder: str, scheme: str, here: Hardware, generate: bool, backend: str | None, step: int
) -> None:
    """vLLM's own 8-bit products are fastest in smaller steps."""
    draft = dataclasses.replace(DRAFT, quantization=scheme)
    found, reasons = settings.choose_settings(job(generate), draft, Weights(folder, WEIGHTS), here, THOUSAND)
    assert (found.engine.options.get("linear_backend"), found.engine.max_num_batched_tokens) == (backend, step)
    assert ("8-bit products" in {r.name: r for r in reasons}["max_num_batched_tokens"].why) == (
        backend is None and step == 8192 and here is H200
    )


@pytest.mark.parametrize(
    ("weights", "activations", "backend"),
    [
        ({"type": "float", "strategy": "channel"}, {"type": "float", "strategy": "token", "dynamic": True}, "torch"),
        ({"type": "float", "strategy": "tensor"}, {"type": "float", "strategy": "tensor"}, None),
        ({"type": "float", "strategy": "block"}, {"type": "float", "strategy": "group", "dynamic": True}, None),
        ({"type": "int", "strategy": "channel"}, {"type": "int", "strategy": "token", "dynamic": True}, None),
        ({"type": "int", "strategy": "channel"}, None, None),
    ],
)
def test_a_model_that_came_quantized_is_multiplied_as_it_is_stored(
    folder: str, weights: dict[str, Any], activations: dict[str, Any] | None, backend: str | None
) -> None:
    groups: dict[str, Any] = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}}
    groups["group_0"]["input_activations"] = activations and {"num_bits": 8, **activations}
    stored = {"quant_method": "compressed-tensors", "config_groups": groups}
    config = json.loads((Path(folder) / "config.json").read_text()) | {"quantization_config": stored}
    (Path(folder) / "config.json").write_text(json.dumps(config))
    draft = dataclasses.replace(DRAFT, quantization="none")
    found, _ = settings.choose_settings(job(), draft, Weights(folder, WEIGHTS), H200, THOUSAND)
    assert found.engine.options.get("linear_backend") == backend


def test_who_names_the_products_gets_the_steps_that_suit_them(folder: str) -> None:
    engine, reasons = chosen(job(options={"linear_backend": "auto"}), H200, folder)
    assert (engine.options["linear_backend"], engine.max_num_batched_tokens) == ("auto", 8192)
    assert reasons["linear_backend"].why == "as configured"


def test_graphs_are_captured_only_for_decoding(folder: str) -> None:
    """They take memory and 11 s of each start, and a prefill's steps are too large for them."""
    scored, reasons = chosen(job(), H200, folder)
    assert scored.options["compilation_config"] == {"cudagraph_mode": "NONE"}
    assert "512 tokens" in reasons["compilation_config"].why
    generated, _ = chosen(job(generate=True), H200, folder)
    assert "compilation_config" not in generated.options
    for given in ({"compilation_config": {"cudagraph_mode": "FULL"}}, {"enforce_eager": True}):
        alike, _ = chosen(job(options=given), H200, folder)
        assert given.items() <= alike.options.items() and len(alike.options) == 3


def test_a_small_gpu_gets_smaller_steps(folder: str) -> None:
    assert chosen(job(), L4, folder)[0].max_num_batched_tokens == 8192


def test_rows_that_generate_are_as_many_as_the_cache_holds(folder: str) -> None:
    """9 GB of weights leave some 8 GiB of 22, a token takes 128 KiB, a row 1,500 tokens: tens of rows, not 1,024."""
    engine, reasons = chosen(job(generate=True), L4, folder)
    room = (0.95 * 22 * GIB - 2 * GIB - WEIGHTS) / 131072
    assert engine.max_num_seqs == int(int(room) / 1500)
    assert engine.options["gpu_memory_utilization"] == 0.95
    assert "quantization.kv_cache=fp8" in reasons["kv_cache_dtype"].why
    shorter, _ = chosen(job(generate=True), L4, folder, Lengths((100,) * 100))
    assert engine.max_num_seqs < (shorter.max_num_seqs or 0) < 1024
    large, _ = chosen(job(generate=True), H200, folder, Lengths((100,) * 100))
    assert large.max_num_seqs == 1024


def test_half_the_cache_type_is_twice_the_rows(folder: str) -> None:
    config = job(generate=True)
    half = dataclasses.replace(config, quantization=QuantizationConfig(kv_cache=KvCache.fp8))
    whole_rows, half_rows = (chosen(c, L4, folder)[0].max_num_seqs or 0 for c in (config, half))
    assert half_rows == pytest.approx(2 * whole_rows, abs=1)


def test_a_gpu_that_is_in_use_keeps_the_usual_share(folder: str) -> None:
    used = dataclasses.replace(L4.gpus[0], free=20 * GIB)
    engine, _ = chosen(job(generate=True), dataclasses.replace(L4, gpus=(used,)), folder)
    assert engine.options["gpu_memory_utilization"] == 0.9


def test_what_is_configured_is_not_changed(folder: str) -> None:
    options = {"gpu_memory_utilization": 0.5, "enforce_eager": True}
    engine, reasons = chosen(job(max_num_batched_tokens=4096, max_num_seqs=7, options=options), H200, folder)
    given = {**options, "linear_backend": "torch"}  # which nobody named
    assert (engine.max_num_batched_tokens, engine.max_num_seqs, engine.options) == (4096, 7, given)
    assert {reasons[name].why for name in ("max_num_batched_tokens", "max_num_seqs", *options)} == {"as configured"}


def test_a_cpu_without_fast_bfloat16_computes_in_float32(folder: str) -> None:
    spec = settings.engine_spec(job(), Weights(folder, 10), cpu("avx2"))
    assert spec.options["dtype"] == "float32"
    assert "dtype" not in settings.engine_spec(job(), Weights(folder, 10), cpu("avx2", "avx512f")).options
    asked = job(options={"dtype": "bfloat16"})
    assert settings.engine_spec(asked, Weights(folder, 10), cpu("avx2")).options["dtype"] == "bfloat16"
    quantized = Path(folder) / "config.json"
    quantized.write_text(json.dumps({**json.loads(quantized.read_text()), "quantization_config": {}}))
    assert "dtype" not in settings.engine_spec(job(), Weights(folder, 10), cpu("avx2")).options


def test_a_cpu_takes_a_row_in_one_step(folder: str) -> None:
    engine, reasons = chosen(job(max_model_len=4096), cpu(memory=64 * GIB), folder)
    assert (engine.max_num_batched_tokens, engine.max_num_seqs, engine.options) == (4096, 64, {"enforce_eager": True})
    assert "kv_cache_memory_bytes" in reasons and "compiling takes minutes" in reasons["enforce_eager"].why


def test_on_a_cpu_compiling_is_done_where_it_was_found_faster(forgetful: Path, folder: str) -> None:
    config, here = job(), cpu(memory=64 * GIB)
    tuned.remember(config, DRAFT, here, tuned.Tuned({"enforce_eager": False}, 3865.0, 3388.0, 1000, "2026-11-24"))
    engine, reasons = chosen(config, here, folder)
    assert engine.options == {"enforce_eager": False} and "1.14 times" in reasons["enforce_eager"].why
    given, _ = chosen(job(options={"enforce_eager": True}), here, folder)
    assert given.options == {"enforce_eager": True}


def test_an_engine_starts_with_what_the_plan_says(compose: Callable[..., Config], project: Path, tiny: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(3))
    config: Config = compose(engine="vllm")
    found = served(config, cpu(memory=8 * GIB)).settings
    assert (found.engine.max_num_batched_tokens, found.engine.max_num_seqs, found.in_flight) == (2048, 64, 128)


def served(config: Config, here: Hardware) -> Served:
    model = resolve(config.model)
    drafted = make_plan(config, model.digest, Scheme.none, "")
    return served_on(config, here, drafted, model, Checkpoint(model.path, model.digest, 10**6, 0.0, True))


@pytest.mark.parametrize("here", [H200, L4, cpu(memory=64 * GIB)], ids=["H200", "L4", "CPU"])
@pytest.mark.parametrize("generate", [False, True])
def test_the_gates_engine_and_the_labelling_one_are_the_same_to_the_bit(
    here: Hardware, generate: bool, folder: str, forgetful: Path
) -> None:
    """Or the gate's engine, which is up, would be ended and another one started."""
    config, weights = job(generate, in_flight=7), Weights(folder, WEIGHTS)
    before = settings.resolve_settings(config, DRAFT, weights, here, THOUSAND)
    later = settings.resolve_settings(config, dataclasses.replace(DRAFT, checkpoint="made"), weights, here, THOUSAND)
    assert before.engine == later.engine and before.in_flight == later.in_flight == 7
    assert settings.resolve_settings(job(generate), DRAFT, weights, here, THOUSAND).in_flight == (
        2 * before.engine.max_num_seqs
    )
    found, reasons = settings.choose_settings(config, DRAFT, weights, here, THOUSAND)
    assert before.engine == settings.engine_spec(found, weights, here) and before.reasons == tuple(reasons)


# ---- found by `tune` ----


def test_what_was_found_on_other_rows_says_so(forgetful: Path, folder: str) -> None:
    config, here = job(), H200
    tuned.remember(config, DRAFT, here, tuned.Tuned({"max_num_seqs": 256}, 2.0, 1.0, 100, "2026-11-24"))
    engine, reasons = chosen(config, here, folder)
    assert engine.max_num_seqs == 256
    assert "2.00 times what is chosen without" in reasons["max_num_seqs"].why
    assert "rows of 100 tokens where these have 1,000, so tune again" in reasons["max_num_seqs"].why
    other = dataclasses.replace(here, gpus=(Gpu("NVIDIA H100", 80 * GIB, 80 * GIB, (9, 0), ""),))
    assert chosen(config, other, folder)[0].max_num_seqs == 1024


# ---- how long the rows are ----


def test_lengths_are_ranks_of_what_was_seen() -> None:
    found = Lengths.of([Prompt([0] * n) for n in range(100, 0, -1)])
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
