"""The job itself under several schemes, from files to committed Parquet, and what each costs.

    python benchmarks/schemes.py --rows 100000 fp8 none

Composes the calls once, then runs `python -m batchq job=sentiment_transcripts quantization=...` for each scheme and
prints its own report's numbers as they come. "busy" is the share of the replica's time after its start in which it
had rows in flight; "GPU" is NVML's utilisation, averaged over the same time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="+", help="choices of conf/quantization")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--out", type=Path, help="folder to keep corpus, outputs and logs in")
    parser.add_argument(
        "--set", action="append", default=[], help="an override of the job, such as engine.in_flight=512"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="batchq-schemes-") as scratch:
        folder = args.out or Path(scratch)
        corpus = folder / "calls"
        builder = ROOT / "jobs/sentiment_transcripts/corpus.py"
        subprocess.run([sys.executable, builder, corpus, "--rows", str(args.rows)], check=True)
        print(
            f"{'scheme':<7} {'rows/s':>7} {'tokens/s':>9} {'busy':>6} {'GPU':>5} {'per M tok':>9} {'accuracy':>8}"
            "  seconds",
            flush=True,
        )
        for scheme in args.schemes:
            measure(folder, corpus, scheme, args.set)


def measure(folder: Path, corpus: Path, scheme: str, overrides: list[str]) -> None:
    output, log = folder / f"out-{scheme}", folder / f"{scheme}.log"
    command = [sys.executable, "-m", "batchq", "job=sentiment_transcripts", f"quantization={scheme}"]
    command += [f"input.path={corpus}", f"output.path={output}", "output.rows_per_shard=4096", "gate=off", *overrides]
    began = time.monotonic()
    with log.open("wb") as file:
        job = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        used: list[tuple[float, float]] = []
        watcher = threading.Thread(target=watch, args=(job, used), daemon=True)
        watcher.start()
        job.wait()
    whole = time.monotonic() - began
    watcher.join()
    if job.returncode:
        sys.exit(log.read_text(errors="replace")[-3000:])
    s = json.loads((output / "meta/report.json").read_text())
    assert s["rows"] == s["answers"] + s["failures"]
    seconds = " · ".join(f"{phase} {value:.1f}" for phase, value in s["device_seconds"].items() if value)
    # The GPU falls idle when the last row is answered: the labelling lies just before its last use.
    last = max((at for at, share in used if share), default=0.0)
    shares = [share for at, share in used if last - s["infer_seconds"] <= at <= last] or [0.0]
    print(
        f"{scheme:<7} {s['rows_per_second']:>7,.0f} {s['tokens_per_second']:>9,.0f} {s['busy_share']:>6.1%} "
        f"{mean(shares):>4.0f}% {s['cost_per_million_tokens'] or 0:>9.5f} {s['accuracy']:>8.4f}  "
        f"{seconds} · whole command {whole:.1f}\n        {s['rows']:,} rows, {s['failures']:,} failures, "
        f"{s['prompt_tokens']:,} prompt tokens, {s['cached_tokens']:,} cached; cpu seconds {s['cpu_seconds']}",
        flush=True,
    )


def watch(job: subprocess.Popen[bytes], used: list[tuple[float, float]]) -> None:
    """Note the time and the first GPU's utilisation, in percent, four times a second, until the job ends."""
    import pynvml as nvml

    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return  # no GPU here
    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    while job.poll() is None:
        used.append((time.monotonic(), nvml.nvmlDeviceGetUtilizationRates(handle).gpu))
        time.sleep(0.25)


if __name__ == "__main__":
    main()
