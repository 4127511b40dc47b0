"""Random inputs, labelled on the fake engine by one worker, and each value of theirs looked for in the output.

python -m tests.unchanged 20000 [parquet | arrow | jsonl | csv]    # so many examples, of each format a share
"""

from __future__ import annotations

import base64
import functools
import json
import random
import shutil
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from batchq.cli.verify import verify
from batchq.config import (
    Config,
    CsvConfig,
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
from batchq.errors import InputError
from batchq.model import tokenizer
from tests import jobs
from tests.tables import FORMATS, File, Moment, canonical, files
from tests.tiny import make_tiny_model

# Said, because little can be found out from a few random fields.
CSV = CsvConfig("comma", "double", "none", "utf-8", header=True, skip=0)


@dataclass
class Bench:
    """Where examples run: one tokenizer for all of them, a folder of its own for each."""

    model: Path
    work: Path
    examples: int = 0
    values: int = 0  # that were looked for

    def try_examples(self, format: str, count: int, seed: int) -> None:
        """Raises AssertionError, with the smallest example of its kind, for a value that isn't there as it was."""
        fixed = settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        opened = functools.cache(tokenizer.open_tokenizer)
        with mock.patch.object(tokenizer, "open_tokenizer", lambda *arguments: opened(*arguments)):
            hypothesis.seed(seed)(fixed(given(st.composite(files)(format))(self.try_one)))()

    def try_one(self, inputs: list[File]) -> None:
        place = self.work / uuid.uuid4().hex
        try:
            (place / "in").mkdir(parents=True)
            for file in inputs:
                (place / "in" / file.name).write_bytes(file.data)
            self._try(self._job(place), inputs)
        finally:
            shutil.rmtree(place)
        self.examples += 1

    def _job(self, place: Path) -> Config:
        return Config(
            job=JobConfig(name="unchanged"),
            task=TaskConfig(prompt="Is this {{ choices }}? {{ text }}", labels=["good", "bad"]),
            model=ModelConfig(path=str(self.model)),
            quantization=QuantizationConfig(scheme=Scheme.none),
            engine=EngineConfig(kind=EngineKind.fake, max_model_len=256),
            input=InputConfig(path=str(place / "in"), csv=CSV if any(place.glob("in/*.csv")) else CsvConfig()),
            output=OutputConfig(path=str(place / "out"), rows_per_shard=4),
        )

    def _try(self, config: Config, inputs: list[File]) -> None:
        if not any(file.rows for file in inputs):
            with pytest.raises(InputError, match="empty"):
                jobs.planned(config)
            return
        jobs.completed(config)
        tables = [pq.ParquetFile(part).read() for part in Path(config.output.path, "data").iterdir()]
        rows = {
            table["batchq_id"][n].as_py(): {name: canonical(table[name][n]) for name in table.column_names}
            for table in tables
            for n in range(table.num_rows)
        }
        expected = {id: row for file in inputs for id, row in zip(file.ids, file.rows, strict=True)}
        assert rows.keys() == expected.keys()
        for id, before in expected.items():
            assert rows[id]["batchq_error"] is None, f"{id}: {rows[id]['batchq_error']} {rows[id]['batchq_message']}"
            extra = json.loads(rows[id].get("batchq_extra") or "{}")
            for name in before.keys() | extra.keys() | {n for n in rows[id] if not n.startswith(("batchq_", "label"))}:
                self.values += 1
                was, now = before.get(name), rows[id].get(name)
                kept = same(was, now) or (isinstance(now, str) and was is not None and in_text_column(was, now))
                kept = kept if name not in extra else now is None and same(was, extra[name])
                assert kept, f"{id}: {name} was {was!r} and is {now!r}, in batchq_extra {extra.get(name)!r}"
        good, words = verify(config)
        assert good, words


def same(was: Any, now: Any) -> bool:
    """Whether a value of the input is this one of the output or, where JSON has none of its kind, its text."""
    if isinstance(was, dict) and isinstance(now, dict):
        return all(same(was.get(name), now.get(name)) for name in was.keys() | now.keys())
    if isinstance(was, list | tuple) and isinstance(now, list | tuple):
        return len(was) == len(now) and all(map(same, was, now))
    if isinstance(was, bool) or isinstance(now, bool):
        return was is now
    if isinstance(was, int | float | Decimal) and isinstance(now, int | float | Decimal):
        return (was == now and str(was)[0] == str(now)[0]) or (was != was and now != now)  # -0.0, NaN
    if isinstance(now, str) and not isinstance(was, str):
        if isinstance(was, bytes):
            known = [base64.b64encode(was).decode(), str(uuid.UUID(bytes=was)) if len(was) == 16 else ""]
            return now.encode() == was or now in known
        return (isinstance(was, Decimal) and Decimal(now) == was) or (isinstance(was, Moment) and was.is_written(now))
    return type(was) is type(now) and bool(was == now)


def in_text_column(was: Any, now: str) -> bool:
    """Whether a column of strings has this for a value that is none: JSON of what JSON has."""
    as_json = isinstance(was, bool | int | float | list | tuple | dict)
    return same(was, json.loads(now) if as_json else now)


def main() -> None:
    count, *formats = sys.argv[1:]
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # an example syncs a dozen files
    with tempfile.TemporaryDirectory(prefix="batchq-unchanged-", dir=memory) as work:
        bench, seed, began = (
            Bench(make_tiny_model(Path(work, "model")), Path(work)),
            random.randrange(2**32),
            time.monotonic(),
        )
        for format in formats or FORMATS:
            bench.try_examples(format, int(count) // len(formats or FORMATS), seed)
        seconds = time.monotonic() - began
    print(f"{bench.examples:,} examples, {bench.values:,} values, seed {seed}: none is changed; {seconds:.0f} s")


if __name__ == "__main__":
    main()
