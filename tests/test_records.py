"""records: what comes back from JSON."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from batchq.output.marks import Mark, Search
from batchq.records import restored

FIRST = """
import os, sys, threading
from batchq.output.marks import from_json

mark = {"attempt": "a", "over": True, "in_flight": [9], "search": {"deaths": 3, "suspects": [4, 9], "alone": [9]}}
ended = set()
for _ in range(40):
    if not (child := os.fork()):
        sys.setswitchinterval(1e-6)
        together = threading.Barrier(8)
        threads = [threading.Thread(target=lambda: (together.wait(), from_json(mark))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os._exit(0)
    ended.add(os.waitpid(child, 0)[1])
print(ended)
"""


def test_threads_that_read_a_kind_of_record_for_the_first_time_do_not_crash() -> None:
    """A worker's threads read marks and receipts side by side. msgspec crashed in more than half of such processes."""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, cwd=root)
    assert (done.stdout, done.stderr) == ("{0}\n", "")


def test_a_record_that_does_not_fit_is_refused_and_the_next_is_read() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="attempt"):
            restored({"search": {}}, Mark)
    assert restored({"attempt": "a", "search": {"deaths": 2}}, Mark) == Mark("a", Search(deaths=2))
