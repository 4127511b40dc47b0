"""What makes a labelling engine faster on this GPU: settings and changes of vLLM against batchq's own settings.

    python benchmarks/levers.py                                             # the shape 8b in FP8, every side
    python benchmarks/levers.py --top 10 --sides rowwise,rowwise+last-rows,rowwise+last-rows+silu      # what won
    python benchmarks/levers.py --shape tiny --layers 2 --scheme none --scale 64 --rows 8 --tokens 64 --shared 8 \\
        --sides step-8k --together 2                                        # to try the command, on a CPU

Raw `LLM.generate` on token ids, one label a row, weights of random numbers (benchmarks/engines.py). "base" has the
settings that batchq chooses for labels on a large GPU: 16,384 tokens and 1,024 sequences a step, no CUDA graphs, the
prefix cache on, but vLLM's own FP8 products ("rowwise" has batchq's). Each side changes one thing of it, and sides
joined by `+` change all of theirs. Some are options of vLLM, others are code (benchmarks/inside.py).

Engines stand beside each other on the GPU, `--together` at a time, base always among them, each with as much KV cache
as two of its steps need: four of 8B take 65 GB. They are asked by turns, `--runs` times, so that a side's ratio is to
base on the same warm card in the same minutes. Then each is asked once more with torch's profiler in it: the lower
table has the milliseconds of 16,384 uncached tokens by kind of kernel, and what is missing of the whole is the GPU
waiting, the begin and the end of that short round included. Each side has a compile cache of its own in `--work`:
"start" is a first start unless the folder was used before, with the others starting at the same time. A cache doesn't
know of changed code, so a folder is for one state of benchmarks/inside.py.

"agrees" is the correlation of the labels' log-probabilities with base's on the same rows. Sides of one scheme have the
same weights. What doesn't round anything otherwise has 1.0000; one number rounded otherwise is enough to make all that
follow differ, random weights decide nothing clearly, and vLLM's own kernels have 0.86 to 0.88. Another scheme has other
weights, and its figure says nothing.

MFU is 2 x the parameters of the layers' matrices x the uncached tokens, over the peak at full clocks. NVML's clock and
power are of the measured rounds: a card at its power limit lowers its clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))

from batchq.config import Scheme  # noqa: E402
from batchq.machine import hardware  # noqa: E402
from batchq.model import kv_cache  # noqa: E402
from batchq.model.tensors import is_quantized  # noqa: E402
from batchq.sizing.peaks import peak  # noqa: E402
from batchq.sizing.settings import SEQUENCES, STEP_TOKENS  # noqa: E402
from benchmarks import clock, gpu, kernels, shapes  # noqa: E402
from benchmarks.clock import say  # noqa: E402
from benchmarks.engines import Asked, Engine, Kernels, Setup  # noqa: E402
from benchmarks.process import CannotRun, versions  # noqa: E402

BASE = "base"
STEP = STEP_TOKENS["cuda"]
STEPS_HELD = 2.25  # of KV cache: the step that is computed, the next, and some
START_LIMIT, ASK_LIMIT = 400.0, 120.0  # seconds
PROFILED = 10  # steps
COMPARED = 64  # rows


@dataclass(frozen=True, slots=True)
class Side:
    """What differs from base."""

    scheme: str = ""  # of SCHEMES
    step: int = 0  # tokens per step
    options: dict[str, Any] = field(default_factory=dict)
    compilation: dict[str, Any] = field(default_factory=dict)
    changes: tuple[str, ...] = ()  # of benchmarks/inside.py
    environment: dict[str, str] = field(default_factory=dict)

    def __add__(self, other: Side) -> Side:
        return Side(
            other.scheme or self.scheme,
            other.step or self.step,
            self.options | other.options,
            self.compilation | other.compilation,
            self.changes + other.changes,
            self.environment | other.environment,
        )


FUSED: dict[str, Any] = {
    "custom_ops": ["+quant_fp8"],
    "pass_config": {"fuse_norm_quant": True, "fuse_act_quant": True, "eliminate_noops": True},
}
SIDES = {
    # compiling
    "eager": Side(options={"enforce_eager": True}),
    "own-quant": Side(compilation={"custom_ops": ["+quant_fp8"], "pass_config": {"fuse_norm_quant": False}}),
    "fused": Side(compilation=FUSED),
    "one-size": Side(compilation={"compile_sizes": [STEP]}),
    # products
    "rowwise": Side(options={"linear_backend": "torch"}, changes=("rowwise",)),
    "static": Side("fp8_static"),
    "static-fused": Side("fp8_static", compilation=FUSED),
    "static-attention": Side(
        "fp8_static",
        options={"attention_backend": "TRITON_ATTN"},
        compilation={**FUSED, "pass_config": {**FUSED["pass_config"], "fuse_attn_quant": True}, "splitting_ops": []},
    ),
    "torch": Side(options={"linear_backend": "torch"}),
    "static-torch": Side("fp8_static", options={"linear_backend": "torch"}),
    "static-fast": Side("fp8_static", options={"linear_backend": "torch"}, changes=("fast-accumulation",)),
    "block": Side("fp8_block", options={"linear_backend": "deep_gemm"}),
    "block-compiled": Side(
        "fp8_block", options={"linear_backend": "deep_gemm"}, compilation={"custom_ops": ["-quant_fp8"]}
    ),
    "block-cutlass": Side("fp8_block", options={"linear_backend": "cutlass"}),
    "int8": Side("int8"),
    "bf16": Side("none"),
    # attention and cache
    "kv8": Side(options={"kv_cache_dtype": "fp8"}),
    "no-cache": Side(options={"enable_prefix_caching": False}),
    # work
    "last-rows": Side(changes=("last-rows",)),
    "silu": Side(changes=("silu",)),
    # steps; a multiple of 128 rows on each of 132 multiprocessors fills the last wave of every product
    "step-8k": Side(step=8192),
    "step-16.5k": Side(step=16896),
    "step-32k": Side(step=32768),
    "step-33k": Side(step=33792),
    # scheduling
    "sync": Side(options={"async_scheduling": False}),
    "runner-v1": Side(environment={"VLLM_USE_V2_MODEL_RUNNER": "0"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=shapes.names())
    parser.add_argument("--layers", type=int, help="fewer than published")
    parser.add_argument("--scheme", default="fp8", choices=["fp8", "fp8_block", "fp8_static", "int8", "none"])
    parser.add_argument("--sides", default=",".join(SIDES), help="separated by commas")
    parser.add_argument("--rows", type=int, default=480, help="a round")
    parser.add_argument("--tokens", type=int, default=1022, help="of a prompt")
    parser.add_argument("--shared", type=int, default=36, help="of which are the same in all prompts")
    parser.add_argument("--scale", type=int, default=1, help="tokens per step are divided by this")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--together", type=int, default=4, help="engines on the GPU at a time")
    parser.add_argument("--top", type=int, default=0, help="kernels that are shown by name, of each side")
    parser.add_argument("--work", type=Path, default=Path("out/levers"))
    parser.add_argument("--within", type=float, default=math.inf, help="seconds that the whole command may take")
    args = parser.parse_args()
    wanted = [name for name in args.sides.split(",") if name != BASE]
    if unknown := {part for name in wanted for part in name.split("+")} - set(SIDES):
        parser.error(f"--sides {min(unknown)}: choose of {', '.join(SIDES)}")
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args, work)
    say(f"{bench.here.accelerator}; {versions()}; {args.shape}, {args.rows} rows of {args.tokens} tokens a round")
    per = max(1, args.together - 1)
    longest = 0.0
    for begin in range(0, len(wanted), per):
        names = [BASE, *wanted[begin : begin + per]]
        if clock.left(args.within) < longest:
            say(f"no time for {', '.join(names[1:])}")
            continue
        began = time.monotonic()
        bench.group(names)
        longest = max(longest, time.monotonic() - began)
    bench.table()


class Bench:
    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.here = hardware.detect()
        self.peak = peak(self.here.accelerator, Scheme.fp8)
        _, tensors = shapes.described(args.shape, args.layers)
        self.parameters = sum(t.elements for t in tensors if is_quantized(t))
        self.rows: list[dict[str, Any]] = []
        self.seeds = itertools.count()

    def setup(self, name: str) -> Setup:
        side = Side(self.args.scheme)
        for part in name.split("+"):
            side += SIDES.get(part, Side())
        config = described(self.args.shape, self.args.layers, side.scheme)
        step = (side.step or STEP) // self.args.scale
        element = 1 if "kv_cache_dtype" in side.options else 2
        length = max(self.args.tokens * 2, 1024)
        options: dict[str, Any] = {
            "max_model_len": length,
            "max_num_batched_tokens": step,
            "max_num_seqs": SEQUENCES["cuda"] // self.args.scale,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
        }
        if self.here.gpus:
            held = int(max(STEPS_HELD * step, 2 * length))
            options |= {
                "gpu_memory_utilization": 0.1,  # asked for at the start; kv_cache_memory_bytes decides
                "compilation_config": {"cudagraph_mode": "NONE"} | side.compilation,
            }
        else:
            held = 2 * length
            options |= {"enforce_eager": True, "dtype": "bfloat16"}
        options["kv_cache_memory_bytes"] = held * kv_cache.bytes_per_token(config, element)
        return Setup(name, config, options | side.options, side.changes, side.environment)

    def group(self, names: list[str]) -> None:
        """Start the engines at the same time, ask them by turns, profile each."""
        free = gpu.free_memory()
        engines = {name: Engine(self.setup(name), self.work) for name in names}
        try:
            starts = self.await_all(engines)
            agreement = self.agreement(engines)
            measured: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
            for _, name in itertools.product(range(self.args.runs), list(engines)):
                if name in engines:
                    self.attempt(engines, name, measured[name])
            base = statistics.median([m["rate"] for m in measured.get(BASE, [])] or [0.0])
            for name in list(engines):
                start = {"start": starts[name], "agrees": agreement.get(name, 0.0)}
                self.conclude(engines[name], start, measured[name], base)
        finally:
            for engine in engines.values():
                engine.close()
            gpu.await_memory(free)

    def await_all(self, engines: dict[str, Engine]) -> dict[str, float]:
        """Their seconds of start; those that don't come up are taken out."""
        starts = {}
        until = time.monotonic() + min(START_LIMIT, clock.left(self.args.within))
        for name in list(engines):
            try:
                ready = engines[name].ready(until - time.monotonic())
                starts[name] = ready.seconds
                say(f"{name} is up after {ready.seconds:.0f} s: {ready.room:,} tokens of KV cache, {ready.filled}")
            except CannotRun as error:
                say(f"can't run: {error}")
                engines.pop(name).close()
        return starts

    def agreement(self, engines: dict[str, Engine]) -> dict[str, float]:
        """How the scores of the same rows correlate with base's."""
        asked = self.asked(COMPARED)
        scores: dict[str, list[float]] = {}
        for name in list(engines):
            try:
                scores[name] = list(itertools.chain(*engines[name].ask(asked, ASK_LIMIT).scores))
            except CannotRun as error:
                say(f"can't run: {error}")
                engines.pop(name).close()
        if BASE not in scores:
            return {}
        return {name: statistics.correlation(scores[BASE], found) for name, found in scores.items()}

    def attempt(self, engines: dict[str, Engine], name: str, measured: list[dict[str, float]]) -> None:
        watch = gpu.Watch()
        try:
            found = engines[name].ask(self.asked(self.args.rows), ASK_LIMIT)
        except CannotRun as error:
            say(f"can't run: {error}")
            engines.pop(name).close()
            return
        finally:
            watch.close()
        joules = watch.joules(found.begin, found.end)
        flop = 2.0 * self.parameters * (found.prompt_tokens - found.cached_tokens)
        measured.append(
            {
                "rate": found.prompt_tokens / found.seconds,
                "watts": (joules or 0.0) / found.seconds,
                "mhz": watch.mhz(found.begin, found.end) or 0.0,
                "mfu": flop / found.seconds / self.peak if self.peak else 0.0,
                "cached": found.cached_tokens / found.prompt_tokens,
            }
        )
        say(f"{name}: {' '.join(f'{key} {value:,.4g}' for key, value in measured[-1].items())}")

    def asked(self, rows: int) -> Asked:
        return Asked(rows, self.args.tokens, self.args.shared, seed=next(self.seeds))

    def conclude(self, engine: Engine, start: dict[str, float], measured: list[dict[str, float]], base: float) -> None:
        """The side's line of the tables, which is also kept in results.jsonl."""
        rates = sorted(m["rate"] for m in measured)
        row: dict[str, Any] = {key: statistics.median([m[key] for m in measured]) for key in measured[0]}
        row |= {"side": engine.setup.name, **start, "least": rates[0], "most": rates[-1], "runs": len(rates)}
        row["ratio"] = row["rate"] / base if base else 0.0
        try:
            rows = math.ceil(PROFILED * STEP / self.args.scale / self.args.tokens)
            seen, times = engine.profile(self.asked(rows), ASK_LIMIT)
            uncached = seen.prompt_tokens - seen.cached_tokens
            row["kinds"] = of_a_step(times, seen.seconds, uncached)
            self.named(engine.setup.name, times, uncached)
        except CannotRun as error:
            say(f"can't be profiled: {error}")
        self.rows.append(row)
        with (self.work / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def named(self, side: str, times: Kernels, uncached: int) -> None:
        for name, (spent, calls) in sorted(times.items(), key=lambda found: -found[1][0])[: self.args.top]:
            each = spent / uncached * STEP * 1000
            print(f"{side:<16}{each:>8.2f} ms {calls:>6,} x  {kernels.kind_of(name):<24} {name[:150]}", flush=True)

    def table(self) -> None:
        heads = ("tokens/s", "least", "most", "of base", "MFU", "W", "MHz", "start", "agrees")
        print("\n" + cells("side", *heads))
        for row in self.rows:
            rates = [f"{row[key]:,.0f}" for key in ("rate", "least", "most")]
            card = [f"{row['mfu']:.1%}", f"{row['watts']:.0f}", f"{row['mhz']:,.0f}", f"{row['start']:.0f} s"]
            card.append(f"{row['agrees']:.4f}")
            print(cells(row["side"], *rates, f"{row['ratio']:.3f}", *card))
        kinds = sorted({kind for row in self.rows for kind in row.get("kinds", {})})
        print(f"\nmilliseconds of {STEP:,} uncached tokens\n" + cells("side", *kinds))
        for row in self.rows:
            if found := row.get("kinds"):
                print(cells(row["side"], *(f"{found.get(kind, 0.0):.2f}" for kind in kinds)))
        sys.stdout.flush()


def cells(side: str, *found: str) -> str:
    return f"{side:<28}" + "".join(f" {words[:11]:>11}" for words in found)


def of_a_step(times: Kernels, seconds: float, uncached: int) -> dict[str, float]:
    """Milliseconds that base's step of uncached tokens takes, by kind, with the waiting."""
    kinds = kernels.by_kind(times)
    every = {**kinds, "waiting": seconds - sum(kinds.values()), "whole": seconds}
    return {kind: spent / uncached * STEP * 1000 for kind, spent in every.items()}


def described(shape: str, layers: int | None, scheme: str) -> dict[str, Any]:
    """config.json of the shape under the scheme."""
    config, tensors = shapes.described(shape, layers)
    if scheme == "none":
        return config
    stored = Scheme.int8 if scheme == "int8" else Scheme.fp8
    quantized = shapes.quantization_config(tensors, stored, None)
    (group,) = quantized["config_groups"].values()
    if scheme == "fp8_block":
        group["weights"] |= {"strategy": "block", "block_structure": [128, 128]}
        group["input_activations"] = {**shapes.FLOAT8, **shapes.A_TOKEN, "strategy": "group", "group_size": 128}
    elif scheme == "fp8_static":
        group["weights"] |= {"strategy": "tensor"}
        group["input_activations"] = {**shapes.FLOAT8, **shapes.A_TOKEN, "strategy": "tensor", "dynamic": False}
    return {**config, "quantization_config": quantized}


if __name__ == "__main__":
    main()
