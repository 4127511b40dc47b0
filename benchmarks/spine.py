"""What the framework itself costs: files -> prompts -> committed Parquet around an engine that answers at once.

    python benchmarks/spine.py                      # 200,000 calls, with and without tokenisation
    python benchmarks/spine.py --rows 2000000 --tokens none

Composes the calls, runs `python -m batchq job=sentiment_transcripts engine=fake` on them in a process of its own
and watches the memory of every process it starts. "none" gives the job a tokenizer that takes a whole prompt for
one token, so that everything but tokenisation is left. Rows/s count from the first row that an engine is handed to
the last commit; "whole" is the command from its first line to its exit. Memory is the peak resident size (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROMPT_LABELS = ("positive", "neutral", "negative")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--tokens", choices=("real", "none", "both"), default="both")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the corpus is kept for another time")
    parser.add_argument("overrides", nargs="*", help="of the job, such as output.rows_per_shard=8192")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="batchq-spine-") as scratch:
        work = Path(scratch)
        corpus = (args.folder or work) / f"calls-{args.rows}"
        builder = ROOT / "jobs/sentiment_transcripts/corpus.py"
        subprocess.run([sys.executable, builder, corpus, "--rows", str(args.rows)], check=True)
        print(
            f"{'tokens':<7} {'rows':>9} {'replicas':>8} {'rows/s':>7} {'whole s':>8}  peak MB: driver, replicas; other"
        )
        for kind in ("real", "none") if args.tokens == "both" else (args.tokens,):
            measure(work, corpus, kind, args.replicas, args.overrides)


def measure(work: Path, corpus: Path, kind: str, replicas: int, overrides: list[str]) -> None:
    """Run the job once and print its line."""
    output = work / "out"
    job = ["job=sentiment_transcripts", "engine=fake", f"input.path={corpus}"]
    job += [f"output.path={output}", "output.rows_per_shard=4096", f"cluster.replicas={replicas}"]
    if kind == "none":
        job.append(f"model.path={one_token_model(work / 'one-token')}")
    whole, peaks = labelled([*job, *overrides], ROOT, work / "log")
    summary = json.loads((output / "meta/report.json").read_text())
    seconds = labelling_seconds(output)
    drivers = [peak for name, peak in peaks.items() if name.startswith("driver")]
    workers = [peak for name, peak in peaks.items() if name.startswith("replica")]
    other = max((peak for name, peak in peaks.items() if name.startswith("other")), default=0)
    print(
        f"{kind:<7} {summary['rows']:>9,} {replicas:>8} {summary['rows'] / seconds:>7,.0f} {whole:>8.1f}  "
        f"{max(drivers)}, {'/'.join(map(str, workers))}; {other}   cpu s: "
        + " ".join(f"{name} {value:.1f}" for name, value in summary["cpu_seconds"].items()),
        flush=True,
    )
    shutil.rmtree(output)


def labelled(
    job: list[str], folder: Path, log: Path, look: Callable[[int], object] = lambda _: None
) -> tuple[float, dict[str, int]]:
    """Run batchq in that folder. The command's seconds, and the peak resident MB by process; `look` is given the
    driver's id at each glance. Exits with the log's end if it fails."""
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": search, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "batchq", *job]
    peaks: dict[str, int] = {}
    began = time.monotonic()
    with log.open("wb") as file:
        driver = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
        while driver.poll() is None:
            look(driver.pid)
            watch(driver.pid, peaks)
            time.sleep(0.5)
    whole = time.monotonic() - began
    if driver.returncode:
        sys.exit(log.read_text()[-2000:])
    return whole, peaks


def labelling_seconds(output: Path) -> float:
    """The longest any replica was past its start: from its first row to its last commit, waits included."""
    (run,) = (json.loads(path.read_text()) for path in (output / "meta/runs").glob("*.json"))
    return max(float(r["phases"]["infer"] + r["phases"]["idle"]) for r in run["replicas"])


def watch(root: int, peaks: dict[str, int]) -> None:
    """Note the peak resident MB of the job's driver, its replicas and everything else below it (Ray's own)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it ended between the listing and this line
                continue
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    for pid in found:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "VmHWM:" in status:
            kind = "driver" if pid == root else "replica" if title.startswith("ray::Replica") else "other"
            peak = int(status.split("VmHWM:")[1].split()[0]) // 1024
            peaks[f"{kind} {pid}"] = max(peak, peaks.get(f"{kind} {pid}", 0))


def one_token_model(folder: Path) -> Path:
    """A model's folder, without weights, whose tokenizer makes one token of any text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(exist_ok=True)
    vocabulary = {word: i for i, word in enumerate(("<unk>", *PROMPT_LABELS))}
    fast: Any = PreTrainedTokenizerFast  # its constructor has no annotations
    words = WordLevel(vocabulary, unk_token="<unk>")
    fast(tokenizer_object=Tokenizer(words), unk_token="<unk>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    header = b'{"empty":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
