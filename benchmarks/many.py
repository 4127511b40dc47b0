"""What a great many shards cost: planning a resume over committed ones, and `status`.

    python benchmarks/many.py                    # 100,000 committed shards, and status over 10,000
    python benchmarks/many.py --shards 20000

Makes the output of a finished run on a local disk, a row a shard, without labelling anything, and measures what
`plan.standing` (every resume) and `run.status` take over it. Wanted: a resume over 100,000 in 60 s, status over
10,000 in 3 s.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from batchq import plan, storage, write
from batchq.config import Config, JobConfig, ModelConfig, OutputConfig, TaskConfig
from batchq.records import InputObject, Plan, Receipt, Shard, Usage
from batchq.run import status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--status", type=int, default=10_000)
    args = parser.parse_args()
    print(f"{'shards':>8} {'what':<8} {'s':>7} {'peak MB':>8}")
    for what, shards in (("status", args.status), ("resume", args.shards)):
        with tempfile.TemporaryDirectory(prefix="batchq-many-") as work:
            output = f"{work}/out"
            fixed = finished(output, shards)
            began = time.monotonic()
            if what == "resume":
                assert not plan.standing(plan.load(output) or fixed, output).remaining
            else:
                config = Config(
                    job=JobConfig("many"),
                    task=TaskConfig(prompt="{{ text }}", labels=["a", "b"]),
                    model=ModelConfig(path="none"),
                    output=OutputConfig(path=output),
                )
                status(config)
            seconds = time.monotonic() - began
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(f"{shards:>8,} {what:<8} {seconds:>7.1f} {peak:>8,}", flush=True)


def finished(output: str, shards: int) -> Plan:
    """A plan of so many shards, and an object for each, as a worker would have committed it."""
    task = TaskConfig(prompt="{{ text }}", labels=["a", "b"])
    schema = write.output_schema(pa.schema([("text", pa.string())]), task, extra=False)
    fixed = Plan(
        fingerprint="f" * 64,
        ingredients={},
        job="many",
        objects=(InputObject("/none", "none", shards, "e"),),
        shards=tuple(Shard(i, 0, "rows", i, i + 1) for i in range(shards)),
        format="parquet",
        schema=write.schema_to_text(schema),
        columns=("text",),
        rows_per_part=1,
        quantization="none",
        model="none",
    )
    plan.store(fixed, output)
    folder = Path(storage.join(output, "data"))
    folder.mkdir(parents=True, exist_ok=True)
    row = {"batchq_id": ["none:0"], "text": ["t"], "label": ["a"]}
    table = pa.table([row.get(f.name, pa.nulls(1, f.type)) for f in schema], schema=schema)
    for shard in fixed.shards:  # not through write.commit: its fsyncs are not what is measured
        receipt = Receipt(shard.index, 0, True, "a", fixed.fingerprint, Usage(rows=1, answers=1), {"a": 1})
        data = write.serialize(table, {write.RECEIPT: write.receipt_to_json(receipt)})
        (folder / Path(write.part_name(shard, 0)).name).write_bytes(data)
    return fixed


if __name__ == "__main__":
    main()
