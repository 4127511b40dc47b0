"""From one GPU to eight: the transcript job on more GPUs, in fewer bits, and with a replica lost, on one machine.

    python benchmarks/scaling.py --work FOLDER                       # all cases that this machine holds
    python benchmarks/scaling.py --work FOLDER --cases replicas,kill --counts 1,8
    python benchmarks/scaling.py --model weights/tiny --rows 256 --tokens 100 --counts 1,2      # two CPU cores

On two GPUs that are had for half an hour, ten minutes a command: this one three times, or until nothing is left to do;
each goes on from what is in `--work`, and the last one's table has it all:

    python benchmarks/scaling.py --counts 1,2 --work out/scaling --within 540

Seven runs, of which two GPUs of 80 GB leave out Scout in BF16. Where a 70B shape has no memory left for its
steps on them, `--cases 70b --set engine.max_num_batched_tokens=8192` takes less; it makes another run of it.

| case | what runs |
| --- | --- |
| replicas | an 8B shape in FP8: 1, 2, 4, 8 replicas of one GPU each, `--rows` rows for each replica |
| 70b | a 70B shape: BF16 over two GPUs by tensor parallelism, FP8 on one |
| 109b | Llama 4 Scout's language model: BF16 over the GPUs that `plan` says, INT4 weights on one |
| kill | as `replicas`, with the highest count; one replica's process is killed after a quarter of the rows |

Each run is `python -m batchq job=sentiment_transcripts` from a Parquet file to committed Parquet; the rows are those of
benchmarks/peers.py. Weights are random (benchmarks/shapes.py): written for 8B, in shape only for the larger ones, which
vLLM then fills in itself; what that does to a speed stands there. The environment goes to every process as it is. A run
that the machine can't hold, that fails or takes longer than `--limit` says so in a line, and the next begins; nothing
is left running of it. Everything stays in `--work`, if given: another command with the same folder shows the runs that
stand there and does what is missing, failed ones again. With `--within` no run is begun for which too little of the
command's time is left, by how long the longest took before.

- rows/s, tokens/s and USD count the time after each replica's engine was ready, waiting included, by batchq's own
  accounts: with `n` replicas rows/s are n x rows / the sum of their seconds.
- "of one" is that a GPU, against the run with one replica. Wanted: 0.97 at eight.
- "tail" is how many seconds longer the replica that waited longest was without a row than the one that waited least:
  the end, where some have nothing left to do.
- "apart" are the seconds between the first replica's being ready and the last's; "start" what the slowest took to be.
- "MFU" is the share of the GPUs' dense peak while they inferred, "J/1,000" their joules per thousand tokens, both by
  the report and only where there is a GPU that is known.
- USD are for a million tokens at conf/pricing's prices, start-up left out; a longer job has so much less of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))

from batchq import cli  # noqa: E402
from batchq.account.cost import price  # noqa: E402
from batchq.config import Scheme  # noqa: E402
from batchq.machine import hardware  # noqa: E402
from batchq.machine.hardware import Hardware  # noqa: E402
from batchq.machine.words import gib  # noqa: E402
from batchq.model.tensors import Shape  # noqa: E402
from batchq.quantize.sizes import Quantization, predicted_bytes  # noqa: E402
from batchq.sizing.memory import memory_needed, parallelism_for, usable_bytes  # noqa: E402
from benchmarks import clock, gpu, process, shapes  # noqa: E402
from benchmarks.case import compose_rows  # noqa: E402
from benchmarks.clock import say  # noqa: E402
from benchmarks.process import CannotRun  # noqa: E402

CASES = ("replicas", "70b", "109b", "kill")
ROWS = {"8b": 4000, "70b": 500, "scout": 1000}  # a replica: about a minute of an H200
SHARD = 128  # rows; two seconds of an 8B shape on an H200
ASIDE = 60.0  # seconds, about, that a run takes before its replicas start and after they have ended


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the job and all that decides its figures. `shape`: one of benchmarks/shapes.py, or a folder's path."""

    case: str
    shape: str
    scheme: Scheme
    rows: int
    tokens: int  # a row, about
    overrides: tuple[str, ...]  # of the job
    hollow: bool  # vLLM fills in the weights
    replicas: int = 1
    tensor: int = 1
    pipeline: int = 1
    kill: bool = False

    @property
    def name(self) -> str:
        ways = [f"tp {self.tensor}"] * (self.tensor > 1) + [f"pp {self.pipeline}"] * (self.pipeline > 1)
        count = [f"{self.replicas} replica" + "s" * (self.replicas > 1)] * (self.case in ("replicas", "kill"))
        form = self.scheme.value.replace("none", "bf16")
        return " ".join([Path(self.shape).name, form, *ways, *count, *self.overrides])

    @property
    def devices(self) -> int:
        return self.replicas * self.tensor * self.pipeline

    @property
    def length(self) -> int:
        """engine.max_model_len"""
        return max(256, 1 << math.ceil(math.log2(self.tokens * 1.2)))


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
    mfu: float | None = None  # share of the GPUs' dense peak while they inferred
    joules: float | None = None  # of the GPUs, a thousand tokens


class Bench:
    """A folder to work in, and the machine."""

    def __init__(self, work: Path, here: Hardware, limit: float) -> None:
        self.work, self.here, self.limit = work, here, limit
        self.free = gpu.free_memory()

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
        shape, how = Shape(tensors, config), Quantization.of(run.scheme, tensors)
        ways = {"tensor": run.tensor, "pipeline": run.pipeline}
        need = memory_needed(shape, how, max_model_len=run.length, device="cuda", **ways)
        if need.total > usable_bytes(self.here):
            have = gib(usable_bytes(self.here))
            raise CannotRun(f"takes {gib(need.total)} of a GPU's memory, {have} can be had")
        size = predicted_bytes(tensors, how)
        if not (run.hollow or self.folder(run).is_dir()) and hardware.free_disk(self.work) < size:
            raise CannotRun(f"takes {gib(size)} of disk; --sparse takes none")

    def folder(self, run: Run) -> Path:
        if run.shape not in ROWS:
            return Path(run.shape)
        return self.work / "weights" / f"{run.shape}-{run.scheme.value}{'-sparse' * run.hollow}"

    def write_weights(self, run: Run) -> None:
        """In a process of its own: this one would keep a GPU's memory for having used it once."""
        folder = self.folder(run)
        if run.shape not in ROWS or (folder / "config.json").is_file():
            return
        words = [run.shape, str(folder), "--scheme", run.scheme.value, *["--sparse"] * run.hollow]
        log = self.work / f"{folder.name}.log"
        command = [sys.executable, str(ROOT / "benchmarks/shapes.py"), *words]
        process.call(command, environment(), log, self.limit)
        say(log.read_text().strip().rpartition("\n")[2])

    def compose(self, rows: int, run: Run) -> Path:
        """The corpus of so many rows, made with that run's tokenizer unless it is there."""
        corpus = self.corpus(rows, run)
        if not corpus.is_file():
            say(f"composing {rows:,} rows of about {run.tokens:,} tokens")
            config = cli.compose([*self.job(run), "output.path=none"])
            compose_rows(config, str(self.folder(run)), rows, run.tokens, corpus)
        return corpus

    def cut(self, corpus: Path, run: Run) -> None:
        """The run's rows, the first of those. Not by `input.limit`: it would cut off the small shards at the corpus's
        end, which are there for the tail."""
        if not (part := self.corpus(run.rows, run)).is_file():
            part.parent.mkdir(parents=True, exist_ok=True)
            partial = part.with_suffix(".partial")
            pq.write_table(pq.read_table(corpus).slice(0, run.rows), partial, compression="zstd", row_group_size=512)
            partial.rename(part)

    def corpus(self, rows: int, run: Run) -> Path:
        return self.work / f"calls-{rows}-{run.tokens}" / "calls.parquet"

    def job(self, run: Run) -> list[str]:
        """The job's overrides, but for where it writes."""
        words = ["job=sentiment_transcripts", "model=folder", f"model.path={self.folder(run)}", "quantization=none"]
        words += ["gate=off", f"input.path={self.corpus(run.rows, run)}", "task.gold=null"]
        words += [f"engine.max_model_len={run.length}", f"output.rows_per_shard={SHARD}"]
        words += [f"cluster.replicas={run.replicas}", f"cluster.tensor_parallel_size={run.tensor}"]
        words += [f"cluster.pipeline_parallel_size={run.pipeline}"]
        if not self.here.gpus:
            words.append("cluster.cpus_per_replica=1")
        if run.hollow:
            words.append("+engine.options.load_format=dummy")
        return [*words, *run.overrides]

    def measure(self, run: Run, limit: float) -> Figures:
        """Do the run. Raises CannotRun when it fails, takes longer than the limit, or repeats or loses a row."""
        name = re.sub(r"[^\w.-]+", "-", f"{run.case}-{run.name}")
        out, log = self.work / f"{name}-out", self.work / f"{name}.log"
        shutil.rmtree(out, ignore_errors=True)
        words = [*self.job(run), f"output.path={out}"]
        command = [sys.executable, "-m", "batchq"]
        fine = (0, 4)  # 4: complete, with failures; how many is in the table
        glance = killer(run, out) if run.kill else None
        seen = process.call([*command, *words], environment(), log, limit, glance, 0.5, fine)
        if run.kill:
            if seen is None:
                raise CannotRun("it ended before all replicas were at work; --rows takes more of them")
            process.call([*command, "verify", *words], environment(), self.work / f"{name}-verify.log", limit)
            say("  verify: every row is there once")
        summary = json.loads((out / "meta/report.json").read_text())
        (record,) = (json.loads(path.read_text()) for path in (out / "meta/runs").glob("*.json"))
        found = figures(summary, record, cli.compose(words).pricing)
        row = {"run": {**dataclasses.asdict(run), "scheme": run.scheme.value}, "figures": dataclasses.asdict(found)}
        with (self.work / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return found

    def done(self) -> dict[Run, Figures]:
        """All that was measured in this folder, by earlier commands too."""
        file = self.work / "results.jsonl"
        found = {}
        for text in file.read_text().splitlines() if file.is_file() else ():
            row = json.loads(text)
            more = {"scheme": Scheme(row["run"]["scheme"]), "overrides": tuple(row["run"]["overrides"])}
            found[Run(**{**row["run"], **more})] = Figures(**row["figures"])
        return found


def environment() -> dict[str, str]:
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": search}


def killer(run: Run, out: Path) -> Callable[[int], bool]:
    """SIGKILLs a replica of the batchq process that it is given, and says True, once all have answered something, by
    batchq's accounts, which are up to 15 s old, and a quarter of the rows is committed."""
    import psutil

    def glance(driver: int) -> bool:
        if at_work(out) < run.replicas:
            return False
        done = sum(pq.read_metadata(part).num_rows for part in (out / "data").glob("*.parquet"))
        if done < run.rows / 4:
            return False
        try:
            found = psutil.Process(driver).children(recursive=True)
            actors = [child for child in found if child.name().startswith("ray::Replica")]
        except psutil.NoSuchProcess:  # some short-lived process of Ray's went while it was looked at; once more
            return False
        if not actors:  # they have ended
            return False
        actors[-1].kill()
        say(f"  killed one of {len(actors)} replicas when {done:,} of {run.rows:,} rows were committed")
        return True

    return glance


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
        mfu=summary["mfu"],
        joules=summary["joules_per_thousand_tokens"],
    )


# ---- cases ----


def runs_of(args: argparse.Namespace, cases: list[str], counts: list[int], here: Hardware) -> list[Run]:
    """The runs, in their order; those that the machine can't hold included."""
    model = str(args.model.absolute()) if args.model else "8b"
    scheme = Scheme.fp8 if model in ROWS else Scheme.none
    wanted = {shape: args.rows or many for shape, many in ROWS.items()}
    each = args.rows or wanted.get(model, 256)

    def a_run(case: str, shape: str, scheme: Scheme, rows: int, **more: Any) -> Run:
        hollow = shape in ROWS and (args.sparse or shape != "8b")
        return Run(case, shape, scheme, rows, args.tokens, tuple(args.set), hollow, **more)

    found = []
    if "replicas" in cases:
        found += [a_run("replicas", model, scheme, each * count, replicas=count) for count in counts]
    if "70b" in cases:
        found.append(a_run("70b", "70b", Scheme.none, wanted["70b"], tensor=2))
        found.append(a_run("70b", "70b", Scheme.fp8, wanted["70b"]))
    if "109b" in cases:
        config, tensors = shapes.described("scout")
        memory = min((gpu.memory for gpu in here.gpus), default=80 << 30)
        found_ways = parallelism_for(Shape(tensors, config), Quantization(Scheme.none), memory, max_model_len=2048)
        ways = {"tensor": found_ways.tensor, "pipeline": found_ways.pipeline} if found_ways else {"tensor": 8}
        found.append(a_run("109b", "scout", Scheme.none, wanted["scout"], **ways))
        found.append(a_run("109b", "scout", Scheme.w4a16, wanted["scout"]))
    if "kill" in cases:
        units = len(here.gpus) or len(here.cores)
        count = max([2, *(count for count in counts if count <= units)])
        found.append(a_run("kill", model, scheme, each * count, replicas=count, kill=True))
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
    parser.add_argument("--within", type=float, default=math.inf, help="seconds that the whole command may take")
    args = parser.parse_args()
    cases = args.cases.split(",")
    if unknown := sorted(set(cases) - set(CASES)):
        parser.error(f"--cases {unknown[0]}: choose of {', '.join(CASES)}")
    counts = [int(count) for count in args.counts.split(",")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends too
    here = hardware.detect()
    with tempfile.TemporaryDirectory(prefix="batchq-scaling-") as scratch:
        work = (args.work or Path(scratch)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        units = f"{len(here.gpus)} x {here.accelerator}" if here.gpus else f"{len(here.cores)} x {here.cpu}"
        free = f" ({', '.join(gib(gpu.free) for gpu in here.gpus)} free)" if here.gpus else ""
        cores = f"{len(os.sched_getaffinity(0))} cores"
        say(f"{units}{free}, {cores}; {process.versions()}; about {args.tokens:,} tokens a row")
        compare(Bench(work, here, args.limit), runs_of(args, cases, counts, here), args.within)


def compare(bench: Bench, runs: list[Run], within: float) -> None:
    """Show what is there, run what is missing and can be run with a line for each, then say what it is about."""
    done = bench.done()
    able = []
    for run in [run for run in runs if run not in done]:
        try:
            bench.require(run)
            able.append(run)
        except CannotRun as error:
            say(f"{run.case}: {run.name} left out: {error}")
    columns = ["rows", "start s", "work s", "rows/s", "tokens/s", "a GPU", "of one", "tail s", "apart s"]
    columns += ["USD/Mtok", "MFU", "J/1,000"]
    line("case", "run", *columns, "answers")
    for run in done:
        show(run, done)
    for run in able:
        left, longest = clock.left(within), max((f.start + f.work + ASIDE for f in done.values()), default=0.0)
        if left < longest:
            say(f"{max(left, 0.0):.0f} s are left, a run has taken {longest:.0f}: the same command again does the rest")
            break
        try:
            bench.write_weights(run)
            bench.cut(bench.compose(max(each.rows for each in able), run), run)
            done[run] = bench.measure(run, min(bench.limit, clock.left(within)))
            show(run, done)
        except CannotRun as error:
            say(f"{run.case}: {run.name} failed: {error}")
        except Exception as error:  # what it left can't be read; the others aren't to suffer for it
            say(f"{run.case}: {run.name} failed: {type(error).__name__}: {error}")
        gpu.await_memory(bench.free)
    conclude(done)


def show(run: Run, done: dict[Run, Figures]) -> None:
    found = done[run]
    one = done.get(dataclasses.replace(run, rows=run.rows // run.replicas, replicas=1))
    line(
        run.case,
        run.name,
        f"{found.rows:,}",
        f"{found.start:.1f}",
        f"{found.work:.1f}",
        f"{found.rows_a_second:.2f}",
        f"{found.tokens_a_second:,.0f}",
        "-" if run.kill else f"{found.tokens_a_second / found.devices:,.0f}",
        f"{found.rows_a_second / found.devices / one.rows_a_second:.3f}" if one and run.case == "replicas" else "-",
        "-" if run.kill else f"{found.tail:.1f}",
        "-" if run.kill else f"{found.apart:.1f}",
        "-" if found.usd is None else f"{found.usd:.4f}",
        "-" if found.mfu is None else f"{found.mfu:.3f}",
        "-" if found.joules is None else f"{found.joules:.1f}",
        f"{found.answers:,}" + f", {found.lost} replica lost" * (found.lost > 0),
    )
    if found.devices < run.devices:
        say(f"  only {found.devices} of {run.devices} were ready before the work was done; --rows takes more of them")


def conclude(done: dict[Run, Figures]) -> None:
    """What the pairs say to each other."""
    for (full, much), (few, little) in itertools.permutations(done.items(), 2):
        alike = (full.case, full.rows, full.tokens) == (few.case, few.rows, few.tokens)
        if alike and full.case in ("70b", "109b") and few.scheme is not full.scheme is Scheme.none:
            a_gpu = little.tokens_a_second / little.devices / (much.tokens_a_second / much.devices)
            cost = f", {little.usd / much.usd:.2f} of the cost a million tokens" if little.usd and much.usd else ""
            say(
                f"{few.case}: {few.name} on {few.devices} against {full.name} on {full.devices}: {a_gpu:.2f} of the "
                f"tokens/s a GPU{cost}"
            )
    for run, found in done.items():
        whole = done.get(dataclasses.replace(run, case="replicas", kill=False))
        if run.kill and whole:
            say(
                f"kill: {found.work:.1f} s of work where {whole.work:.1f} were without a kill: "
                f"{found.work - whole.work:+.1f} s; {found.answers:,} answers of {found.rows:,} rows"
            )


def line(*cells: str) -> None:
    widths = (9, 28, 7, 8, 7, 8, 9, 9, 7, 7, 8, 9, 6, 8)
    padded = [f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=False))]
    say(" ".join([*padded, *cells[len(widths) :]]))


if __name__ == "__main__":
    main()
