"""Labels scored by one prefill, against labels decoded under a grammar: rows a second, and how often each is right.

    python benchmarks/scoring.py --rows 300                                     # two CPU cores, the small model
    python benchmarks/scoring.py --rows 4000 --labels positive,negative,neither  # any labels; gold knows the first two

One engine, the same token ids for both, sentences that people rated and the wording of benchmarks/quality.py:

| side | what is asked of vLLM |
| --- | --- |
| scored | one token, and the log-probabilities of the labels' first tokens: what batchq does |
| decoded | structured outputs: one of the labels' texts, greedily, up to its end |

Runs alternate, with the prefix cache emptied before each; rates are medians. A scored row also has the distribution
over all labels; a decoded row has one label.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from typing import Any

from quality import CHOSEN, rows, worded

from batchq import cli
from batchq.engine.protocol import EngineSpec
from batchq.machine import hardware
from batchq.model.source import resolve
from batchq.model.tensors import read_tensors, stored_bytes
from batchq.model.tokenizer import open_tokenizer
from batchq.sizing import settings
from batchq.sizing.settings import Weights
from batchq.task.task import Task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--labels", default="positive,negative", help="separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="an override of the job")
    args = parser.parse_args()
    nowhere = ["input.path=none", "output.path=none"]
    config = cli.compose(["job=sentiment_transcripts", "engine.max_model_len=512", *nowhere, *args.set])
    config.task = dataclasses.replace(worded(config, CHOSEN), labels=args.labels.split(","))
    model = resolve(config.model)
    task = Task(config.task, open_tokenizer(model.path), ["text", "gold"])
    sample, _ = rows(task, args.rows, 0, args.seed)
    here = hardware.detect()
    weights = stored_bytes(read_tensors(model.path))
    spec = dataclasses.replace(
        settings.engine_spec(config, Weights(model.path, weights), here), cores=() if here.gpus else here.cores
    )
    print(
        f"{model.name}, {here.accelerator} x {len(here.gpus) or len(here.cores)}: {len(sample.prompts):,} rows, "
        f"{sum(map(len, sample.prompts)):,} prompt tokens; labels {args.labels}",
        flush=True,
    )
    llm = start(spec)
    sides = {"scored": scored(task, spec), "decoded": decoded(task)}
    prompts = [{"prompt_token_ids": prompt.token_ids} for prompt in sample.prompts]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    said: dict[str, list[str | None]] = {}
    tokens: dict[str, int] = {}
    for params, _ in sides.values():
        llm.generate(prompts[:8], params, use_tqdm=False)
    for run in range(args.runs):
        for name, (params, read) in sides.items():
            llm.reset_prefix_cache()
            began = time.monotonic()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds[name].append(time.monotonic() - began)
            said[name] = [read(output.outputs[0]) for output in outputs]
            tokens[name] = sum(len(output.outputs[0].token_ids) for output in outputs)
            print(f"run {run + 1} {name:<8} {len(prompts) / seconds[name][-1]:>8.1f} rows/s", flush=True)
    print(f"{'side':<8} {'rows/s':>8} {'accuracy':>9} {'generated':>10} {'no label':>9}")
    for name, labels in said.items():
        right = sum(label == gold for label, gold in zip(labels, sample.golds, strict=True)) / len(labels)
        rate = len(prompts) / statistics.median(seconds[name])
        none = sum(label is None for label in labels)
        print(f"{name:<8} {rate:>8.1f} {right:>9.4f} {tokens[name]:>10,} {none:>9,}")
    same = sum(a == b for a, b in zip(*said.values(), strict=True)) / len(prompts)
    ratio = statistics.median(seconds["decoded"]) / statistics.median(seconds["scored"])
    print(f"scored / decoded {ratio:.2f} times the rows/s; the same label on {same:.1%} of the rows")


def start(spec: EngineSpec) -> Any:
    """vLLM's own entrance for lists of prompts, with the arguments that batchq starts engines with."""
    from batchq.engine import vllm, vllm_process

    vllm_process.set_environment(spec)
    from vllm import LLM, EngineArgs

    return LLM(**vllm.engine_arguments(spec, EngineArgs))


def scored(task: Task, spec: EngineSpec) -> tuple[Any, Any]:
    from batchq.engine.vllm import VllmEngine

    ids = task.sampling.score_ids
    params = VllmEngine(spec).sampling_params(task.sampling)

    def read(answer: Any) -> str | None:
        found = answer.logprobs[0]
        best = max(range(len(ids)), key=lambda i: found[ids[i]].logprob)
        return task.config.labels[best]

    return params, read


def decoded(task: Task) -> tuple[Any, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    # As they follow the beginning of the answer, which is what is scored too.
    prefix = task.config.answer_prefix
    space = " " if prefix and not prefix[-1].isspace() else ""
    texts = {f"{space}{text}": label for text, label in zip(task.label_texts, task.config.labels, strict=True)}
    longest = max(len(task.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    params = SamplingParams(
        max_tokens=2 * longest + 1,  # a text may come in more tokens than the tokenizer would make of it; and its end
        temperature=0.0,
        structured_outputs=StructuredOutputsParams(choice=list(texts)),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    return params, lambda answer: texts.get(answer.text)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
