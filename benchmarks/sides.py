"""The sides of benchmarks/peers.py: how each is asked, and what it says that it did.

python benchmarks/sides.py generate CASE      # what peers.py starts for a side that is a function; CASE is a folder
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import case as cases
from benchmarks import process
from benchmarks.case import Case, EngineArguments
from benchmarks.process import ROOT, CannotRun

UNBOUND = ("batchq-unbound", "run-batch", "ray-data")  # on CPU cores that they choose themselves
CHANGED = {"batchq-cutlass": ["+engine.options.linear_backend=auto"]}  # what else batchq is told on a side of its own
ROUNDS = 2  # of ids and text that one start of the side "generate" goes through
BATCH_BEGINS = ("Reading batch from", "Running batch:")  # vLLM's log line, and the bar that it shows a little later
RAY_BATCHES = 16  # a Ray Data actor takes at once, when tuned


@dataclass(frozen=True, slots=True)
class Work:
    """What a side did: from the first request to the last answer, in seconds of the wall clock."""

    side: str
    begin: float
    end: float
    answers: int
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int = 0  # batchq's alone


def run(case: Case, side: str, log: Path, limit: float) -> list[Work]:
    """One start of one side, in a process of its own. Raises CannotRun when it fails."""
    return OUT_OF_PROCESS.get(side, child)(case, side, log, limit)


# ---- functions in a process of their own ----


def child(case: Case, side: str, log: Path, limit: float) -> list[Work]:
    answer = case.folder / f"{side}.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__)), side, str(case.folder)]
    process.call(command, environment(case, side), log, limit)
    return [Work(**work) for work in json.loads(answer.read_text())]


def report(case: Case, side: str, done: list[Work]) -> None:
    (case.folder / f"{side}.json").write_text(json.dumps([dataclasses.asdict(work) for work in done]))


def generate(case: Case) -> None:
    """Ids and text by turns in one engine, whose prefix cache is emptied before each."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    scores = list(case.sampling["score_ids"])
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprob_token_ids=scores,
        logprobs=len(scores),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    llm = LLM(model=case.model, **case.engine(limits=True))
    rows = case.asked()
    given: dict[str, list[Any]] = {
        "generate-ids": [{"prompt_token_ids": row["ids"]} for row in rows],
        "generate-text": [row["text"] for row in rows],
    }
    done = []
    llm.generate(given["generate-ids"][:8], params, use_tqdm=False)
    for side, prompts in [*given.items()] * ROUNDS:
        llm.reset_prefix_cache()
        begin = time.time()
        answers = llm.generate(prompts, params, use_tqdm=False)
        end = time.time()
        tokens = sum(len(a.prompt_token_ids or ()) for a in answers)
        done.append(Work(side, begin, end, len(answers), tokens, sum(a.num_cached_tokens or 0 for a in answers)))
    report(case, "generate", done)


def ray_data(case: Case) -> None:
    # Exporting metrics, its default, takes Ray Serve, which takes packages that our locks lack.
    settings = {
        "engine_kwargs": case.engine(limits=False),
        "log_engine_metrics": find_spec("grpc_reflection") is not None,
    }
    ray_data_llm(case, "ray-data", settings, detokenize=True)


def ray_data_tuned(case: Case) -> None:
    workers = {"enabled": True, "concurrency": 4 if len(os.sched_getaffinity(0)) >= 8 else 1}
    settings: dict[str, Any] = {
        "engine_kwargs": case.engine(limits=True),
        "batch_size": max(1, 2 * case.spec["max_num_seqs"] // RAY_BATCHES),
        "max_concurrent_batches": RAY_BATCHES,
        "chat_template_stage": workers,
        "tokenize_stage": workers,
        "detokenize_stage": False,
        "log_engine_metrics": False,
    }
    ray_data_llm(case, "ray-data-tuned", settings, detokenize=False)


def ray_data_llm(case: Case, side: str, settings: dict[str, Any], detokenize: bool) -> None:
    """Parquet -> template -> tokens -> engine -> label -> Parquet, as Ray Data's own guide does it."""
    import pyarrow.parquet as pq
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    system, prompt, labels = case.task["system"], case.task["prompt"], case.task["labels"]
    scores = list(case.sampling["score_ids"])
    sampling = {"max_tokens": 1, "temperature": 0.0, "logprob_token_ids": scores, "logprobs": len(scores)}
    templates: dict[str, Any] = {}  # one a process: a compiled template doesn't travel

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        import jinja2

        template = templates.get("prompt") or templates.setdefault("prompt", jinja2.Template(prompt))
        messages = [{"role": "system", "content": system}, {"role": "user", "content": template.render(row)}]
        return {"messages": messages, "sampling_params": {**sampling, "detokenize": detokenize}}

    def read(row: dict[str, Any]) -> dict[str, Any]:
        found = {int(token): score["logprob"] for token, score in row["logprobs"][0].items() if score}
        best = max(range(len(scores)), key=lambda i: found[scores[i]])
        arrived = (row["metrics"] or {}).get("arrival_time") or 0.0
        return {
            "call_id": row["call_id"],
            "label": labels[best],
            "tokens": row["num_input_tokens"],
            "arrived": arrived,
        }

    cpu = case.spec["device"] == "cpu"
    cores = max(8, len(os.sched_getaffinity(0)))  # it wants one for each stage
    ray.init("local", include_dashboard=False, num_cpus=cores)  # not a cluster that somebody else runs here
    if cpu:
        settings = {**settings, "placement_group_config": {"bundles": [{"CPU": 1}]}}
    config = vLLMEngineProcessorConfig(model_source=case.model, concurrency=1, **settings)
    out = case.folder / f"{side}-out"
    shutil.rmtree(out, ignore_errors=True)
    rows = ray.data.read_parquet(str(case.corpus))
    build_processor(config, preprocess=ask, postprocess=read)(rows).write_parquet(str(out))
    table = pq.read_table(out)
    end = max(path.stat().st_mtime for path in out.glob("*.parquet"))
    begin = min(table["arrived"].to_pylist())
    if not begin:
        raise CannotRun("vLLM noted no request's arrival")
    report(case, side, [Work(side, begin, end, table.num_rows, sum(table["tokens"].to_pylist()), None)])


# ---- commands ----


def run_batch(case: Case, side: str, log: Path, limit: float) -> list[Work]:
    """`vllm run-batch`; a chat completion of one token a row, and the labels' log-probabilities."""
    asked, answered = case.folder / f"{side}-in.jsonl", case.folder / f"{side}-out.jsonl"
    answered.unlink(missing_ok=True)
    scores = {"logprobs": True, "logprob_token_ids": list(case.sampling["score_ids"])}
    with asked.open("w", encoding="utf-8") as file:
        for row in case.asked():
            messages = [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["user"]}]
            body = {"model": case.model, "messages": messages, "max_tokens": 1, "temperature": 0.0, **scores}
            line = {"custom_id": row["id"], "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    # vLLM's command asks for the version of a distribution called vllm, which the CPU build isn't.
    named = process.installed("vllm") is not None
    entry = ["vllm.entrypoints.cli.main", "run-batch"] if named else ["vllm.entrypoints.openai.run_batch"]
    command = [sys.executable, "-m", *entry, "-i", str(asked), "-o", str(answered)]
    command += ["--model", case.model, "--enable-prompt-tokens-details"]
    command += flags(case.engine(limits=side.endswith("tuned")))

    def begun(_: int) -> bool:
        said = log.read_text(errors="replace")
        return any(mark in said for mark in BATCH_BEGINS)

    seen = process.call(command, environment(case, side), log, limit, begun)
    if seen is None:
        raise CannotRun(f"its log doesn't say when it began; see {log}")
    end = answered.stat().st_mtime
    found = [json.loads(line) for line in answered.read_text(encoding="utf-8").splitlines()]
    bodies = [(f["response"] or {}).get("body") or {} for f in found]
    usages = [body["usage"] for body in bodies if "usage" in body]  # a refused row has none
    details = [u.get("prompt_tokens_details") for u in usages]
    cached = sum(d["cached_tokens"] or 0 for d in details if d) if any(details) else None
    return [Work(side, seen, end, len(usages), sum(u["prompt_tokens"] for u in usages), cached)]


def flags(arguments: EngineArguments) -> list[str]:
    """Engine arguments as vLLM's command line takes them."""
    words: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return words


def batchq(case: Case, side: str, log: Path, limit: float) -> list[Work]:
    """The command as a user gives it."""
    out = case.folder / f"{side}-out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "batchq", *case.job, *CHANGED.get(side, []), f"output.path={out}"]
    process.call(command, environment(case, side), log, limit)
    summary = json.loads((out / "meta/report.json").read_text())
    (record,) = (json.loads(path.read_text()) for path in (out / "meta/runs").glob("*.json"))
    seconds = max(r["phases"]["infer"] + r["phases"]["idle"] for r in record["replicas"] if r["phases"]["infer"])
    end = max(path.stat().st_mtime for path in (out / "data").glob("*.parquet"))
    tokens = [summary[f"{kind}_tokens"] for kind in ("prompt", "cached", "output")]
    return [Work(side, end - seconds, end, summary["answers"], *tokens)]


def environment(case: Case, side: str) -> dict[str, str]:
    """What batchq sets for its engines, for everybody; cores and a heap that is kept only for those that are tuned."""
    from batchq.engine.vllm_process import HEAP

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    chosen = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    if find_spec("flashinfer") is None:
        chosen["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if case.spec["cores"] and side in UNBOUND:
        chosen["VLLM_CPU_OMP_THREADS_BIND"] = "auto"
    elif (cores := case.spec["cores"]) and side != "batchq":  # which binds its engines itself
        chosen |= {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "OMP_NUM_THREADS": str(len(cores))}
        chosen["GLIBC_TUNABLES"] = HEAP
        if case.spec["options"].get("enforce_eager", True):
            chosen["TORCH_COMPILE_DISABLE"] = "1"
    return {**chosen, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


IN_PROCESS: dict[str, Callable[[Case], None]] = {
    "generate": generate,
    "ray-data": ray_data,
    "ray-data-tuned": ray_data_tuned,
}
OUT_OF_PROCESS: dict[str, Callable[[Case, str, Path, float], list[Work]]] = {
    "run-batch": run_batch,
    "run-batch-tuned": run_batch,
    "batchq": batchq,
    "batchq-unbound": batchq,
    "batchq-cutlass": batchq,
}


if __name__ == "__main__":
    IN_PROCESS[sys.argv[1]](cases.load(Path(sys.argv[2])))
