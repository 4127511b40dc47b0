"""Peak memory of the driver and of a replica, whatever the rows: few and huge, many and small, or wide.

    python benchmarks/memory.py                                   # all; 5 GB of disk at a time
    python benchmarks/memory.py --cases none long --formats jsonl --scale 0.1

Writes each case's rows, runs `python -m batchq engine=fake` on them in a process of its own and watches the memory of
every process it starts. The tokenizer is that of the shipped job's model; "none", one short row, is what there is
without rows. Parquet is written in row groups of 128 MB; that of "long" in one, as pyarrow does by itself. Memory is
the peak resident size (VmHWM), of the driver as it was seen last; failures are rows that are too long for the model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from spine import labelled

GROUP_BYTES = 128_000_000
JOB = """# @package _global_
job: {name: memory}
task:
  prompt: "Is this good or bad? {{ text }}"
  labels: [good, bad]
quantization: {scheme: none}
input: {path: rows}
output: {path: out, max_error_rate: 1.0}
"""


@dataclass(frozen=True)
class Case:
    """So many rows, each of so many columns of so many characters."""

    rows: int
    columns: int
    characters: int


CASES = {
    "none": Case(1, 1, 100),
    "huge": Case(256, 1, 8_500_000),
    "long": Case(20, 1, 10_000_000),
    "many": Case(1_000_000, 1, 1_000),
    "wide": Case(2_000, 100, 10_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--formats", nargs="+", choices=("parquet", "jsonl"), default=["parquet", "jsonl"])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rows")
    parser.add_argument("overrides", nargs="*", help="of the job, such as engine.max_model_len=8192")
    args = parser.parse_args()
    print(f"{'case':<6}{'format':<9}{'rows':>9}{'GB':>7}{'whole s':>9}  peak MB: driver, replica; other")
    for name in args.cases:
        for format in args.formats:
            with tempfile.TemporaryDirectory(prefix="batchq-memory-") as scratch:
                measure(Path(scratch), name, format, args.scale, args.overrides)


def measure(work: Path, name: str, format: str, scale: float, overrides: list[str]) -> None:
    """Run the job once on a case and print its line."""
    case = CASES[name]
    count = max(1, round(case.rows * scale))
    (work / "rows").mkdir()
    (work / "conf/job").mkdir(parents=True)
    (work / "conf/job/memory.yaml").write_text(JOB)
    path = work / f"rows/rows.{format}"
    if format == "jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(case, count))
    else:
        write_parquet(path, case, count, GROUP_BYTES if name != "long" else case.columns * case.characters * count)
    whole, peaks = labelled(["job=memory", "engine=fake", *overrides], work, work / "log")
    summary = json.loads((work / "out/meta/report.json").read_text())
    most = {
        kind: max(peak for each, peak in peaks.items() if each.startswith(kind))
        for kind in ("driver", "replica", "other")
    }
    print(
        f"{name:<6}{format:<9}{summary['rows']:>9,}{path.stat().st_size / 1e9:>7.2f}{whole:>9.1f}  {most['driver']}, "
        f"{most['replica']}; {most['other']}   {summary['failures']:,} failures, {summary['parts']} parts",
        flush=True,
    )
    shutil.rmtree(work / "out")


def rows(case: Case, count: int) -> Iterator[dict[str, str]]:
    """Rows that all differ, of words that all differ from place to place."""
    luck = Random(0)
    letters = "aeinorstlu"
    words = ["".join(luck.choices(letters, k=luck.randint(1, 10))) for _ in range(20_000)]
    text = " ".join(luck.choices(words, k=300_000))
    text *= 1 + 2 * case.characters // len(text)
    names = ["text", *(f"column_{number}" for number in range(1, case.columns))]
    for _ in range(count):
        starts = [luck.randrange(len(text) - case.characters) for _ in names]
        yield {name: text[start : start + case.characters] for name, start in zip(names, starts, strict=True)}


def write_parquet(path: Path, case: Case, count: int, group_bytes: int) -> None:
    """As Spark and others write it: a row group for about so many bytes."""
    each = max(1, group_bytes // (case.columns * case.characters))
    made = rows(case, count)
    schema = pa.schema(
        [("text", pa.string()), *((f"column_{number}", pa.string()) for number in range(1, case.columns))]
    )
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(made, each)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
