"""Prove it: kills, lost replies, faults of the store, races, lying clocks, and count the rows after each.

    python -m chaos                     # all; under 40 minutes on two cores
    python -m chaos --share 0.05        # a twentieth of the trials
    python -m chaos store_faults races  # some

Prints a table and ends in exit code 1 unless every promise held. Rows are counted from the input files and the Parquet
objects alone, by none of the code that wrote them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from chaos import azure, compaction, delta, drivers, nodes, store, unchanged
from chaos.trial import Trial

# Each in the order of the table. A module of trials is imported here and its functions are listed, no more.
TRIALS: list[Callable[[Path, float], Trial]] = [
    store.killed_at_every_step,
    store.killed_at_every_step_on_s3,
    store.killed_reading_parquet,
    store.killed_where_a_name_is_taken,
    store.killed_after_a_lost_reply,
    store.killed_at_random,
    store.killed_in_mid_commit,
    store.lost_replies,
    store.store_faults,
    store.races,
    store.races_on_s3,
    store.lying_clocks,
    azure.killed_at_every_step_on_azure,
    *compaction.TRIALS,
    *delta.TRIALS,
    unchanged.nothing_is_changed,
    *drivers.TRIALS,
    *nodes.TRIALS,
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of trials")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(t.__name__ for t in TRIALS)}")
    args = parser.parse_args()
    known = {t.__name__: t for t in TRIALS}
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"no trial {unknown[0]}; there are {', '.join(known)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print("| promise | trials | faults injected | rows lost | rows repeated | verdict |\n|---|---|---|---|---|---|")
    started, done = time.monotonic(), []
    for name in args.names or known:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"batchq-chaos-{name}-") as work:
            try:
                trial = known[name](Path(work), args.share)
            except Exception:  # a trial that can't be carried out proves nothing; the others go on
                traceback.print_exc()
                trial = Trial(name, 0, 0, 0, 0, "could not be carried out")
        done.append(trial)
        print(row(trial, time.monotonic() - began), flush=True)
    seconds = time.monotonic() - started
    broken = sum(not trial.holds for trial in done)
    print(
        f"\n{len(done)} promises, {sum(t.trials for t in done):,} trials, {sum(t.faults for t in done):,} faults, "
        f"{sum(t.lost for t in done)} rows lost, {sum(t.repeated for t in done)} repeated, {broken} promises broken; "
        f"{seconds / 60:.0f} minutes"
    )
    return 1 if broken else 0


def row(trial: Trial, seconds: float) -> str:
    verdict = "holds" if trial.holds else f"BROKEN ({trial.broken} beside the rows)"
    more = f" · {trial.note}" if trial.note else ""
    return (
        f"| {trial.promise} | {trial.trials} | {trial.faults} | {trial.lost} | {trial.repeated} "
        f"| {verdict} · {seconds:.0f} s{more} |"
    )


if __name__ == "__main__":
    sys.exit(main())
