"""Trials of the Delta commit: killed or failing around it, raced for, while a reader looks at the table."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from batchq.config import TableFormat
from chaos import corpus, count
from chaos.attempt import DIES_S, FORKS, Order, exit_code, start
from chaos.compaction import Finished
from chaos.count import Count
from chaos.store import Bench, side_by_side
from chaos.trial import Trial, times
from tests.s3 import s3_server


class Registering(Finished):
    """A finished run that the trials' command makes a table of."""

    steps: tuple[str, ...] = ("delta.",)
    compacts, versions = False, 1

    def order(self, output: str, *, clean: bool = True, **more: object) -> Order:
        order = super().order(output, clean=clean and self.compacts, **more)
        order.config.output.table = TableFormat.delta
        if not self.compacts:
            order.config.output.compact = None
        return order

    def judge(self, output: str, readers: bool = False) -> None:
        super().judge(output, readers)
        bench, found = self.bench, self.seen(output)
        if found is None:
            bench.fault(f"{output}: isn't a Delta table")
            return
        with bench.lock:
            bench.lost += found.lost
            bench.repeated += found.repeated
        if found.lost or found.repeated or found.broken:
            bench.fault(f"{output}: its Delta table: {replace(found, answers={})}")
        if (version := count.delta_table(output, bench.env).version()) != self.versions - 1:
            bench.fault(f"{output}: its Delta table has {version + 1} versions instead of {self.versions}")

    def look(self, output: str, still: bool) -> None:
        super().look(output, still)
        env, before = self.bench.env, None
        try:
            if (before := count.delta_table(output, env)) is None:
                return  # not yet
            found = self.seen(output)
        except Exception:  # an object that the table had is gone, in the words of whichever library found it so
            if not still and before is not None and before.version() != count.delta_table(output, env).version():
                return
            raise
        if found is None or found.lost or found.repeated or found.broken:
            self.bench.fault(f"{output}: a reader of the Delta table saw {found and replace(found, answers={})}")

    def seen(self, output: str) -> Count | None:
        return count.count_delta(output, self.bench.corpus.ids, self.bench.env, self.bench.golden)

    def race(self) -> None:
        """Two drivers, with no lease between them, come to the commit at once."""
        output, gate = self.copy(), FORKS.Barrier(2)
        with self.reader(output, still=True):
            both = [start(self.order(output, clean=False), gate, "delta.commit.before") for _ in range(2)]
            if codes := [code for code in map(exit_code, both) if code != 0]:
                self.bench.fault(f"{output}: a driver of two ended in exit code {codes[0]} within {DIES_S:.0f} s")
        self.judge(output)


class Compacting(Registering):
    """The same command compacts: the table has never had parts."""

    steps: tuple[str, ...] = ("delta.", "compact.announce.")
    compacts = True


class Switching(Compacting):
    """The table has the parts already, and is switched; then these are removed."""

    steps: tuple[str, ...] = ("delta.", "compact.announce.", "clean.")
    versions = 2

    def prepare(self) -> None:
        order = super().order(self.whole, clean=False)
        order.config.output.compact = None
        if exit_code(start(order)) != 0:
            raise RuntimeError("registering failed:\n" + (self.bench.work / "log").read_text()[-2000:])


KINDS = (Registering, Compacting, Switching)


def killed_at_the_delta_commit(work: Path, share: float) -> Trial:
    made = corpus.make(work)
    benches = [Bench(work / kind.__name__, made, str(work / kind.__name__), {}) for kind in KINDS]
    return _struck(benches, share, "local files")


def killed_at_the_delta_commit_on_s3(work: Path, share: float) -> Trial:
    made = corpus.make(work)
    with s3_server(work / "weed") as s3:
        benches = [Bench(work / kind.__name__, made, s3.make_bucket("chaos"), s3.env) for kind in KINDS]
        return _struck(benches, share / 4, "S3")


def _struck(benches: list[Bench], share: float, where: str) -> Trial:
    done = []
    for kind, bench in zip(KINDS, benches, strict=True):
        bench.work.mkdir()
        finished, races = kind(bench), times(20, share)
        struck = finished.at_every_step(share, where)
        side_by_side([finished.race] * races)
        note = f"{kind.__name__.lower()}: {struck.note}, {races} races"
        done.append(bench.trial(where, struck.trials + races, struck.faults + races, note))
        shutil.rmtree(bench.work)
    return Trial(
        f"killed, failing or raced around the Delta commit, {where}",
        sum(each.trials for each in done),
        sum(each.faults for each in done),
        sum(each.lost for each in done),
        sum(each.repeated for each in done),
        "; ".join(each.note for each in done),
        sum(each.broken for each in done),
    )


TRIALS = [killed_at_the_delta_commit, killed_at_the_delta_commit_on_s3]
