"""Trials of compaction: killed or failing at each of its steps, while a reader looks at what it is told to read."""

from __future__ import annotations

import functools
import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pyarrow import fs

from batchq.cli.verify import verify
from chaos import corpus, count
from chaos.attempt import Order, exit_code, start
from chaos.store import KILLED, Bench, side_by_side
from chaos.trial import Trial, times
from tests.s3 import s3_server


def killed_while_compacting(work: Path, share: float) -> Trial:
    with _finished(Bench(work, corpus.make(work), str(work), {})) as bench:
        return bench.at_every_step(share, "killed or failing while compacting, local files")


def killed_while_compacting_on_s3(work: Path, share: float) -> Trial:
    made = corpus.make(work)
    with s3_server(work / "weed") as s3, _finished(Bench(work, made, s3.make_bucket("chaos"), s3.env)) as bench:
        return bench.at_every_step(share / 4, "killed or failing while compacting, S3")


TRIALS = [killed_while_compacting, killed_while_compacting_on_s3]


class Finished:
    """A bench with a run that is complete and not compacted; each trial begins with a copy of it."""

    steps: tuple[str, ...] = ("compact.", "clean.")  # those to strike at

    def __init__(self, bench: Bench) -> None:
        self.bench, self.whole, hits = bench, bench.fresh(), bench.work / "hits"
        bench.resume(self.whole)
        bench.golden = count.count(self.whole, bench.corpus.ids, bench.env).answers
        self.prepare()
        output = self.copy()
        if exit_code(start(self.order(output, hits=hits))) != 0:
            raise RuntimeError("publishing without a fault failed:\n" + (bench.work / "log").read_text()[-2000:])
        bench.hits = {k: n for k, n in json.loads(hits.read_text()).items() if k.startswith(self.steps)}
        self.judge(output, readers=True)
        self.looks = 0

    def prepare(self) -> None:
        """What else is done to the run before trials copy it."""

    def judge(self, output: str, readers: bool = False) -> None:
        self.bench.judge(output, readers)

    def order(self, output: str, *, clean: bool = True, **more: object) -> Order:
        order = self.bench.order(output, **more)
        order.config.output.compact = 1
        order.config.clean.parts = clean
        return order

    def copy(self) -> str:
        output, env = self.bench.fresh(), self.bench.env
        if "://" not in output:
            shutil.copytree(self.whole, output)
        else:
            s3 = count.s3(env)
            fs.copy_files(self.whole.partition("://")[2], output.partition("://")[2], s3, s3)
        return output

    def at_every_step(self, share: float, promise: str) -> Trial:
        bench, struck = self.bench, Counter[str]()

        def one(point: str, action: str, number: int) -> None:
            output, at = self.copy(), 1 + number % bench.hits[point]
            with self.reader(output, still=not point.startswith("clean.")):
                order = self.order(output, clean=point.startswith("clean."), failpoints=f"{point}@{at}={action}")
                code = exit_code(start(order))
            if code != (KILLED if action == "kill" else 1):
                bench.fault(f"{point}@{at}={action} didn't strike: exit code {code}")
            struck[action] += 1
            with self.reader(output, still=False):
                if (code := exit_code(start(self.order(output)))) != 0:
                    bench.fault(f"{output}: the same command again ended in exit code {code}")
            self.judge(output)
            if self.order(output).config.clean.parts and count.objects(f"{output}/data", bench.env):
                bench.fault(f"{output}: parts are left that clean was to remove")
            if "://" not in output and not verify(self.order(output).config)[0]:
                bench.fault(f"{output}: verify doesn't find it as promised")

        trials = []
        for point in sorted(bench.hits):
            trials += [functools.partial(one, point, "kill", n) for n in range(times(20, share))]
            trials += [functools.partial(one, point, "raise", 3 * n) for n in range(times(5, share))]
        side_by_side(trials)
        note = f"{struck['kill']} SIGKILLs, {struck['raise']} exceptions at {len(bench.hits)} steps; "
        return bench.trial(promise, len(trials), struck.total(), f"{note}{self.looks:,} looks of a reader beside it")

    @contextmanager
    def reader(self, output: str, still: bool) -> Iterator[None]:
        """Somebody who opens what is announced, again and again, and counts the rows. `still`: nothing is removed
        meanwhile; otherwise a set that was removed while it was read is passed over, as a reader would open the other.
        """
        over = threading.Event()

        def look() -> None:
            try:
                looks()
            except BaseException as error:  # a reader that ended proves nothing
                self.bench.fault(f"{output}: the reader ended: {error!r}")

        def looks() -> None:
            while not over.is_set():
                self.look(output, still)
                self.looks += 1

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def look(self, output: str, still: bool) -> None:
        """Note a fault unless all rows are there once."""
        env, ids = self.bench.env, self.bench.corpus.ids
        before = count.folder(output, env)
        try:
            found = count.count(output, ids, env, self.bench.golden)
        except FileNotFoundError:
            found = None
        changed = not still and before == "data" and count.folder(output, env) != "data"
        if not changed and (found is None or found.lost or found.repeated or found.broken):
            self.bench.fault(f"{output}: a reader saw {found and replace(found, answers={})} in {before}")


@contextmanager
def _finished(bench: Bench) -> Iterator[Finished]:
    yield Finished(bench)
