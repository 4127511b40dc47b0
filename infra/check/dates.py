"""A job whose input comes by date, and what became of each date: schedulers are tried on it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.dataset as ds
from pyarrow.fs import FileSystem, LocalFileSystem

from tests.tiny import make_tiny_model

ROWS = 300  # of a date
SHARDS = 15
OPTIONS = "engine=fake gate=off quantization=none"
SLOW = f"{OPTIONS} +engine.options.tokens_per_s=4000"  # two seconds of labelling, in which something can happen

JOB = """# @package _global_
job: {{name: tickets}}
task: {{prompt: "{{{{ text }}}}", labels: [good, bad]}}
model: {{path: "{model}"}}
engine: {{max_model_len: 256}}
output: {{rows_per_shard: {rows}}}
"""


def make_job(folder: Path) -> None:
    """folder/conf/job/tickets.yaml, and a model that the fake engine takes the tokenizer of."""
    (folder / "conf/job").mkdir(parents=True)
    job = JOB.format(model=make_tiny_model(folder / "model"), rows=ROWS // SHARDS)
    (folder / "conf/job/tickets.yaml").write_text(job)


def lines(date: str) -> bytes:
    """A date's input: ROWS lines of JSON."""
    rows = ({"id": f"{date}/{n}", "text": f"row {n} of {date}"} for n in range(ROWS))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def labelled(output: str, store: FileSystem | None = None) -> Counter[str]:
    """How often each id is in an output, as pyarrow reads it; rows without a label aren't counted."""
    table = ds.dataset(f"{output}/data", format="parquet", filesystem=store or LocalFileSystem()).to_table(
        ["id", "label"]
    )
    ids, labels = table["id"].to_pylist(), table["label"].to_pylist()
    return Counter(id for id, label in zip(ids, labels, strict=True) if label)


def require_once(date: str, output: str, store: FileSystem | None = None) -> None:
    """Raises AssertionError unless the output has each row of the date, labelled, once."""
    found = labelled(output, store)
    expected = Counter(f"{date}/{n}" for n in range(ROWS))
    assert found == expected, f"{date}: {len(expected - found)} rows lost, {(found - expected).total()} too many"
