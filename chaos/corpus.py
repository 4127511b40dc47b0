"""A small corpus with every kind of trouble in it, and the ids that its rows must have, worked out by hand."""

from __future__ import annotations

import atexit
import functools
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchq.config import (
    ClusterConfig,
    Config,
    EngineConfig,
    EngineKind,
    InputConfig,
    JobConfig,
    ModelConfig,
    OutputConfig,
    QuantizationConfig,
    Scheme,
    TaskConfig,
)
from tests.tiny import make_tiny_model

LINES = 45  # in the file that is cut by bytes: about four shards
STREAMED = 31  # in the one that can't be cut: three parts of its shard


@dataclass(frozen=True)
class Corpus:
    """`ids` are the rows that have to be there, each once."""

    folder: Path
    model: Path
    ids: frozenset[str] = field(repr=False)

    def job(self, output: str) -> Config:
        return Config(
            job=JobConfig(name="chaos"),
            task=TaskConfig(prompt="Is this {{ choices }}? {{ text }}", labels=["good", "bad", "fine"], gold="gold"),
            model=ModelConfig(path=str(self.model)),
            quantization=QuantizationConfig(scheme=Scheme.none),
            engine=EngineConfig(kind=EngineKind.fake, max_model_len=256),
            cluster=ClusterConfig(spill_seconds=0.01),
            input=InputConfig(path=str(self.folder), id="id"),
            output=OutputConfig(path=output, rows_per_shard=12, max_error_rate=1.0),
        )


def make(work: Path) -> Corpus:
    """Two files of JSON lines under work/corpus, one of them compressed."""
    folder = work / "corpus"
    folder.mkdir()
    lines = list(_lines(LINES))
    (folder / "a.jsonl").write_bytes(b"".join(lines))
    ids, offset = set(), 0
    for line in lines:
        ids.add(f"a.jsonl@{offset}")
        offset += len(line)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(_lines(STREAMED))))
    ids |= {f"b.jsonl.gz:{ordinal}" for ordinal in range(STREAMED)}
    return Corpus(folder, tiny_model(), frozenset(ids))


def make_tables(work: Path) -> Corpus:
    """One Parquet file of four row groups under work/corpus."""
    folder = work / "corpus"
    folder.mkdir()
    columns: dict[str, list[object]] = {
        "id": list(range(LINES)),
        "text": [f"row {i} says that all is well" for i in range(LINES)],
    }
    columns["text"][13:18:4] = ["", "word " * 400]
    columns["gold"] = [("good", "bad", "fine")[i % 3] for i in range(LINES)]
    pq.write_table(pa.table(columns), folder / "c.parquet", row_group_size=12)
    return Corpus(folder, tiny_model(), frozenset(f"c.parquet:{ordinal}" for ordinal in range(LINES)))


@functools.cache
def tiny_model() -> Path:
    """A model that is never run, only its tokenizer. One for all trials: the forks' server opens it once."""
    folder = Path(tempfile.mkdtemp(prefix="batchq-chaos-model-"))
    atexit.register(shutil.rmtree, folder)
    os.environ["CHAOS_MODEL"] = str(make_tiny_model(folder))  # for preload.py
    return folder


def _lines(count: int) -> Iterator[bytes]:
    """Rows that are answered, and a few that can't be: broken, not UTF-8, empty, too long."""
    broken = {7: b'{"id": 7, "text": "half', 11: b'{"id": 11, "text": "\xff\xfe"}'}
    texts = {13: "", 17: "word " * 400}
    for i in range(count):
        row = {"id": i, "text": texts.get(i, f"row {i} says that all is well"), "gold": ["good", "bad", "fine"][i % 3]}
        yield broken.get(i, json.dumps(row).encode()) + b"\n"
