"""Nothing of the user's is changed: random files of every format are labelled, and each of their values looked up."""

from __future__ import annotations

import random
import traceback
from pathlib import Path

from chaos.corpus import tiny_model
from chaos.trial import Trial, times
from tests.tables import FORMATS
from tests.unchanged import Bench


def nothing_is_changed(work: Path, share: float) -> Trial:
    """500 examples of each format, others in each run; what fails is shown as the smallest example that does."""
    bench, seed, broken = Bench(tiny_model(), work), random.randrange(2**32), 0
    for format in FORMATS:
        try:
            bench.try_examples(format, times(500, share), seed)
        except AssertionError:
            traceback.print_exc()
            broken += 1
    note = f"{bench.values:,} values of random {', '.join(FORMATS)} looked up; seed {seed}"
    return Trial("nothing of the user's is changed", bench.examples, 0, 0, 0, note, broken)
