"""A few of each of the trials that `make chaos` does by the hundred."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from batchq.errors import ConfigError, StorageError
from batchq.storage import failpoint
from chaos import compaction, corpus, delta, store
from chaos.__main__ import TRIALS, row
from chaos.trial import Trial

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("trial", "share"),
    [
        (store.killed_at_every_step, 0.01),
        (store.killed_reading_parquet, 0.05),
        (store.killed_where_a_name_is_taken, 0.1),
        (store.killed_after_a_lost_reply, 0.1),
        (store.killed_in_mid_commit, 0.05),
        (store.killed_at_random, 0.05),
        (store.races, 0.05),
        (store.store_faults, 0.06),
        (store.lost_replies, 0.1),
        (store.lying_clocks, 0.1),
        (compaction.killed_while_compacting, 0.05),
        (delta.killed_at_the_delta_commit, 0.05),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_promise_holds(trial: Callable[[Path, float], Trial], share: float, tmp_path: Path) -> None:
    done = trial(tmp_path, share)
    assert done.holds, row(done, 0)
    assert done.faults > 0


def test_the_death_of_rays_head_is_survived() -> None:
    """In a process of its own, where Ray wasn't imported with other settings. A node's death is in test_elastic.py."""
    command = [sys.executable, "-m", "chaos", "--share", "0.2", "lost_heads"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.count(" holds ") == 1, done.stdout + done.stderr[-3000:]


def test_a_broken_promise_is_told() -> None:
    assert not Trial("p", 1, 1, lost=1, repeated=0).holds
    assert not Trial("p", 1, 1, lost=0, repeated=0, broken=1).holds
    assert not Trial("p", 0, 0, lost=0, repeated=0).holds, "nothing tried is nothing proved"
    assert "BROKEN" in row(Trial("p", 1, 1, lost=0, repeated=2), 0)


def test_the_table_names_each_trial_once() -> None:
    names = [trial.__name__ for trial in TRIALS]
    assert len(set(names)) == len(names)


def test_every_failpoint_is_struck_by_some_trial(tmp_path: Path) -> None:
    ordered = {store.TAKEN}
    for opened, of in ((store.local, ""), (store.on_s3, ""), (store.tables, "read.")):
        (work := tmp_path / opened.__name__).mkdir()
        with opened(work) as bench:
            ordered |= set(store.steps(bench, of))
    for finished in (compaction.Finished, delta.Switching):
        (work := tmp_path / finished.__name__).mkdir()
        ordered |= finished(store.Bench(work, corpus.make(work), str(work), {})).bench.hits.keys()
    assert ordered == store.failpoints()


def test_a_failpoint_strikes_once_at_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoint, "_armed", {})
    failpoint.arm("here@2=raise")
    failpoint.reach("here")
    failpoint.reach("elsewhere")
    with pytest.raises(StorageError, match="here"):
        failpoint.reach("here")
    failpoint.reach("here")
    for orders in ("here", "here=explode", "here@x=kill"):
        with pytest.raises(ConfigError, match="BATCHQ_FAILPOINT"):
            failpoint.arm(orders)


def test_a_failpoint_kills_the_process_that_the_environment_names() -> None:
    code = (
        "from batchq.storage import failpoint; failpoint.reach('a'); print('lives', flush=True); failpoint.reach('b')"
    )
    environment = {**os.environ, "BATCHQ_FAILPOINT": "b=kill"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (-9, "lives\n")


def test_a_wrong_order_is_one_line() -> None:
    command = [sys.executable, "-m", "batchq", "plan", "job=sentiment_transcripts"]
    environment = {**os.environ, "BATCHQ_FAILPOINT": "b=explode"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("batchq: BATCHQ_FAILPOINT") and done.stderr.count("\n") == 1
