"""batchq writes text with a model of 32B: output tokens/s in BF16, FP8 and 4 bits, with caches in 16 and in 8 bits.

    python benchmarks/decode.py --work /dev/shm/decode                  # one 80 GB GPU: 500/2000, FP8 over BF16
    python benchmarks/decode.py --work /dev/shm/decode --sides fp8,w4a16,bf16 --workloads 500/500,2000/300 --waves 3
    python benchmarks/decode.py --work /dev/shm/decode --memory 75      # a larger GPU, as if it had 80 GB
    python benchmarks/decode.py --shape tiny --sides bf16 --workloads 60/8 --rows 8      # a CPU

`python -m batchq` itself, a run for each line, with the settings that it chooses; weights of random numbers, written by
benchmarks/shapes.py into `--work` and deleted behind the side: 65 GB in BF16, 33 in FP8. A workload has as many rows as
are in flight with whole answers, `--waves` times over: a comparison is between what sides do when they are full.
Seconds are from the engine's being ready to the last answer written, the beginning and the end included, where fewer
rows are in flight.

"bound" is what the datasheet's bandwidth and peak allow, in output tokens/s: the layers' weights are read once for the
rows in flight, keys and values of a row of mean length for each token, and prompts and answers are multiplied at the
peak. "of it" is the share that was reached.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))

from batchq.config import Scheme  # noqa: E402
from batchq.machine import hardware  # noqa: E402
from batchq.model import kv_cache  # noqa: E402
from batchq.model.folder import read_config  # noqa: E402
from batchq.model.tensors import is_quantized  # noqa: E402
from batchq.sizing.peaks import bandwidth, peak  # noqa: E402
from benchmarks import clock, gpu, shapes, sides  # noqa: E402
from benchmarks.case import Case, prepare  # noqa: E402
from benchmarks.clock import say  # noqa: E402
from benchmarks.process import CannotRun, versions  # noqa: E402

SIDES = {  # scheme, and type of the cache
    "bf16": (Scheme.none, "auto"),
    "bf16-kv8": (Scheme.none, "fp8"),
    "fp8": (Scheme.fp8, "fp8"),
    "fp8-kv16": (Scheme.fp8, "auto"),
    "w4a16": (Scheme.w4a16, "fp8"),
    "w4a16-kv16": (Scheme.w4a16, "auto"),
}
LIMIT = 600.0  # seconds that a run may take
FRAME = 1.2  # prompts are of about as many tokens as asked for
HEADS = f"{'side':<12}{'workload':>10}{'in flight':>10}{'rows':>6}{'seconds':>9}{'out/s':>8}{'bound':>8}{'of it':>7}"


@dataclass(frozen=True, slots=True)
class Workload:
    prompt: int  # tokens
    answer: int

    def __str__(self) -> str:
        return f"{self.prompt}/{self.answer}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="32b", choices=shapes.names())
    parser.add_argument("--sides", default="fp8,bf16", help=f"of {', '.join(SIDES)}; ratios are to the last")
    parser.add_argument("--workloads", default="500/2000", help="tokens of prompt and answer")
    parser.add_argument("--waves", type=float, default=2.0, help="how often the rows in flight are filled")
    parser.add_argument("--rows", type=int, help="instead of waves")
    parser.add_argument("--memory", type=float, help="GB of the GPU's memory that the engine may take")
    parser.add_argument("--work", type=Path, default=Path("out/decode"))
    parser.add_argument("--within", type=float, default=math.inf, help="seconds that the whole command may take")
    args = parser.parse_args()
    if unknown := set(args.sides.split(",")) - set(SIDES):
        parser.error(f"--sides {min(unknown)}: choose of {', '.join(SIDES)}")
    args.work = args.work.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    workloads = [Workload(*map(int, words.split("/"))) for words in args.workloads.split(",")]
    say(f"{hardware.detect().accelerator}; {versions()}")
    rates: dict[tuple[str, str], float] = {}
    print(f"{HEADS}    W   MHz", flush=True)
    for side in args.sides.split(","):
        for workload in workloads:
            try:
                rates[side, str(workload)] = run(side, workload, args)
            except CannotRun as error:
                say(f"{side} {workload} can't run: {error}")
        shutil.rmtree(checkpoint(side, args), ignore_errors=True)
    last = args.sides.split(",")[-1]
    for (side, words), rate in rates.items():
        if side != last and (base := rates.get((last, words))):
            print(f"{words}: {side} over {last} {rate / base:.2f}", flush=True)


def checkpoint(side: str, args: argparse.Namespace) -> Path:
    return Path(args.work) / f"{args.shape}-{SIDES[side][0].value}"


def run(side: str, workload: Workload, args: argparse.Namespace) -> float:
    """One run of batchq; prints its line and returns output tokens per second."""
    scheme, cache = SIDES[side]
    folder = checkpoint(side, args)
    if not (folder / "config.json").exists():
        say(f"{folder}: {shapes.write(args.shape, folder, scheme) / 1e9:.1f} GB")
    overrides = ["task.kind=generate", "task.labels=[]", f"task.max_tokens={workload.answer}"]
    overrides += ["output.max_truncated_rate=1", "task.answer_prefix=''", f"quantization.kv_cache={cache}"]
    overrides.append(f"engine.max_model_len={int(FRAME * workload.prompt) + workload.answer + 64}")
    here = hardware.detect()
    if args.memory and here.gpus:
        share = args.memory * 1e9 / here.gpus[0].memory
        overrides.append(f"+engine.options.gpu_memory_utilization={share:.3f}")

    def case_of(rows: int) -> Case:
        return prepare(args.work / side, str(folder), rows, workload.prompt, "none", overrides)

    in_flight = int(case_of(8).spec["max_num_seqs"])
    case = case_of(args.rows or int(args.waves * in_flight))
    watch = gpu.Watch()
    free = gpu.free_memory()
    try:
        (work,) = sides.run(case, "batchq", case.folder / "batchq.log", min(LIMIT, clock.left(args.within)))
    finally:
        watch.close()
        gpu.await_memory(free)
    seconds = work.end - work.begin
    rate = work.output_tokens / seconds
    if work.output_tokens < 0.98 * work.answers * workload.answer:
        say(f"{side} {workload}: {work.output_tokens / work.answers:,.0f} tokens an answer; some ended early")
    most = bound(case, workload, folder, scheme, min(in_flight, case.rows))
    watts = (watch.joules(work.begin, work.end) or 0.0) / seconds
    words = f"{most:>8,.0f}{rate / most:>7.1%}" if most else f"{'-':>8}{'-':>7}"
    print(
        f"{side:<12}{workload!s:>10}{in_flight:>10}{case.rows:>6}{seconds:>9.1f}{rate:>8,.0f}{words}"
        f"{watts:>5.0f}{watch.mhz(work.begin, work.end) or 0:>6,.0f}",
        flush=True,
    )
    row = {"side": side, "workload": str(workload), "rows": case.rows, "seconds": seconds, "rate": rate, "bound": most}
    with (args.work / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return rate


def bound(case: Case, workload: Workload, folder: Path, scheme: Scheme, in_flight: int) -> float | None:
    """Output tokens per second at the datasheet's bandwidth and peak, one after the other; None for what isn't there.

    seconds of a row = answer x (weights / rows in flight + KV of a token x mean length) / bandwidth
                       + (prompt + answer) x FLOP per token / peak
    """
    accelerator = hardware.detect().accelerator
    bytes_per_second, flops = bandwidth(accelerator), peak(accelerator, scheme)
    if not bytes_per_second or not flops:
        return None
    config, (_, tensors) = read_config(str(folder)), shapes.described(folder.name.rpartition("-")[0])
    element = 1 if case.spec["options"].get("kv_cache_dtype") == "fp8" else 2
    parameters = sum(t.elements for t in tensors if is_quantized(t))
    read = parameters * _bits(scheme) / 8 / in_flight
    read += kv_cache.bytes_per_token(config, element) * (workload.prompt + workload.answer / 2)
    seconds = workload.answer * read / bytes_per_second
    seconds += (workload.prompt + workload.answer) * 2 * parameters / flops
    return workload.answer / seconds


def _bits(scheme: Scheme) -> int:
    return {Scheme.none: 16, Scheme.fp8: 8, Scheme.w4a16: 4}[scheme]


if __name__ == "__main__":
    main()
