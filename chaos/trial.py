"""What a proof comes to: one line of the table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """One promise, tried. Everything after `faults` has to be zero.

    A trial function is `def some_fault(work: Path, share: float) -> Trial`. `work` is an empty folder of its own on a
    local disk; `share` scales the number of trials (1.0 is the proof, tests take a few hundredths, at least one is
    always done). It lists itself in `TRIALS` of `chaos/__main__.py`. A fault that was ordered and didn't strike counts
    as broken: a proof that proves nothing must not pass.
    """

    promise: str  # a few words
    trials: int
    faults: int  # that did strike
    lost: int  # rows that are nowhere though the run says it is complete
    repeated: int  # rows that are there more than once
    note: str = ""  # what else a reader of the table should know
    broken: int = 0  # anything else that is not as promised: strays, a reader that fails, a wrong exit code

    @property
    def holds(self) -> bool:
        return not (self.lost or self.repeated or self.broken) and self.trials > 0


def times(full: int, share: float) -> int:
    """How many of `full` trials to do; one at least."""
    return max(1, round(full * share))
