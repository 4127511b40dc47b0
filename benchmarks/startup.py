"""From submission to the first answer: how long it takes, and with what.

    python benchmarks/startup.py                              # the shipped job, unquantized, three times, warm
    python benchmarks/startup.py --cold                       # nothing cached but the installation
    python benchmarks/startup.py quantization=int8            # any override of the job; checkpoints come from the cache
    python benchmarks/startup.py --variants --limit 90 model=folder model.path=weights/8b   # ways to start an engine
    git worktree add ../before COMMIT && python benchmarks/startup.py --against ../before   # what has been gained since

Composes a few calls, runs `python -m batchq job=sentiment_transcripts gate=off` on them in a process of its own and
prints the seconds that lie between one point of the start-up and the next, as the run's own record
(meta/runs/*.json) and its replica's log have them; "in all" is from the process's begin to the first answer. The first
warm run isn't counted: it fills the caches. `--cold` empties them before each run: those of batchq and vLLM, and the
kernel's cache of files where that is allowed (it says so). `--variants` starts the engine once in each way below, ends
it after `--limit` seconds, and prints what vLLM's log says of where the time went.

`--against` runs another checkout's batchq and this one's by turns, each cold (all caches empty) and then warm, on the
same rows in one shard, and compares the seconds from the process's begin to the committed shard, as a user sees them
from outside: an older batchq keeps no points of its start.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise, product
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("python", "model", "plan", "checkpoint", "ray", "engine", "first answer")

# Overrides and environment, each on top of batchq's own choice; what a vLLM doesn't know ends that variant in one line.
GRAPHS = "+engine.options.compilation_config"
VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "as it is": ([], {}),
    "again": ([], {}),  # what the first one compiled is cached now
    "no graphs": ([f"{GRAPHS}={{cudagraph_mode: NONE}}"], {}),
    "few graphs": ([f"{GRAPHS}={{cudagraph_capture_sizes: [1, 8]}}"], {}),
    "no tuning": (
        [f"{GRAPHS}={{cudagraph_mode: NONE}}", "+engine.options.kernel_config={enable_flashinfer_autotune: false}"],
        {"VLLM_DEEP_GEMM_WARMUP": "skip"},
    ),
    "kept plan": ([], {"VLLM_ENABLE_STARTUP_PLAN": "1"}),  # measures and keeps what memory it may take
    "its reuse": ([], {"VLLM_ENABLE_STARTUP_PLAN": "1"}),
    "eager": (["+engine.options.enforce_eager=true"], {}),
}

# What vLLM says of its own start, and how the table calls it.
SAID = {
    "imports": r"batchq: vLLM imported in ([\d.]+) s",
    "weights": r"Loading weights took ([\d.]+) s",
    "model": r"Model loading took .*? and ([\d.]+) s",
    "dynamo": r"Dynamo bytecode transform time: ([\d.]+) s",
    "compile": r"torch\.compile (?:and initial profiling/warmup run together )?took ([\d.]+) s",
    "profile": r"Initial profiling/warmup run took ([\d.]+) s",
    "graphs": r"Graph capturing finished in ([\d.]+) s",
    "init": r"init engine \(.*?\) took ([\d.]+) s",
    "engine": r"engine up in ([\d.]+) s",
}
STAMP = re.compile(r"^(?:\((\w+)[^)]*\) )?\w+ \d\d-\d\d (\d\d):(\d\d):(\d\d) \S+ (.*)$", re.MULTILINE)
GAP = 2  # seconds between two lines of vLLM's log from which on the second is shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout of batchq")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a run is ended")
    parser.add_argument("overrides", nargs="*", help="of the job, such as quantization=int8")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="batchq-startup-") as scratch:
        work = Path(scratch)
        corpus = work / "calls"
        builder = ROOT / "jobs/sentiment_transcripts/corpus.py"
        subprocess.run([sys.executable, builder, corpus, "--rows", str(args.rows)], check=True)
        common = ["gate=off", f"input.path={corpus}"]
        if not any(o.startswith("quantization=") for o in args.overrides):
            common.append("quantization=none")
        job = [*common, *args.overrides]
        if args.against:
            compare(work, args.against.absolute(), job, args.runs, args.limit)
            return
        print("run         " + "".join(f"{step:>13}" for step in STEPS) + f"{'in all':>8}", flush=True)
        if args.variants:
            for name, (more, environment) in VARIANTS.items():
                once(work, [*job, *more], args.limit, name, environment)
            return
        counted = []
        for number in range(args.runs + (not args.cold)):
            name = f"cold {number + 1}" if args.cold else f"warm {number}" if number else "(first)"
            environment = emptied(work / f"caches-{number}") if args.cold else {}
            found = once(work, job, args.limit, name, environment)
            if found and (args.cold or number):
                counted.append(found)
        if counted:
            line("median", [median(column) for column in zip(*counted, strict=True)])


def once(work: Path, overrides: list[str], limit: float, name: str, environment: dict[str, str]) -> list[float] | None:
    """Run the job once and print its line; returns the seconds of each step, None if it gave no answer in time."""
    output = work / ("out-" + re.sub(r"\W+", "-", name))
    command = [sys.executable, "-m", "batchq", "job=sentiment_transcripts", f"output.path={output}", *overrides]
    cache = Path(environment.get("BATCHQ_CACHE") or os.environ.get("BATCHQ_CACHE") or "~/.cache/batchq").expanduser()
    logs = cache / "logs/sentiment_transcripts"
    before = set(logs.glob("*/replica-0.log"))
    with (work / "log").open("wb") as chatter:
        job = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=chatter, stderr=subprocess.STDOUT
        )
        try:
            code = job.wait(limit)
        except subprocess.TimeoutExpired:
            job.send_signal(signal.SIGTERM)
            code = job.wait()
    written = set(logs.glob("*/replica-0.log")) - before
    said = (written.pop() if written else work / "log").read_text(errors="replace")
    seconds, report = steps(output), output / "meta/report.json"
    if seconds is None:
        tail = (work / "log").read_text(errors="replace").strip().splitlines()
        print(f"{name:<12} no answer (exit code {code}): {tail[-1] if tail else ''}", flush=True)
    else:
        line(name, seconds)
    speed = [f"{json.loads(report.read_text())['tokens_per_second']:,.0f} tokens/s"] if report.exists() else []
    print("            " + " · ".join([*details(said), *speed]), flush=True)
    for words in gaps(said):
        print(f"            {words}", flush=True)
    return seconds


def compare(work: Path, before: Path, job: list[str], runs: int, limit: float) -> None:
    """Print the seconds of each run of both trees, and their medians."""
    trees = {"before": before, "now": ROOT}
    found: dict[tuple[str, str], list[float]] = {}
    for number, (name, tree) in product(range(runs), trees.items()):
        environment = emptied(work / f"caches-{name}-{number}")
        for state in ("cold", "warm"):
            seconds = shard_committed(work / f"{name}-{state}-{number}", tree, job, environment, limit)
            if seconds is not None:
                found.setdefault((state, name), []).append(seconds)
            told = "no shard in time" if seconds is None else f"{seconds:.1f} s"
            print(f"{state} {name} {number + 1}: {told}", flush=True)
    for state in ("cold", "warm"):
        if (state, "before") in found and (state, "now") in found:
            old, new = median(found[state, "before"]), median(found[state, "now"])
            print(f"{state}, medians: {old:.1f} s before, {new:.1f} s now, {new / old - 1:+.0%}", flush=True)


def shard_committed(
    output: Path, tree: Path, job: list[str], environment: dict[str, str], limit: float
) -> float | None:
    """Seconds from the start of that tree's batchq until the one shard is there; None if it isn't in time."""
    command = [sys.executable, "-m", "batchq", "job=sentiment_transcripts", f"output.path={output}", *job]
    search = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH", "")]))
    began, seen = time.monotonic(), None
    with Path(f"{output}.log").open("wb") as chatter:
        process = subprocess.Popen(
            command,
            cwd=tree,
            env={**os.environ, **environment, "PYTHONPATH": search},
            stdout=chatter,
            stderr=subprocess.STDOUT,
        )
        while seen is None and process.poll() is None and time.monotonic() - began < limit:
            if any((output / "data").glob("*.parquet")):
                seen = time.monotonic() - began
            else:
                time.sleep(0.05)
        if seen is None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait()
    if seen is None:
        words = Path(f"{output}.log").read_text(errors="replace").strip().splitlines()
        print(f"exit code {code}: {words[-1] if words else 'it said nothing'}", flush=True)
    return seen


def steps(output: Path) -> list[float] | None:
    """The seconds between each of STEPS and the one before it."""
    records = sorted((output / "meta/runs").glob("*.json"))
    reached = json.loads(records[-1].read_text())["reached"] if records else {}
    if "first answer" not in reached:
        return None
    at = [0.0] + [reached.get(step, 0.0) for step in STEPS[1:]]
    return [reached["python"]] + [after - before for before, after in pairwise(at)]


def details(said: str) -> list[str]:
    """What the replica's log says of the engine's start: the largest figure of each kind."""
    found = {what: [float(n) for n in re.findall(words, said)] for what, words in SAID.items()}
    return [f"{what} {max(numbers):.1f}" for what, numbers in found.items() if numbers]


def gaps(said: str) -> list[str]:
    """Where vLLM's log stood still, as seconds and the line that ended it; its clock has whole seconds."""
    at = [(3600 * int(h) + 60 * int(m) + int(s), who or "", what) for who, h, m, s, what in STAMP.findall(said)]
    pairs = [(after[0] - before[0], *after[1:]) for before, after in pairwise(at)]
    return [f"{seconds:>4} s before {who}: {what[:90]}" for seconds, who, what in pairs if seconds >= GAP]


def line(name: str, seconds: list[float]) -> None:
    print(f"{name:<12}" + "".join(f"{s:>13.1f}" for s in seconds) + f"{sum(seconds):>8.1f}", flush=True)


def emptied(folder: Path) -> dict[str, str]:
    """An environment whose caches are empty; the kernel's cache of files is dropped where that is allowed."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        print(f"(the kernel keeps its cache of files: {error.strerror})", flush=True)
    names = ("BATCHQ_CACHE", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    return {name: str(folder / name.lower()) for name in names}


if __name__ == "__main__":
    main()
