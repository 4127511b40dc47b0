"""How right the forecast of a run is, and whether a run that its deadline cuts has ended by then.

    python benchmarks/deadline.py                        # the shipped job on 2,000 calls, unquantized
    python benchmarks/deadline.py --rows 600 gate=default quantization=int8     # any override of the job

Composes calls and labels them three times, each in a process of its own: once whole, where the forecast that `plan` and
the run make is held against the truth; once with a deadline that comes when half would be labelled, which has to end in
exit code 6; and what is left by the same command without one, and `verify`. Exit code 1 where that isn't so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# The command line, but with an event about progress at each look instead of every minute.
OFTEN = (
    "import sys; from batchq.cli import main; from batchq.job import label; label.EVENT_SECONDS = 0; sys.exit(main())"
)


@dataclass
class Ran:
    """One command: exit code, seconds, and (seconds, event) of each event that it told."""

    code: int = 0
    seconds: float = 0.0
    events: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    last: str = ""

    def at(self, kind: str) -> float:
        return next(seconds for seconds, event in self.events if event["kind"] == kind)


def run(*arguments: str) -> Ran:
    command = [sys.executable, "-c", OFTEN, *arguments, "job=sentiment_transcripts", "events.stderr=true"]
    began, ran = time.monotonic(), Ran()
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("{"):
                ran.events.append((time.monotonic() - began, json.loads(line)))
            else:
                ran.last = line.rstrip()
    ran.code, ran.seconds = process.returncode, time.monotonic() - began
    return ran


def forecasts(ran: Ran) -> list[tuple[float, float, float]]:
    """(share, forecast, truth) at 10, 50 and 90 percent; the truth is the time to the last look at all rows."""
    seen = [(s, e["data"]) for s, e in ran.events if e["kind"] == "progress" and e["data"]["share"]]
    end = next(seconds for seconds, data in seen if data["share"] >= 1)
    found = []
    for share in (0.1, 0.5, 0.9):
        seconds, data = next((s, d) for s, d in seen if d["share"] >= share and d["seconds_left"] is not None)
        found.append((data["share"], data["seconds_left"], end - seconds))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("overrides", nargs="*", default=[])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = [sys.executable, "jobs/sentiment_transcripts/corpus.py", f"{scratch}/calls", "--rows", str(asked.rows)]
        subprocess.run(corpus, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        job = [f"input.path={scratch}/calls", "gate=off", "quantization=none", *asked.overrides]
        whole = run(*job, f"output.path={scratch}/whole", "run.deadline=8h")
        if whole.code:
            print(f"the whole run: exit code {whole.code}: {whole.last}")
            return 1
        started = whole.at("started")
        labelling = whole.at("completed") - started
        print(f"{asked.rows:,} rows, {whole.seconds:.0f} s in all, of which {labelling:.0f} from when engines start")
        for share, forecast, truth in forecasts(whole):
            off = (forecast - truth) / labelling
            print(
                f"  at {share:4.0%}: {forecast:6.1f} s to go by the forecast, {truth:6.1f} in truth: {off:+.1%} of it"
            )
        first = next(s for s, e in whole.events if e["kind"] == "progress" and e["data"]["rows"])
        half = round((first + whole.at("completed")) / 2)
        grace = 10
        output = f"output.path={scratch}/cut"
        deadline = [f"run.deadline={half + grace}s", f"cluster.grace_seconds={grace}"]
        plan = ["-m", "batchq", "plan", "job=sentiment_transcripts", *job, output, *deadline]
        said = subprocess.run([sys.executable, *plan], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        print(*(line for line in said.splitlines() if line.split()[0] in ("estimate", "deadline")), sep="\n")
        cut = run(*job, output, *deadline)
        print(f"cut: exit code {cut.code} {cut.seconds:.1f} s after its start, deadline {half + grace} s; {cut.last}")
        risks = [(s, e["data"]["at_risk"]) for s, e in cut.events if e["kind"] == "deadline_at_risk"]
        print("  at risk:", ", ".join(f"{'yes' if risk else 'no'} after {s:.0f} s" for s, risk in risks) or "not told")
        rest = run(*job, output)
        print(f"resumed: exit code {rest.code} after {rest.seconds:.0f} s")
        verify = [sys.executable, "-m", "batchq", "verify", "job=sentiment_transcripts", *job, output]
        verified = subprocess.run(verify, cwd=ROOT, capture_output=True, text=True)
        print(verified.stdout.splitlines()[0] if verified.stdout else verified.stderr)
        return int((cut.code, rest.code, verified.returncode) != (6, 0, 0))


if __name__ == "__main__":
    sys.exit(main())
