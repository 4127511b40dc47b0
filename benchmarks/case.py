"""What all sides of benchmarks/peers.py are given: the rows, the model, the question and the engine's limits."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchq.plan.draft import make_plan
from benchmarks.clock import say
from benchmarks.process import versions

if TYPE_CHECKING:
    from batchq.task.task import Task

EngineArguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """Stands as case.json in its folder."""

    folder: Path
    corpus: Path  # the Parquet file
    prompts: Path  # JSONL, a row each: id, ids, text, system, user
    model: str  # the folder that is served
    name: str
    rows: int
    tokens: int  # of all prompts
    job: list[str]  # overrides for batchq
    spec: dict[str, Any]  # of batchq's engine
    needed: EngineArguments  # of its options those that machine or job need: without what batchq has chosen
    sampling: dict[str, Any]
    task: dict[str, Any]
    flop_per_token: float
    peak: float | None

    def engine(self, limits: bool) -> EngineArguments:
        """vLLM's defaults, but for what machine and prompts need; with batchq's limits, if asked."""
        spec = self.spec
        chosen = {"max_model_len": spec["max_model_len"], **(spec["options"] if limits else self.needed)}
        if spec["device"] == "cpu":
            chosen = {"enforce_eager": True, "distributed_executor_backend": "uni", **chosen}
        for ways in ("tensor_parallel_size", "pipeline_parallel_size"):
            if spec[ways] > 1:
                chosen[ways] = spec[ways]
        chosen.pop("linear_backend", None)  # of no use without what batchq changes there
        if limits:
            chosen |= {name: spec[name] for name in ("max_num_batched_tokens", "max_num_seqs")}
        return chosen

    def asked(self) -> list[dict[str, Any]]:
        """The prompts."""
        with self.prompts.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def prepare(work: Path, model: str, rows: int, tokens: int, scheme: str, overrides: list[str]) -> Case:
    """Compose the rows, quantize the model, and write what the sides read; what is there already is kept."""
    from batchq import cli
    from batchq.config import Config
    from batchq.job.scheme import choose_scheme
    from batchq.job.served import serve
    from batchq.job.session import open_session
    from batchq.machine import hardware
    from batchq.machine.digests import digest_of
    from batchq.machine.words import gib
    from batchq.model.source import resolve
    from batchq.sizing import settings
    from batchq.sizing.peaks import peak

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    length = max(1024, 1 << math.ceil(math.log2(tokens * 1.2)))
    corpus = work / f"calls-{rows}-{tokens}" / "calls.parquet"
    job = ["job=sentiment_transcripts", "model=folder", f"model.path={model}", f"quantization={scheme}", "gate=off"]
    job += [f"input.path={corpus}", "task.gold=null", f"engine.max_model_len={length}", "output.rows_per_shard=512"]
    job += ["cluster.replicas=1"]  # every other side is one engine
    config: Config = cli.compose([*job, "output.path=none", *overrides])
    here = hardware.detect()
    found = resolve(config.model)
    prompts = corpus.with_name("prompts.jsonl")
    if not prompts.is_file():
        say(f"composing {rows:,} rows of about {tokens:,} tokens")
        compose_rows(config, found.path, rows, tokens, corpus)
        write_prompts(config, found.path, corpus, prompts)
    task = open_task(config, found.path)

    with open_session(config, "quantize") as session:
        chosen = choose_scheme(session, found).scheme
        draft = make_plan(config, found.digest, chosen, "")
        say(f"{found.name} under {chosen.value}: quantized, unless it is cached")
        served = serve(session, draft, found, chosen)
    checkpoint = served.checkpoint
    needed = settings.engine_spec(config, settings.Weights(checkpoint.path, checkpoint.bytes), here).options
    spec = dataclasses.replace(served.settings.engine, cores=() if here.gpus else here.cores)
    parameters = multiplied(found.path)
    variant = [digest_of(sorted(overrides))[:8]] if overrides else []
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
        rows=rows,
        tokens=sum(lengths),
        job=[*job, *overrides],
        spec=dataclasses.asdict(spec),
        needed=needed,
        sampling=dataclasses.asdict(task.sampling),
        task={"system": config.task.system, "prompt": config.task.prompt, "labels": config.task.labels},
        flop_per_token=2.0 * parameters,
        peak=peak(here.accelerator, chosen),
    )
    fields = dataclasses.asdict(case)
    (folder / "case.json").write_text(json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}))
    memory = f", {gib(here.gpus[0].free)} of {gib(here.gpus[0].memory)} free" if here.gpus else ""
    say(
        f"{here.accelerator}{memory}, {len(here.cores)} cores; {versions()}; {case.name}: {parameters:,} parameters "
        f"multiplied for each prompt token, {checkpoint.bytes / 1e9:.2f} GB; "
        f"{rows:,} rows, {case.tokens:,} prompt tokens, "
        f"{min(lengths)} to {max(lengths)} a row; {spec.max_num_batched_tokens:,} tokens and {spec.max_num_seqs:,} "
        "sequences a step"
    )
    return case


def multiplied(model: str | Path) -> int:
    """Weights that a prompt token is multiplied with: of a mixture of experts those that it is routed to."""
    from batchq.model.tensors import linear_parameters, read_shape

    return linear_parameters(read_shape(model))


def load(folder: Path) -> Case:
    fields: dict[str, Any] = json.loads((folder / "case.json").read_text())
    return Case(**fields | {name: Path(fields[name]) for name in ("folder", "corpus", "prompts")})


# ---- the rows ----


def compose_rows(config: Any, model: str, rows: int, tokens: int, corpus: Path) -> None:
    """Write the rows as Parquet; `model` has the tokenizer. Fewer rows are the first of more."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from jobs.sentiment_transcripts.corpus import compose

    task = open_task(config, model)
    calls = (compose(0, index)["transcript"] for index in itertools.count())

    def encode(texts: list[str]) -> list[list[int]]:
        return [prompt.token_ids for prompt in task.encode([task.render({"transcript": text}) for text in texts])]

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
    corpus.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"call_id": [f"call-{index:08d}" for index in range(rows)], "transcript": transcripts})
    partial = corpus.with_suffix(".partial")
    pq.write_table(table, partial, compression="zstd", row_group_size=512)
    partial.rename(corpus)


def write_prompts(config: Any, model: str, corpus: Path, prompts: Path) -> None:
    """Write what becomes of the rows as prompts."""
    import pyarrow.parquet as pq

    task = open_task(config, model)
    found = pq.read_table(corpus).to_pylist()
    users = [task.render(row) for row in found]
    partial = prompts.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row, user, prompt in zip(found, users, task.encode(users), strict=True):
            asked = {
                "id": row["call_id"],
                "ids": prompt.token_ids,
                "text": task.framed(user),
                "system": config.task.system,
                "user": user,
            }
            file.write(json.dumps(asked) + "\n")
    partial.rename(prompts)


def spoken(transcript: str) -> int:
    """Characters of what the customer says, which is what the prompt takes of a call."""
    return sum(len(text) - 9 for text in transcript.split("\n") if text.startswith("Customer: "))


def open_task(config: Any, model: str) -> Task:
    from batchq.model.tokenizer import open_tokenizer
    from batchq.task.task import Task

    return Task(config.task, open_tokenizer(model), ["call_id", "transcript"], config.model.chat_template)
