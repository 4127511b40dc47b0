"""Trials of the store and the rows: kills at every step, lost replies, faults of the store, races, lying clocks."""

from __future__ import annotations

import functools
import random
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from pathlib import Path

from batchq.storage import failpoint
from chaos import attempt, corpus, count
from chaos.attempt import FORKS, SPARED, Order, exit_code, start
from chaos.corpus import Corpus
from chaos.count import Answers
from chaos.trial import Trial, times
from tests.s3 import Flaky, flaky, s3_server

KILLED = -9
AT_ONCE = 2  # trials side by side
RESUMES = 8  # attempts until a trial has to be complete
TAKEN = "write.commit.taken"  # the one step that a run alone, on a store without faults, never comes to
SLOW = {"latency_s": 0.004}  # a request; so that spills fall into a shard's middle


@dataclass
class Bench:
    """Where trials of one kind run: a corpus, a store, what a run without a fault answers, and what went wrong."""

    work: Path
    corpus: Corpus
    root: str  # outputs lie below it
    env: dict[str, str]
    golden: Answers = field(default_factory=dict)
    hits: dict[str, int] = field(default_factory=dict)  # failpoints that a run without a fault reaches
    lost: int = 0
    repeated: int = 0
    broken: int = 0
    words: list[str] = field(default_factory=list)  # about what is broken

    def __post_init__(self) -> None:
        self.lock = threading.Lock()

    def order(self, output: str, **more: object) -> Order:
        """An attempt at the corpus that writes to `output`."""
        made = Order(self.corpus.job(output), self.env, self.work / "log", engine=SLOW)
        return replace(made, **more)  # type: ignore[arg-type]

    def fresh(self) -> str:
        return f"{self.root}/out-{uuid.uuid4().hex[:12]}"

    def resume(self, output: str, **more: object) -> int:
        """Fresh attempts until one completes; returns how many it took."""
        for number in range(1, RESUMES + 1):
            code = exit_code(start(self.order(output, **more)))
            if code == 0:
                return number
            if code not in (1, KILLED):
                self.fault(f"{output}: an attempt ended in exit code {code}")
        self.fault(f"{output}: not complete after {RESUMES} attempts")
        return RESUMES

    def judge(self, output: str, readers: bool = False, env: Mapping[str, str] | None = None) -> None:
        """Count the rows that are committed there."""
        found = count.count(output, self.corpus.ids, env or self.env, self.golden)
        failing: list[str] = []
        if readers:
            failing = count.readers_that_fail(output, len(self.corpus.ids), self.work / uuid.uuid4().hex, self.env)
        with self.lock:
            self.lost += found.lost
            self.repeated += found.repeated
        if found.lost or found.repeated or found.broken:
            self.fault(f"{output}: lost {found.lost}, repeated {found.repeated}, broken {found.broken}")
        for name in failing:
            self.fault(f"{output}: {name} doesn't read {len(self.corpus.ids)} rows")

    def fault(self, words: str) -> None:
        with self.lock:
            self.broken += 1
            self.words.append(words)

    def trial(self, promise: str, trials: int, faults: int, note: str = "") -> Trial:
        for word in self.words[:10]:
            print(f"  {word}")
        return Trial(promise, trials, faults, self.lost, self.repeated, note, self.broken)


@contextmanager
def local(work: Path) -> Iterator[Bench]:
    yield measured(Bench(work, corpus.make(work), str(work), {}))


@contextmanager
def tables(work: Path) -> Iterator[Bench]:
    yield measured(Bench(work, corpus.make_tables(work), str(work), {}))


@contextmanager
def on_s3(work: Path) -> Iterator[Bench]:
    made = corpus.make(work)
    with s3_server(work / "weed") as s3:
        yield measured(Bench(work, made, s3.make_bucket("chaos"), s3.env))


def measured(bench: Bench) -> Bench:
    """Run once without a fault: its answers are the golden ones, its failpoints those to strike at."""
    import json

    output, hits = bench.fresh(), bench.work / "hits"
    if exit_code(start(bench.order(output, hits=hits))) != 0:
        raise RuntimeError("the run without a fault failed:\n" + (bench.work / "log").read_text()[-2000:])
    bench.hits = json.loads(hits.read_text())
    bench.golden = count.count(output, bench.corpus.ids, bench.env).answers
    bench.judge(output, readers=True)
    return bench


def side_by_side(trials: Iterable[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for done in [threads.submit(trial) for trial in trials]:
            done.result()


# ---- kills ----


def killed_at_every_step(work: Path, share: float) -> Trial:
    with local(work) as bench:
        return at_every_step(bench, share, "killed or failing at each step, local files")


def killed_at_every_step_on_s3(work: Path, share: float) -> Trial:
    with on_s3(work) as bench:
        return at_every_step(bench, share, "killed or failing at each step, S3")


def killed_reading_parquet(work: Path, share: float) -> Trial:
    """The steps that only a corpus of tables comes by; all others are struck above."""
    with tables(work) as bench:
        return at_every_step(bench, share, "killed or failing while Parquet is read, local files", "read.")


def steps(bench: Bench, of: str = "") -> list[str]:
    """The failpoints that `at_every_step` strikes at."""
    return sorted(name for name in bench.hits if name.startswith(of))


def at_every_step(bench: Bench, share: float, promise: str, of: str = "") -> Trial:
    struck: Counter[str] = Counter()

    def one(point: str, action: str, number: int, readers: bool) -> None:
        output = bench.fresh()
        for at in (1 + number % bench.hits[point], 1):  # how often a spill's are reached depends on the clock
            code = exit_code(start(bench.order(output, failpoints=f"{point}@{at}={action}")))
            # Where a spill may fail, its rows are asked again and the attempt goes on: exit code 0.
            if code == KILLED if action == "kill" else code in (0, 1):
                struck[action] += 1
                break
            output = bench.fresh()
        else:
            bench.fault(f"{point}@{number}={action} didn't strike: exit code {code}")
        bench.resume(output)
        bench.judge(output, readers)

    kills, raises = times(20, share), times(5, share)
    trials = []
    stride = max(1, round(0.05 / share))  # a share too small for one kill at each step takes fewer steps
    for point in steps(bench, of)[::stride]:
        trials += [functools.partial(one, point, "kill", n, n == 0) for n in range(kills)]
        spread = max(1, bench.hits[point] // 5)
        trials += [functools.partial(one, point, "raise", n * spread, False) for n in range(raises)]
    side_by_side(trials)
    note = f"{struck['kill']} SIGKILLs, {struck['raise']} exceptions at {len(steps(bench, of))} steps"
    if not of and (elsewhere := sorted(failpoints() - bench.hits.keys())):
        note += f"; not on this way: {', '.join(elsewhere)}"
    return bench.trial(promise, len(trials), struck.total(), note)


def failpoints() -> set[str]:
    """All that the code names."""
    modules = Path(failpoint.__file__).parents[1].rglob("*.py")
    return {name for path in modules for name in re.findall(r'failpoint\.reach\("([\w.]+)"\)', path.read_text())}


def killed_at_random(work: Path, share: float) -> Trial:
    """An attempt killed, resumed, killed again, at moments that nobody chose."""
    with local(work) as bench:
        struck: Counter[int] = Counter()
        began = time.monotonic()
        bench.resume(bench.fresh())
        whole = time.monotonic() - began  # of a run without a fault, in seconds

        def one(seed: int) -> None:
            luck, output = random.Random(seed), bench.fresh()
            kills = 0
            while kills < 5:
                process = start(bench.order(output))
                connection.wait([process.sentinel], luck.uniform(0, whole))
                process.kill()
                code = exit_code(process)
                struck[code] += 1
                kills += code == KILLED
                if code == 0:  # it was quicker; the kills that are left hit another run
                    bench.judge(output)
                    output = bench.fresh()
                elif code != KILLED:
                    bench.fault(f"{output}: an attempt ended in exit code {code}")
                    break
            bench.resume(output)
            bench.judge(output)

        trials = times(20, share)
        side_by_side(functools.partial(one, seed) for seed in range(trials))
        note = f"{struck[0]} attempts were quicker" if struck[0] else ""
        return bench.trial("killed at random moments, five times per run, local files", trials, struck[KILLED], note)


def killed_in_mid_commit(work: Path, share: float) -> Trial:
    """A process that does nothing but commit objects of some MB, killed at random: what it leaves under data/."""
    bench = Bench(work, corpus.make(work), str(work), {})
    output, luck, struck = bench.fresh(), random.Random(0), 0
    trials = times(100, share)
    for number in range(trials):
        ready = FORKS.Event()
        process = FORKS.Process(target=attempt.commit_forever, args=(output, number * 10_000, ready), daemon=True)
        process.start()
        ready.wait(60)
        time.sleep(luck.uniform(0, 0.06))
        process.kill()
        if (code := exit_code(process)) == KILLED:
            struck += 1
        else:
            bench.fault(f"the writer ended in exit code {code} before it was killed")
    found: Counter[str] = Counter()
    for name, data in count.objects(f"{output}/data", {}).items():
        if not count.PART.fullmatch(name):
            bench.fault(f"stray: {name}")
            continue
        found.update(attempt.ids_of(data))
    bench.repeated = sum(n - 1 for n in found.values())
    bench.lost = sum(n % attempt.ROWS_PER_COMMIT != 0 for n in Counter(i.split(":")[0] for i in found).values())
    left = len(count.objects(f"{output}/meta/tmp", {}))
    note = f"{len(found) // attempt.ROWS_PER_COMMIT} objects whole; {left} unfinished ones, all under meta/tmp"
    return bench.trial("a writer killed in mid-commit, local files", trials, struck, note)


# ---- the store ----


def lost_replies(work: Path, share: float) -> Trial:
    """The store commits, and the connection is reset before it says so. The same attempt has to go on."""
    with on_s3(work) as bench, _spoiled(bench) as proxy:
        wanted = times(100, share)
        luck, lost = random.Random(0), Counter[bytes]()

        def choose(head: bytes) -> str:
            name = head.split(b" ", 2)[1]
            created = head.startswith(b"PUT ") and b"if-none-match" in head.lower()
            # Six in a row are given up, and rightly so.
            if not created or lost[name] == 3 or proxy.struck["lose"] >= wanted or luck.random() > 0.4:
                return "pass"
            lost[name] += 1
            return "lose"

        proxy.choose = choose
        runs = 0
        while proxy.struck["lose"] < wanted:
            output, runs = bench.fresh(), runs + 1
            code = exit_code(start(bench.order(output, env=proxy.env)))
            if code != 0:
                bench.fault(f"{output}: took a lost reply for a failure: exit code {code}")
                bench.resume(output)
            bench.judge(output)
        struck = proxy.struck["lose"]
        return bench.trial("replies lost after the store committed, S3", struck, struck, f"in {runs} runs")


def killed_after_a_lost_reply(work: Path, share: float) -> Trial:
    """The store commits, the reply is lost, and the process dies when it finds the name taken, by itself."""
    with on_s3(work) as bench, _spoiled(bench) as proxy:
        trials, struck, due = times(20, share), 0, False

        def choose(head: bytes) -> str:
            nonlocal due
            if due and head.startswith(b"PUT ") and b"/data/part-" in head.split(b"\r\n", 1)[0]:
                due = False
                return "lose"
            return "pass"

        proxy.choose = choose
        for number in range(trials):
            output, action, due = bench.fresh(), ("kill", "raise")[number % 2], True
            code = exit_code(start(bench.order(output, env=proxy.env, failpoints=f"{TAKEN}={action}")))
            if code != (KILLED if action == "kill" else 1):
                bench.fault(f"{TAKEN}={action} didn't strike: exit code {code}")
            struck += 1
            bench.resume(output)
            bench.judge(output)
        return bench.trial("killed or failing once a reply was lost, S3", trials, struck)


FAULTS = ("busy", "conflict", "reset", "lose", "cut", "flip", "spoil")


def store_faults(work: Path, share: float) -> Trial:
    """Every kind of fault, at random, in first attempts that are killed half-way and in those that resume them."""
    with on_s3(work) as bench, _spoiled(bench) as proxy:
        of_each = -(-times(500, share) // len(FAULTS))
        luck = random.Random(0)

        def choose(head: bytes) -> str:
            line = head.split(b"\r\n", 1)[0]
            kinds = [k for k in FAULTS if proxy.struck[k] < of_each and _fits(k, line, head)]
            return luck.choice(kinds) if kinds and luck.random() < 0.15 else "pass"

        proxy.choose = choose
        attempts = runs = 0
        while any(proxy.struck[kind] < of_each for kind in FAULTS):
            output, runs = bench.fresh(), runs + 1
            order = bench.order(output, env=proxy.env, failpoints="write.commit.before_put@3=kill")
            if (code := exit_code(start(order))) not in (1, KILLED):
                bench.fault(f"{output}: the first attempt ended in exit code {code}")
            attempts += 1 + bench.resume(output, env=proxy.env)
            bench.judge(output)
        struck = sum(proxy.struck[kind] for kind in FAULTS)
        kinds = ", ".join(f"{kind} {proxy.struck[kind]}" for kind in FAULTS)
        return bench.trial("faults of the store, S3", struck, struck, f"{kinds}; {attempts} attempts at {runs} runs")


def _fits(kind: str, line: bytes, head: bytes) -> bool:
    """Whether a store or a network would do that to this request."""
    if kind == "conflict":
        return line.startswith(b"PUT ") and b"if-none-match" in head.lower()
    if kind == "spoil":
        return line.startswith(b"PUT ") and b"content-length: 0" not in head.lower()
    if kind in ("flip", "cut"):
        return line.startswith(b"GET ") and re.search(rb"/out-\w+/[^?]*\.(json|parquet) ", line) is not None
    return True


@contextmanager
def _spoiled(bench: Bench) -> Iterator[Flaky]:
    from tests.s3 import S3

    with flaky(S3(bench.env)) as proxy:
        yield proxy


# ---- races and clocks ----


def killed_where_a_name_is_taken(work: Path, share: float) -> Trial:
    """Two attempts are let go at once before their first commit; whoever comes second to a name dies or fails there."""
    with local(work) as bench:
        trials, struck = times(20, share), 0
        for number in range(trials):
            output, gate, action = bench.fresh(), FORKS.Barrier(2), ("kill", "raise")[number % 2]
            order = bench.order(output, failpoints=f"{TAKEN}={action}")
            codes = [exit_code(each) for each in [start(order, gate, "write.commit.before_put") for _ in range(2)]]
            hit = codes.count(KILLED if action == "kill" else 1)
            if not hit or hit + codes.count(0) + codes.count(SPARED) < 2:  # one of the two may find no name taken
                bench.fault(f"{TAKEN}={action}: attempts ended in exit codes {codes}")
            struck += hit
            bench.resume(output)
            bench.judge(output)
        return bench.trial("killed or failing where a name is taken, local files", trials, struck)


def races(work: Path, share: float) -> Trial:
    with local(work) as bench:
        return _races(bench, times(20, share), "16 writers on one output, local files")


def races_on_s3(work: Path, share: float) -> Trial:
    with on_s3(work) as bench:
        return _races(bench, times(20, share), "16 writers on one output, S3")


def _races(bench: Bench, trials: int, promise: str, writers: int = 16) -> Trial:
    """All plan, mark and label the same job; held until each is about to make its first commit, then let go at once."""
    for _ in range(trials):
        output, gate = bench.fresh(), FORKS.Barrier(writers)
        processes = [start(bench.order(output), gate, "write.commit.before_put") for _ in range(writers)]
        codes = Counter(map(exit_code, processes))
        if set(codes) != {0}:
            bench.fault(f"{output}: writers ended in exit codes {dict(codes)}")
        bench.judge(output)
    return bench.trial(promise, trials, trials * writers, "every writer ended in exit code 0")


def lying_clocks(work: Path, share: float) -> Trial:
    """Attempts that take turns at one output, an hour fast and an hour slow, killed between."""
    with local(work) as bench:
        trials = times(20, share)

        def one(number: int) -> None:
            output, skew = bench.fresh(), (3600.0, -3600.0)[number % 2]
            at = ("write.commit.after_put@2", "write.spill.after_put", "write.mark_attempt.after_put@3")[number % 3]
            code = exit_code(start(bench.order(output, failpoints=f"{at}=kill", skew_s=skew)))
            if code != KILLED:
                bench.fault(f"{at} didn't strike: exit code {code}")
            bench.resume(output, skew_s=-skew)
            bench.judge(output)

        side_by_side(functools.partial(one, n) for n in range(trials))
        return bench.trial("clocks an hour fast and slow, local files", trials, trials, "same answers")
