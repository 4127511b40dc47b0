"""Engines of raw vLLM with weights that no checkpoint holds, each in a process of its own, several beside each other.

benchmarks/levers.py measures with these. A model is only its config.json: the weights are
random numbers of their type (benchmarks/inside.py), so that nothing is written or read. Processes are forked from one
that has vLLM imported, and vLLM forks its own from there.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.process import CannotRun

AHEAD = ["vllm", "vllm.v1.engine.core", "vllm.v1.worker.gpu_worker", "vllm.model_executor.models.llama"]
FIRST_ID = 1000  # of the prompts' random tokens; those before may be special
CHANGES = "BENCHMARK_CHANGES"  # the variable that benchmarks/inside.py reads
LABELS = (5, 6, 7)  # ids that are scored where labels are
LONGEST = 86_400.0  # seconds that are waited for an answer: a pipe can't be asked to wait for ever
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_DEEP_GEMM_WARMUP": "relax"}

Kernels = dict[str, tuple[float, int]]


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to run a model."""

    name: str
    config: dict[str, Any]  # config.json
    options: dict[str, Any]  # vLLM's engine arguments
    changes: tuple[str, ...] = ()  # of benchmarks/inside.py
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Asked:
    """Prompts of random tokens, of which the first are the same in all; three labels are scored of each."""

    rows: int
    tokens: int
    shared: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answered:
    begin: float  # by the wall clock
    end: float
    prompt_tokens: int
    cached_tokens: int
    scores: list[list[float]]  # the labels' log-probabilities of each row

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Ready:
    seconds: float  # that the start took
    room: int  # tokens of KV cache
    filled: dict[str, int]  # weights by type


class Engine:
    """An engine in its process. Every method raises CannotRun when it doesn't answer or says that it failed."""

    def __init__(self, setup: Setup, work: Path) -> None:
        self.setup = setup
        self.log = work / f"{setup.name}.log"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(AHEAD)
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(setup, work, theirs))
        self._process.start()
        theirs.close()

    def ready(self, patience: float) -> Ready:
        return Ready(**self._hear(patience))

    def ask(self, asked: Asked, patience: float) -> Answered:
        self._ours.send(("ask", asked))
        return Answered(**self._hear(patience))

    def profile(self, asked: Asked, patience: float) -> tuple[Answered, Kernels]:
        self._ours.send(("profile", asked))
        found = self._hear(patience)
        kernels = {name: (float(spent), int(calls)) for name, (spent, calls) in found.pop("kernels").items()}
        return Answered(**found), kernels

    def close(self) -> None:
        """SIGKILL it and what it started."""
        import psutil

        with suppress(psutil.NoSuchProcess):
            mine = psutil.Process(self._process.pid)
            family = [mine, *mine.children(recursive=True)]
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=10)
        self._process.join(10)

    def _hear(self, patience: float) -> dict[str, Any]:
        if not self._ours.poll(min(max(0.0, patience), LONGEST)):
            raise CannotRun(f"{self.setup.name}: no answer within {patience:.0f} s; see {self.log}")
        try:
            kind, found = self._ours.recv()
        except EOFError as error:
            raise CannotRun(f"{self.setup.name}: its process died; see {self.log}") from error
        if kind == "failed":
            raise CannotRun(f"{self.setup.name}: {found}; see {self.log}")
        return dict(found)


# ---- in the engine's process ----


def serve(setup: Setup, work: Path, connection: Connection) -> None:
    log = os.open(work / f"{setup.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(QUIET | {"VLLM_CACHE_ROOT": str(work / f"{setup.name}-cache"), CHANGES: ",".join(setup.changes)})
    os.environ.update(setup.environment)
    importlib.import_module("benchmarks.inside")  # makes the changes, now that they are named
    try:
        llm = start(setup, work, connection)
        while True:
            kind, asked = connection.recv()
            if kind == "profile":
                llm.collective_rpc("benchmark_profile")
                found = answer(llm, asked)
                found["kernels"] = json.loads(llm.collective_rpc("benchmark_profiled")[0])
            else:
                found = answer(llm, asked)
            connection.send(("done", found))
    except EOFError:  # nobody asks any more
        return
    except BaseException as error:
        traceback.print_exc()
        connection.send(("failed", f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"))


def start(setup: Setup, work: Path, connection: Connection) -> Any:
    began = time.monotonic()
    folder = work / f"{setup.name}-model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(setup.config))
    from vllm import LLM

    given = {"load_format": "dummy", "skip_tokenizer_init": True, "generation_config": "vllm", **setup.options}
    llm = LLM(model=str(folder), worker_extension_cls="benchmarks.inside.Extension", **given)
    filled = json.loads(llm.collective_rpc("benchmark_fill")[0])
    answer(llm, Asked(rows=32, tokens=512, seed=-1))
    cache = llm.llm_engine.vllm_config.cache_config
    room = (cache.num_gpu_blocks or 0) * cache.block_size
    ready = {"seconds": time.monotonic() - began, "room": room, "filled": filled}
    connection.send(("ready", ready))
    return llm


def answer(llm: Any, asked: Asked) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprob_token_ids=list(LABELS),
        logprobs=len(LABELS),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    known = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    drawn = random.Random(asked.seed)
    shared = random.Random(0).choices(range(FIRST_ID, known), k=asked.shared)
    own = asked.tokens - asked.shared
    prompts = [{"prompt_token_ids": shared + drawn.choices(range(FIRST_ID, known), k=own)} for _ in range(asked.rows)]
    llm.reset_prefix_cache()
    begin = time.time()
    answers = llm.generate(prompts, params, use_tqdm=False)
    end = time.time()
    return {
        "begin": begin,
        "end": end,
        "prompt_tokens": sum(len(a.prompt_token_ids or ()) for a in answers),
        "cached_tokens": sum(a.num_cached_tokens or 0 for a in answers),
        "scores": [[a.outputs[0].logprobs[0][i].logprob for i in LABELS] for a in answers],
    }
