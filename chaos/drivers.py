"""Whole drivers with Ray and the fake engine: killed, preempted, poisoned, stalled, submitted twice.

Each trial function returns one line of the table, see trial.py. Where an answer that had been kept must not be asked
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
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from chaos.trial import Trial, times
from tests.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 240.0  # for one driver, on a machine that does other things too
NOTICE_S = 30.0  # of a preemption
RARE = "~"  # a character, and a token, that stands in poison rows only
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
        command = [sys.executable, "-m", "batchq", "job=mine", "engine=fake", *overrides]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "BATCHQ_CACHE": str(self.folder / "cache"),
            "HF_HUB_OFFLINE": "1",
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

    def notes(self) -> int:
        """Rows asked since the last call."""
        count = len(self.asked.read_text().splitlines()) if self.asked.exists() else 0
        self.asked.unlink(missing_ok=True)
        return count

    def stamps(self) -> dict[str, tuple[int, int]]:
        return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in self.data.glob("*.parquet")}

    def kept(self) -> int:
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
        return sum(json.loads(p.read_text())["lost_replicas"] for p in (self.meta / "runs").glob("*.json"))


def end(process: subprocess.Popen[str]) -> Ended:
    began = time.monotonic()
    out, err = process.communicate(timeout=PATIENCE_S)
    return Ended(process.returncode, out, err, time.monotonic() - began)


def until(process: subprocess.Popen[str], done: Callable[[], bool]) -> None:
    """Wait for what a driver does; nothing depends on how long it takes."""
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"the driver didn't get so far: {process.communicate()[1][-2000:]}")
        time.sleep(0.02)


def replicas(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of a driver's replicas, as Ray names them."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:  # it ended between the listing and this line
                continue
    ours, size = {process.pid}, 0
    while len(ours) > size:
        size = len(ours)
        ours |= {pid for pid, parent in parents.items() if parent in ours}
    return sorted(pid for pid in ours if names.get(pid, b"").startswith(b"ray::Replica"))


def token() -> int:
    """The id of RARE for the tiny model, whose vocabulary begins with its special tokens and the bytes in order."""
    from tokenizers import Tokenizer

    return int(Tokenizer.from_file(str(_a_model() / "tokenizer.json")).token_to_id(RARE))


def _a_model() -> Path:
    import tempfile

    return make_tiny_model(Path(tempfile.mkdtemp(prefix="batchq-chaos-tiny-")))


# -- trials ---------------------------------------------------------------------------------------------------------


def killed_drivers(work: Path, share: float) -> Trial:
    """SIGKILL at random: the next one resumes from the store alone and touches no committed object."""
    trials, lost, repeated, broken = times(5, share), 0, 0, 0
    for n in range(trials):
        job = Job(work / str(n), 400)
        process = job.start(*TOO_SLOW)
        goal = random.Random(n).randint(2, 12)
        until(process, lambda job=job, goal=goal: len(job.stamps()) >= goal)  # type: ignore[misc]
        process.kill()
        process.communicate()
        before = job.stamps()
        resumed = job.run()
        after = job.stamps()
        broken += resumed.code != 0 or any(after.get(name) != stamp for name, stamp in before.items())
        a, b = job.count()
        lost, repeated = lost + a, repeated + b
    return Trial("a dead driver resumes", trials, trials, lost, repeated, "no committed object changed", broken)


def preempted_drivers(work: Path, share: float) -> Trial:
    """SIGTERM with 30 s to go: exit code 3, and no kept answer is asked again."""
    trials, lost, repeated, broken, slowest = times(20, share), 0, 0, 0, 0.0
    for n in range(trials):
        job = Job(work / str(n), 400, per_shard=100)
        process = job.start(*TOO_SLOW, *job.noting())
        goal = random.Random(n).randint(20, 350)
        until(process, lambda job=job, goal=goal: job.asked.exists() and len(job.asked.read_text()) > 9 * goal)  # type: ignore[misc]
        process.terminate()
        stopped = end(process)
        slowest = max(slowest, stopped.seconds)
        kept = job.kept()
        broken += stopped.code != 3 or stopped.seconds > NOTICE_S or job.notes() != kept
        resumed = job.run(*job.noting())
        broken += resumed.code != 0 or kept + job.notes() != job.rows
        a, b = job.count()
        lost, repeated = lost + a, repeated + b
    note = f"exit code 3 within {slowest:.1f} s; every row was asked once"
    return Trial("SIGTERM with 30 s to go", trials, trials, lost, repeated, note, broken)


def lost_replicas(work: Path, share: float) -> Trial:
    """One of two replicas gets SIGKILL or SIGTERM: the pool goes on. What was not spilled yet is asked again."""
    trials, lost, repeated, broken, more = times(10, share), 0, 0, 0, 0
    for n in range(trials):
        job = Job(work / str(n), 400)
        process = job.start(*TOO_SLOW, "cluster.replicas=2", "cluster.spill_seconds=0.2", *job.noting())
        until(process, lambda job=job: len(job.stamps()) >= 2)  # type: ignore[misc]
        number = (signal.SIGKILL, signal.SIGTERM)[n % 2]
        os.kill(random.Random(n).choice(replicas(process)), number)
        ended = end(process)
        more += job.notes() - job.rows
        broken += ended.code != 0 or job.lost_replicas() != 1
        a, b = job.count()
        lost, repeated = lost + a, repeated + b
    note = f"SIGKILL and SIGTERM by turns; {more} rows in all were asked again"
    return Trial("a lost replica is replaced", trials, trials, lost, repeated, note, broken)


def poison_rows(work: Path, share: float) -> Trial:
    """One row in 1,000 kills the process whenever it is asked: 999 answers and one failure."""
    trials, lost, repeated, broken, most, bound = times(5, share), 0, 0, 0, 0, 0.0
    for n in range(trials):
        row = random.Random(n).randrange(1000)
        job = Job(work / str(n), 1000, per_shard=100, poison=(row,))
        ended = job.run(f"+engine.options.exit_token={token()}", "engine.in_flight=32")
        shard_rows = max(pq.read_metadata(p).num_rows for p in job.data.glob("*.parquet"))
        bound = math.log2(shard_rows) + 2
        restarts = job.lost_replicas()
        most = max(most, restarts)
        broken += ended.code != 0 or job.failures() != {row: "killed_engine"} or restarts > bound
        a, b = job.count()
        lost, repeated = lost + a, repeated + b
    note = f"999 answers, 1 failure each; at most {most} restarts (bound {bound:.1f})"
    return Trial("a row in 1,000 kills its process", trials, trials, lost, repeated, note, broken)


def resumed_searches(work: Path, share: float) -> Trial:
    """The driver is killed while it looks for the row that kills engines: the next one goes on looking."""
    trials, lost, repeated, broken, most, bound = times(5, share), 0, 0, 0, 0, 0.0
    for n in range(trials):
        row = random.Random(n).randrange(200)
        job = Job(work / str(n), 200, per_shard=200, poison=(row,))
        fault = f"+engine.options.exit_token={token()}"

        def losses(job: Job = job) -> int:
            marks = [json.loads(p.read_text()) for p in sorted((job.meta / "attempts/00000").glob("*.json"))]
            return int(marks[-1]["search"]["lost"]) if marks else 0

        process = job.start(fault)
        until(process, lambda losses=losses: losses() >= 3)  # type: ignore[misc]
        process.kill()
        process.communicate()
        ended = job.run(fault)
        bound = math.log2(job.rows) + 2
        most = max(most, losses())
        broken += ended.code != 0 or job.failures() != {row: "killed_engine"} or losses() > bound
        a, b = job.count()
        lost, repeated = lost + a, repeated + b
    note = f"at most {most} restarts over both drivers (bound {bound:.1f})"
    return Trial("a search for a poison row is resumed", trials, trials, lost, repeated, note, broken)


def stalled_engines(work: Path, share: float) -> Trial:
    """An engine that stops answering is taken down, and a line says so."""
    trials, lost, repeated, broken = times(5, share), 0, 0, 0
    for n in range(trials):
        job = Job(work / str(n), 200)
        hang = [f"+engine.options.hang_after={20 + 30 * n}", f"+engine.options.once={work / str(n) / 'struck'}"]
        ended = job.run(*hang, "engine.stall_timeout_s=2")
        broken += ended.code != 0 or job.lost_replicas() != 1 or "stall_timeout_s=2" not in ended.err
        broken += bool(job.failures())
        a, b = job.count()
        lost, repeated = lost + a, repeated + b
    return Trial("a stalled engine is replaced", trials, trials, lost, repeated, "each said in a line", broken)


def submitted_twice(work: Path, share: float) -> Trial:
    """Two drivers on one output, the second while the first works: it leaves, and every row is asked once."""
    trials, lost, repeated, broken = times(5, share), 0, 0, 0
    for n in range(trials):
        job = Job(work / str(n), 300)
        first = job.start(*TOO_SLOW, *job.noting())
        if n % 2:  # by turns both at once, and one after the other
            until(first, lambda job=job: len(job.stamps()) >= 1)  # type: ignore[misc]
        second = job.start(*TOO_SLOW, *job.noting())
        ends = [end(second), end(first)]
        leaves = [e for e in ends if e.code == 3 and "is at work on it, so nothing was started here" in e.err]
        broken += sorted(e.code for e in ends) != [0, 3] or len(leaves) != 1 or job.notes() != job.rows
        a, b = job.count()
        lost, repeated = lost + a, repeated + b
    note = "one worked, the other left and named it; every row was asked once"
    return Trial("two submissions of one run", trials, trials, lost, repeated, note, broken)


def suspended_drivers(work: Path, share: float) -> Trial:
    """A driver that hangs (SIGSTOP) is taken over from, and leaves when it wakes."""
    trials, lost, repeated, broken = times(5, share), 0, 0, 0
    for n in range(trials):
        job = Job(work / str(n), 300)
        first = job.start(*TOO_SLOW)
        until(first, lambda job=job: len(job.stamps()) >= 2)  # type: ignore[misc]
        first.send_signal(signal.SIGSTOP)
        second = job.start(*TOO_SLOW)
        until(second, lambda job=job: (job.meta / "lease/0002.beat.json").exists())  # type: ignore[misc]
        first.send_signal(signal.SIGCONT)
        woken, other = end(first), end(second)
        broken += woken.code not in (0, 3) or other.code != 0 or (woken.code == 3 and "has taken over" not in woken.err)
        a, b = job.count()
        lost, repeated = lost + a, repeated + b
    return Trial(
        "a suspended driver wakes", trials, trials, lost, repeated, "it left for the one that took over", broken
    )


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
