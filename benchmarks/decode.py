"""A model of 32B that writes: output tokens/s in BF16 and in FP8 with an FP8 cache, by lengths of prompt and answer.

    python benchmarks/decode.py                                     # one 80 GB GPU: 500/2000 and 2000/2000
    python benchmarks/decode.py --sides bf16,fp8 --workloads 500/500 --waves 3 --within 600
    python benchmarks/decode.py --small --sides bf16 --workloads 8/8 --rows 8      # a CPU

Raw `LLM.generate`, an engine after another, weights of random numbers (benchmarks/engines.py). A workload has as many
rows as the side's KV cache holds with whole answers, `--waves` times over: a comparison is between what both sides do
when they are full. Tokens/s are of the whole, its beginning and its end included; "rows" is how many, "room" the tokens
of cache. Every answer has all its tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))

from batchq.config import Scheme  # noqa: E402
from batchq.machine import hardware  # noqa: E402
from batchq.sizing import shapes as counted  # noqa: E402
from benchmarks import clock, gpu, shapes  # noqa: E402
from benchmarks.clock import say  # noqa: E402
from benchmarks.engines import Asked, Engine, Setup  # noqa: E402
from benchmarks.process import CannotRun, versions  # noqa: E402

SHAPE: dict[str, Any] = {  # Qwen 2.5 32B's numbers, as a Llama
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
SIDES: dict[str, tuple[Scheme, dict[str, Any]]] = {
    "bf16": (Scheme.none, {}),
    "fp8": (Scheme.fp8, {"kv_cache_dtype": "fp8"}),
    "fp8-kv16": (Scheme.fp8, {}),
    "int8": (Scheme.int8, {}),
}
STEP, SEQUENCES = 8192, 512
START_LIMIT = 300.0  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default="fp8,bf16", help=f"of {', '.join(SIDES)}; ratios are to the last")
    parser.add_argument("--workloads", default="500/2000,2000/2000", help="tokens of prompt and answer")
    parser.add_argument("--waves", type=float, default=3.0, help="how often the cache is filled")
    parser.add_argument("--rows", type=int, help="instead of waves")
    parser.add_argument("--small", action="store_true", help="a tiny shape, to try the command with")
    parser.add_argument("--memory", type=float, default=0.94, help="of the GPU's, for the engine")
    parser.add_argument("--work", type=Path, default=Path("out/decode"))
    parser.add_argument("--within", type=float, default=math.inf, help="seconds that the whole command may take")
    args = parser.parse_args()
    if unknown := set(args.sides.split(",")) - set(SIDES):
        parser.error(f"--sides {min(unknown)}: choose of {', '.join(SIDES)}")
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    say(f"{hardware.detect().accelerator}; {versions()}; {args.waves:g} waves")
    print(
        f"{'side':<9}{'workload':>10}{'room':>9}{'rows':>6}{'seconds':>9}{'out/s':>8}{'in/s':>8}    W   MHz", flush=True
    )
    rates: dict[tuple[str, str], float] = {}
    for side in args.sides.split(","):
        free = gpu.free_memory()
        engine = Engine(setup(side, args), work)
        try:
            run(engine, args, rates)
        except CannotRun as error:
            say(f"can't run: {error}")
        finally:
            engine.close()
            gpu.await_memory(free)
    last = args.sides.split(",")[-1]
    for (side, workload), rate in rates.items():
        if side != last and (base := rates.get((last, workload))):
            print(f"{workload}: {side} over {last} {rate / base:.2f}", flush=True)


def setup(side: str, args: argparse.Namespace) -> Setup:
    scheme, options = SIDES[side]
    shape = {**SHAPE, **shapes.TINY, "vocab_size": 4096} if args.small else SHAPE
    config = {**shapes.LLAMA, **shape}
    if scheme is not Scheme.none:
        config["quantization_config"] = shapes.quantization_config(counted.tensors_of(shape), scheme, None)
    limits: dict[str, Any] = {"max_model_len": 8192, "max_num_batched_tokens": STEP, "max_num_seqs": SEQUENCES}
    limits["gpu_memory_utilization"] = args.memory
    if not hardware.detect().gpus:
        limits = {"max_model_len": 1024, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 26}
    return Setup(f"32b-{side}", config, limits | options)


def run(engine: Engine, args: argparse.Namespace, rates: dict[tuple[str, str], float]) -> None:
    side = engine.setup.name.removeprefix("32b-")
    ready = engine.ready(min(START_LIMIT, clock.left(args.within)))
    say(f"{side} is up after {ready.seconds:.0f} s, {ready.filled}")
    for workload in args.workloads.split(","):
        tokens, answer = map(int, workload.split("/"))
        rows = args.rows or int(args.waves * min(SEQUENCES, ready.room // (tokens + answer)))
        watch = gpu.Watch()
        try:
            found = engine.ask(Asked(rows, tokens, answer=answer, seed=len(rates)), clock.left(args.within))
        finally:
            watch.close()
        rates[side, workload] = found.output_tokens / found.seconds
        watts = (watch.joules(found.begin, found.end) or 0.0) / found.seconds
        print(
            f"{side:<9}{workload:>10}{ready.room:>9,}{rows:>6}{found.seconds:>9.1f}{rates[side, workload]:>8,.0f}"
            f"{found.prompt_tokens / found.seconds:>8,.0f}{watts:>5.0f}{watch.mhz(found.begin, found.end) or 0:>6,.0f}",
            flush=True,
        )
        row = {"side": side, "workload": workload, "rows": rows, "room": ready.room, "seconds": found.seconds}
        with (args.work / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
