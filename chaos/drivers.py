"""Whole drivers with Ray and the fake engine: killed, preempted, poisoned, stalled, submitted twice.

Each trial function returns one line of the table, see trial.py. Where an answer that had been saved must not be asked
again, the fake engine notes every row it is asked, in a file that outlives it, and the notes are counted.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from chaos.store import side_by_side
from chaos.trial import Trial, times
from tests.helpers import processes_below
from tests.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 240.0  # for one driver, on a machine that does other things too
NOTICE_S = 30.0  # of a preemption
RARE = "~"  # a character, and a token, that is in poison rows only
TOO_SLOW = ["+engine.options.tokens_per_s=4000"]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str
    seconds: float


class Job:
    """A job of `rows` rows in a folder of its own, and its drivers."""

    def __init__(self, work: Path, rows: int, per_shard: int = 20, poison: tuple[int, ...] = ()) -> None:
        self.folder, self.rows = work, rows
        self.data, self.meta = work / "out/data", work / "out/meta"
        self.asked = work / "asked"
        self.verb: list[str] = []  # none for a run
        self.engine = "fake"
        self.within: list[str] = []  # a command that runs the driver's, such as one of another network
        self.environment: dict[str, str] = {}  # of its drivers, beside this process's
        (work / "conf/job").mkdir(parents=True)
        model = make_tiny_model(work / "model")
        (work / "conf/job/mine.yaml").write_text(
            f"""# @package _global_
job: {{name: mine}}
task: {{prompt: "{{{{ text }}}}", labels: [good, bad]}}
model: {{path: "{model}"}}
quantization: {{scheme: none}}
engine: {{max_model_len: 256}}
input: {{path: rows.jsonl}}
output: {{path: out, rows_per_shard: {per_shard}}}
"""
        )
        texts = (f"row {i:05d} says {RARE if i in poison else 'that all is well'}" for i in range(rows))
        (work / "rows.jsonl").write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)))

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        """A driver in a session of its own."""
        command = [*self.within, sys.executable, "-m", "batchq", *self.verb]
        command += ["job=mine", f"engine={self.engine}", *overrides]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "BATCHQ_CACHE": str(self.folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONFAULTHANDLER": "1",
            **self.environment,
        }
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def noting(self) -> list[str]:
        return [f"+engine.options.asked={self.asked}"]

    def run(self, *overrides: str) -> Ended:
        return end(self.start(*overrides))

    def noted(self) -> int:
        """Rows asked so far."""
        return len(self.asked.read_text().splitlines()) if self.asked.exists() else 0

    def notes(self) -> int:
        """Rows asked since the last call."""
        count = self.noted()
        self.asked.unlink(missing_ok=True)
        return count

    def stamps(self) -> dict[str, tuple[int, int]]:
        return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in self.data.glob("*.parquet")}

    def saved(self) -> int:
        """Rows that are committed, or spilled and not committed."""
        ids: set[str] = set()
        for folder in (self.data, self.meta / "partial"):
            for path in folder.rglob("*.parquet"):
                table = pq.read_table(path, columns=["batchq_id", "batchq_error"], partitioning=None)
                ids.update(table["batchq_id"].to_pylist())
        return len(ids)

    def failures(self) -> dict[int, str]:
        table = pq.read_table(self.data, columns=["id", "batchq_error"]).to_pylist()
        return {r["id"]: r["batchq_error"] for r in table if r["batchq_error"]}

    def count(self) -> tuple[int, int]:
        """(rows lost, rows repeated)."""
        seen = Counter(pq.read_table(self.data, columns=["id"])["id"].to_pylist()) if self.data.exists() else Counter()
        return sum(i not in seen for i in range(self.rows)), sum(n - 1 for n in seen.values())

    def lost_replicas(self) -> int:
        return sum(run["lost_replicas"] for run in self.runs())

    def runs(self) -> list[dict[str, Any]]:
        return [json.loads(p.read_text()) for p in (self.meta / "runs").glob("*.json")]

    def lies(self) -> list[str]:
        """What the report doesn't say as it is: tokens are those of the rows that are committed, seconds those of all
        invocations, whatever came of them."""
        said = json.loads((self.meta / "report.json").read_text())
        true: dict[str, float] = {"rows": 0, "prompt_tokens": 0, "output_tokens": 0}
        columns = [f"batchq_{kind}_tokens" for kind in ("prompt", "output")]
        for row in pq.read_table(self.data, columns=columns).to_pylist():
            true["rows"] += 1
            true["prompt_tokens"] += row[columns[0]] or 0
            true["output_tokens"] += row[columns[1]] or 0
        runs = self.runs()
        true |= {"invocations": len(runs), "lost_replicas": sum(run["lost_replicas"] for run in runs)}
        replicas = [replica for run in runs for replica in run["replicas"]]
        seconds = sum(r["devices"] * sum(r["phases"].values()) for r in replicas)
        lies = [f"{name}: {said[name]}, not {value}" for name, value in true.items() if said[name] != value]
        if abs(sum(said["device_seconds"].values()) - seconds) > 0.01 * len(replicas):
            lies.append(f"device_seconds: {said['device_seconds']}, not {seconds} in all")
        return lies


def end(process: subprocess.Popen[str]) -> Ended:
    began = time.monotonic()
    out, err = process.communicate(timeout=PATIENCE_S)
    return Ended(process.returncode, out, err, time.monotonic() - began)


def until(process: subprocess.Popen[str], done: Callable[[], object], may_end: bool = False) -> None:
    """Wait for what a driver does; nothing depends on how long it takes."""
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        code = None if may_end else process.poll()
        if code is not None or time.monotonic() > deadline:
            process.send_signal(signal.SIGABRT)  # Python writes where each thread was
            why = "it is still at it" if code is None else f"exit code {code}"
            out, err = process.communicate()
            raise RuntimeError(f"the driver didn't get so far, {why}: {err[-6000:]}\n{out[-1000:]}")
        time.sleep(0.02)


def strike(victim: int, number: int) -> int:
    """Send a signal until the process is gone; returns how many it took. Ray answers SIGTERM with an exception of
    Python's, which is lost where it comes at a moment at which nothing can be raised."""
    deadline = time.monotonic() + PATIENCE_S
    for sent in count(1):
        try:
            os.kill(victim, number)
            psutil.Process(victim).wait(timeout=5)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return sent
        except psutil.TimeoutExpired:
            if time.monotonic() > deadline:
                raise RuntimeError(f"a replica outlived {sent} signals of number {number}") from None
        else:
            return sent
    raise AssertionError


def replicas(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of a driver's replicas, as Ray names them."""
    return sorted(processes_below(process.pid, b"ray::Replica"))


@cache
def token() -> int:
    """The id of RARE for the tiny model, whose vocabulary begins with its special tokens and the bytes in order."""
    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory(prefix="batchq-chaos-tiny-") as folder:
        found = Tokenizer.from_file(str(make_tiny_model(Path(folder)) / "tokenizer.json")).token_to_id(RARE)
    assert found is not None
    return found


class Tally:
    """What several jobs came to. Trials side by side share it."""

    def __init__(self) -> None:
        self.lost = self.repeated = self.faults = 0
        self.words: list[str] = []  # about what is broken
        self.lock = threading.Lock()

    def struck(self, count: int = 1) -> None:
        with self.lock:
            self.faults += count

    def require(self, held: bool, words: str) -> None:
        if not held:
            with self.lock:
                self.words.append(words)

    def completed(self, job: Job, ended: Ended) -> None:
        """The last driver of a job has ended: every row once, and the ledger as it was."""
        self.require(ended.code == 0, f"exit code {ended.code}: {ended.err[-300:]}")
        lost, repeated = job.count()
        lies = job.lies() if ended.code == 0 else []
        with self.lock:
            self.lost, self.repeated = self.lost + lost, self.repeated + repeated
            self.words += lies

    def trial(self, promise: str, trials: int, note: str) -> Trial:
        for word in self.words[:10]:
            print(f"  {word}")
        return Trial(promise, trials, self.faults, self.lost, self.repeated, note, len(self.words))


def each(trials: int, one: Callable[[int], None]) -> None:
    side_by_side(partial(one, n) for n in range(trials))


# -- trials ---------------------------------------------------------------------------------------------------------


def killed_drivers(work: Path, share: float) -> Trial:
    """SIGKILL at random, again and again: the next one resumes from the store alone and touches no committed object."""
    kills, tally, luck = times(5, share), Tally(), random.Random(0)
    job = Job(work, 600)
    for _ in range(kills):
        before = job.stamps()
        goal = len(before) + luck.randint(1, 4)
        process = job.start(*TOO_SLOW)
        until(process, lambda goal=goal: len(job.stamps()) >= goal)  # type: ignore[misc]
        process.kill()
        tally.require(end(process).code == -signal.SIGKILL, "the driver ended before it was killed")
        tally.struck()
        tally.require(before.items() <= job.stamps().items(), "a committed object changed")
    before = job.stamps()
    tally.completed(job, job.run())
    tally.require(before.items() <= job.stamps().items(), "a committed object changed")
    return tally.trial("a dead driver resumes", kills, "one after another at one output; no committed object changed")


def preempted_drivers(work: Path, share: float) -> Trial:
    """SIGTERM with 30 s to go, ten times at one output: exit code 3, and no saved answer is asked again."""
    stops, tally, seconds = times(20, share), Tally(), [0.0]
    per_chain = min(stops, 10)

    def one(n: int) -> None:
        luck = random.Random(n)
        job = Job(work / str(n), 250 * per_chain, per_shard=100)
        options = ["engine.in_flight=64", *job.noting()]
        for _ in range(per_chain):
            goal = job.noted() + luck.randint(1, 80)
            process = job.start(*TOO_SLOW, *options)
            until(process, lambda goal=goal: job.noted() > goal)  # type: ignore[misc]
            process.terminate()
            stopped = end(process)
            seconds.append(stopped.seconds)
            tally.require(stopped.code == 3, f"exit code {stopped.code} after SIGTERM")
            tally.require(stopped.seconds <= NOTICE_S, f"{stopped.seconds:.0f} s after SIGTERM")
            tally.struck(stopped.code == 3)
            saved, asked = job.saved(), job.noted()
            tally.require(asked == saved, f"{asked} rows asked and {saved} saved")
        tally.completed(job, job.run(*options))
        tally.require(job.noted() == job.rows, f"{job.noted()} rows asked of {job.rows}")

    chains = stops // per_chain
    each(chains, one)
    note = f"{per_chain} at one output; exit code 3 within {max(seconds):.1f} s; every row was asked once"
    return tally.trial("SIGTERM with 30 s to go", chains * per_chain, note)


def lost_replicas(work: Path, share: float) -> Trial:
    """Two replicas, of which one is killed at random, again and again: what was not spilled yet is asked again."""
    runs, tally, more, failed, deaf = times(5, share), Tally(), [0], [0], [0]
    kills = times(100, share) // runs

    def one(n: int) -> None:
        luck, gone = random.Random(n), set[int]()
        # 35 rows are answered between two kills, most by the replica that luck spared: 30 each were too few once.
        job = Job(work / str(n), 60 * kills + 60)
        # A replica may be hit several times before it is ready, which by default ends a run after four.
        options = ["cluster.replicas=2", "cluster.spill_seconds=0.2", f"cluster.max_attempts={kills + 4}"]
        # 13 rows per second and engine, so that no job is done while a replica takes its time to die.
        process = job.start("+engine.options.tokens_per_s=400", *options, *job.noting())
        for number in range(kills):
            goal = job.noted() + luck.randint(1, 29)
            until(process, lambda goal=goal: job.noted() >= goal and set(replicas(process)) - gone)  # type: ignore[misc]
            victim = luck.choice(sorted(set(replicas(process)) - gone))
            deaf.append(strike(victim, (signal.SIGKILL, signal.SIGTERM)[number % 2]) - 1)
            gone.add(victim)
        tally.completed(job, end(process))
        tally.struck(job.lost_replicas())
        tally.require(job.lost_replicas() == kills, f"{kills} kills, {job.lost_replicas()} replicas lost")
        more.append(job.notes() - job.rows)
        failed.append(len(job.failures()))

    each(runs, one)
    note = f"{kills} per run, SIGKILL and SIGTERM by turns; {sum(more)} rows were asked again, {sum(failed)} given up"
    note += f"; {sum(deaf)} SIGTERMs were ignored and sent again" if sum(deaf) else ""
    return tally.trial("replicas killed at random", runs, note)


def poison_rows(work: Path, share: float) -> Trial:
    """One row in 1,000 kills the process whenever it is asked: 999 answers and one failure."""
    trials, tally, restarts, bounds = times(5, share), Tally(), [0], [0.0]

    def one(n: int) -> None:
        row = random.Random(n).randrange(1000)
        job = Job(work / str(n), 1000, per_shard=100, poison=(row,))
        tally.completed(job, job.run(f"+engine.options.exit_token={token()}", "engine.in_flight=32"))
        shard_rows = max(pq.read_metadata(p).num_rows for p in job.data.glob("*.parquet"))
        restarts.append(job.lost_replicas())
        bounds.append(math.log2(shard_rows) + 2)
        tally.struck(restarts[-1] > 0)
        tally.require(job.failures() == {row: "killed_engine"}, f"row {row} kills, failures are {job.failures()}")
        tally.require(job.lost_replicas() <= bounds[-1], f"{job.lost_replicas()} restarts")

    each(trials, one)
    note = f"999 answers, 1 failure each; at most {max(restarts)} restarts (bound {max(bounds):.1f})"
    return tally.trial("a row in 1,000 kills its process", trials, note)


def resumed_searches(work: Path, share: float) -> Trial:
    """The driver is killed while it looks for the row that kills engines: the next one goes on looking."""
    trials, tally, restarts, bound = times(5, share), Tally(), [0], math.log2(200) + 2

    def one(n: int) -> None:
        row = random.Random(n).randrange(200)
        job = Job(work / str(n), 200, per_shard=200, poison=(row,))
        fault = f"+engine.options.exit_token={token()}"

        def losses() -> int:
            marks = [json.loads(p.read_text()) for p in sorted((job.meta / "attempts/00000").glob("*.json"))]
            return int(marks[-1]["search"]["lost"]) if marks else 0

        process = job.start(fault)
        until(process, lambda: losses() >= 3)
        process.kill()
        tally.require(end(process).code == -signal.SIGKILL, "the driver ended before it was killed")
        tally.struck()
        tally.completed(job, job.run(fault))
        restarts.append(losses())
        tally.require(job.failures() == {row: "killed_engine"}, f"row {row} kills, failures are {job.failures()}")
        tally.require(losses() <= bound, f"{losses()} restarts")

    each(trials, one)
    note = f"at most {max(restarts)} restarts over both drivers (bound {bound:.1f})"
    return tally.trial("a search for a poison row is resumed", trials, note)


def stalled_engines(work: Path, share: float) -> Trial:
    """An engine that stops answering is taken down, and a line says so."""
    trials, tally = times(5, share), Tally()

    def one(n: int) -> None:
        job = Job(work / str(n), 200)
        hang = [f"+engine.options.hang_after={20 + 30 * n}", f"+engine.options.once={work / str(n) / 'struck'}"]
        ended = job.run(*hang, "engine.stall_timeout_s=2")
        tally.completed(job, ended)
        tally.struck((work / str(n) / "struck").exists())
        tally.require(job.lost_replicas() == 1, f"{job.lost_replicas()} replicas lost")
        tally.require("stall_timeout_s=2" in ended.err, "nobody said that it stalled")
        tally.require(not job.failures(), f"failures: {job.failures()}")

    each(trials, one)
    return tally.trial("a stalled engine is replaced", trials, "each said in a line")


def submitted_twice(work: Path, share: float) -> Trial:
    """Two drivers on one output, which one alone would work at for a while: one leaves, every row is asked once."""
    trials, tally = times(5, share), Tally()

    def one(n: int) -> None:
        job = Job(work / str(n), 300)
        slowly = ["+engine.options.tokens_per_s=100", *job.noting()]
        first = job.start(*slowly)
        if n % 2:  # by turns both at once, and one after the other
            until(first, lambda: len(job.stamps()) >= 1)
        second = job.start(*slowly)
        until(first, lambda: second.poll() is not None or first.poll() is not None, may_end=True)
        leaver, worker = (second, first) if second.poll() is not None else (first, second)
        worker.terminate()
        left, stopped = end(leaver), end(worker)
        named = left.code == 7 and "is at work on it, so nothing was started here" in left.err
        tally.require(named, f"exit codes {left.code} and {stopped.code}: {left.err[-300:]}")
        tally.require(stopped.code == 3, f"exit code {stopped.code} after SIGTERM")
        tally.struck(named)
        tally.completed(job, job.run(*job.noting()))
        asked = job.notes()
        tally.require(asked == job.rows, f"{asked} rows asked")

    each(trials, one)
    note = "one worked, the other left and named it; every row was asked once"
    return tally.trial("two submissions of one run", trials, note)


def suspended_drivers(work: Path, share: float) -> Trial:
    """A driver that hangs (SIGSTOP) is taken over from, and leaves when it wakes."""
    trials, tally = times(5, share), Tally()

    def one(n: int) -> None:
        job = Job(work / str(n), 300)
        first = job.start(*TOO_SLOW)
        until(first, lambda: len(job.stamps()) >= 2)
        first.send_signal(signal.SIGSTOP)
        second = job.start(*TOO_SLOW)
        until(second, lambda: (job.meta / "lease/0002.beat.json").exists())
        first.send_signal(signal.SIGCONT)
        woken, other = end(first), end(second)
        tally.struck()
        left = woken.code == 7 and "has taken over" in woken.err
        tally.require(left or woken.code == 0, f"the one that woke ended in exit code {woken.code}")
        tally.completed(job, other)

    each(trials, one)
    return tally.trial("a suspended driver wakes", trials, "it left for the one that took over, or all was done")


TRIALS: list[Callable[[Path, float], Trial]] = [
    killed_drivers,
    preempted_drivers,
    lost_replicas,
    poison_rows,
    resumed_searches,
    stalled_engines,
    submitted_twice,
    suspended_drivers,
]
