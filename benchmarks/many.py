"""What a great many rows, shards and input files cost.

    python benchmarks/many.py                                  # all; some 20 minutes on two cores
    python benchmarks/many.py rows --share 0.01                # one of rows, plan, status, resume; a hundredth of it
    python benchmarks/many.py rows --replicas 1

rows     10,000,000 rows in 10,000 shards by the real command (Ray, the fake engine, a tokenizer that takes a prompt for
         one token): rows/s from the first row to the last commit, the command's seconds, and the driver's resident MB
         when a tenth of the shards is committed and when all are. Wanted: flat within 10%. "peak" is of its whole life;
         at the end it reads all receipts.
plan     a new run over 100,000 input files of a row each; then what every resume looks up of them.
status   over 10,000 committed shards. Wanted: 3 s.
resume   planning what is left when 100,000 shards are committed. Wanted: 60 s.

All on a local disk. `status` and `resume` look at an output made without labelling, a row a shard. Each runs in a
process of its own; its memory is the peak resident size (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from spine import labelled, labelling_seconds, one_token_model

from batchq import storage
from batchq.cli.status import status
from batchq.config import Config, InputConfig, JobConfig, ModelConfig, OutputConfig, Scheme, TaskConfig
from batchq.output import layout, parts, receipts
from batchq.output.schema import output_schema, schema_to_text
from batchq.plan.committed import read_committed
from batchq.plan.draft import make_plan
from batchq.plan.inputs import check_inputs
from batchq.plan.stored import load_plan, store_plan
from batchq.records import InputObject, Plan, Range, Receipt, Shard, Usage

ROWS, SHARDS, FILES = 10_000_000, 10_000, 100
JOB = """# @package _global_
job: {name: many}
task: {prompt: "{{ text }}", labels: [positive, neutral, negative]}
quantization: {scheme: none}
engine: {max_model_len: 256}
input: {path: rows}
output: {path: out}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(MEASURES)}; all unless said")
    parser.add_argument("--share", type=float, default=1.0, help="of the rows, shards and files")
    parser.add_argument("--replicas", type=int, default=2, help="of `rows`")
    args = parser.parse_args()
    if unknown := [name for name in args.what if name not in MEASURES]:
        parser.error(f"nothing is called {unknown[0]}; there are {', '.join(MEASURES)}")
    for name in args.what or MEASURES:
        with tempfile.TemporaryDirectory(prefix="batchq-many-") as work:
            arguments = (Path(work), args.share, args.replicas)
            process = multiprocessing.get_context("spawn").Process(target=MEASURES[name], args=arguments)
            process.start()
            process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


# ---- the real command ----


def rows(work: Path, share: float, replicas: int) -> None:
    """Label, watching the driver's memory."""
    count, shards = round(ROWS * share), round(SHARDS * share)
    write_rows(work / "rows", count)
    (work / "conf/job").mkdir(parents=True)
    (work / "conf/job/many.yaml").write_text(JOB)
    job = ["job=many", "engine=fake", f"cluster.replicas={replicas}"]
    job += [f"model.path={one_token_model(work / 'one-token')}", f"output.rows_per_shard={count // shards}"]
    resident: dict[int, int] = {}  # the driver's kB when so many objects were first seen

    def look(driver: int) -> None:
        resident.setdefault(committed(work / "out/data"), memory(driver, "VmRSS"))

    whole, peaks = labelled(job, work, work / "log", look)
    summary = json.loads((work / "out/meta/report.json").read_text())
    if (summary["rows"], summary["answers"]) != (count, count):
        sys.exit(f"{summary['rows']} rows and {summary['answers']} answers of {count}")
    early = resident[min(n for n in resident if n >= summary["parts"] / 10)]
    late = resident[max(n for n in resident)]
    others = [peak for name, peak in peaks.items() if name.startswith("replica")]
    (driver,) = (peak for name, peak in peaks.items() if name.startswith("driver"))
    print(
        f"rows: {count:,} in {summary['parts']:,} shards, {replicas} replicas: "
        f"{count / labelling_seconds(work / 'out'):,.0f} rows/s, {whole:.0f} s; driver {early // 1024} MB at a tenth, "
        f"{late // 1024} MB at the end of labelling ({late / early - 1:+.1%}), peak {driver} MB; "
        f"replicas' peaks {', '.join(map(str, others))} MB",
        flush=True,
    )


def write_rows(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(FILES):
        lines = (b'{"id": %d, "text": "call %d went well enough"}\n' % (i, i) for i in range(number, count, FILES))
        (folder / f"rows-{number:02d}.jsonl").write_bytes(b"".join(lines))


def committed(data: Path) -> int:
    return len(os.listdir(data)) if data.exists() else 0


def memory(pid: int, what: str) -> int:
    """VmRSS or VmHWM of a process, in kB; 0 once it has gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(text.split(f"{what}:")[1].split()[0]) if f"{what}:" in text else 0


# ---- planning, in this process ----


def planned(work: Path, share: float, replicas: int) -> None:
    """Plan a new run over many files and store it; then look at it and at the files, as a resume does."""
    files = round(SHARDS * 10 * share)
    for number in range(files):
        folder = work / f"in/{number // 1000:03d}"
        if not number % 1000:
            folder.mkdir(parents=True)
        (folder / f"{number:06d}.jsonl").write_bytes(b'{"id": %d, "text": "call %d"}\n' % (number, number))
    job = config(work / "out")
    job.input = InputConfig(path=str(work / "in"))
    output = storage.normalize(job.output.path)
    with measured(f"plan: a new run over {files:,} input files"):
        store_plan(make_plan(job, "model", Scheme.none, "model"), output)
    with measured("plan: the same, and what a resume looks up of them"):
        assert (stored := load_plan(output)) and not check_inputs(stored, job)


def finished_status(work: Path, share: float, replicas: int) -> None:
    shards = round(SHARDS * share)
    finish(str(work / "out"), shards)
    with measured(f"status: {shards:,} shards"):
        status(config(work / "out"))


def resume(work: Path, share: float, replicas: int) -> None:
    shards = round(SHARDS * 10 * share)
    output = str(work / "out")
    finish(output, shards)
    with measured(f"resume: {shards:,} shards"):
        assert (stored := load_plan(output)) and not read_committed(stored, output).remaining


MEASURES: dict[str, Callable[[Path, float, int], None]] = {
    "rows": rows,
    "plan": planned,
    "status": finished_status,
    "resume": resume,
}


@contextmanager
def measured(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - began:.1f} s, peak {memory(os.getpid(), 'VmHWM') // 1024} MB", flush=True)


def config(output: Path) -> Config:
    return Config(
        job=JobConfig("many"),
        task=TaskConfig(prompt="{{ text }}", labels=["a", "b"]),
        model=ModelConfig(path="none"),
        output=OutputConfig(path=str(output)),
    )


def finish(output: str, shards: int) -> None:
    """A plan of so many shards, and an object for each, as a worker would have committed it."""
    task = TaskConfig(prompt="{{ text }}", labels=["a", "b"])
    schema = output_schema(pa.schema([("text", pa.string())]), task)
    fixed = Plan(
        fingerprint="f" * 64,
        ingredients={},
        job="many",
        objects=(InputObject("/none", "none", shards, "e"),),
        shards=tuple(Shard(i, 0, Range("rows", i, i + 1)) for i in range(shards)),
        format="parquet",
        schema=schema_to_text(schema),
        columns=("text",),
        rows_per_part=1,
        quantization="none",
        model="none",
    )
    store_plan(fixed, output)
    Path(layout.data(output)).mkdir(parents=True, exist_ok=True)
    row = {"batchq_id": ["none:0"], "text": ["t"], "label": ["a"]}
    table = pa.table([row.get(f.name, pa.nulls(1, f.type)) for f in schema], schema=schema)
    for shard in fixed.shards:  # not through parts.commit: its fsyncs are not what is measured
        receipt = Receipt(shard.index, 0, True, "a", fixed.fingerprint, Usage(rows=1, answers=1), {"a": 1})
        data = parts.serialize(table, {receipts.KEY: receipts.to_json(receipt)})
        Path(layout.part(output, shard, 0)).write_bytes(data)


if __name__ == "__main__":
    main()
