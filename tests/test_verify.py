"""verify and clean: what a person is told of an output that somebody touched."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchq.cli import main
from batchq.cli.clean import clean
from batchq.cli.verify import verify
from batchq.config import Config
from batchq.errors import BatchqError
from tests.helpers import rows_of, write_jsonl
from tests.jobs import finished, planned


@pytest.fixture
def done(compose: Callable[..., Config], project: Path) -> Config:
    """45 rows of two files, answered: plain and compressed."""
    write_jsonl(project / "in/a.jsonl", rows_of(25))
    lines = "".join(json.dumps(row) + "\n" for row in [*rows_of(19), {"id": 1, "text": "", "gold": "bad"}])
    (project / "in/b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    config: Config = compose("input.path=in", "output.rows_per_shard=10")
    finished(config)
    return config


def test_a_finished_run_is_as_promised(done: Config, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "job=mine", "engine=fake", "input.path=in"]) == 0
    assert "45 rows = 44 answers + 1 failures" in capsys.readouterr().out


def test_a_flipped_byte_is_found(done: Config, project: Path) -> None:
    part = sorted((project / "out/data").iterdir())[0]
    data = bytearray(part.read_bytes())
    data[len(data) // 4] ^= 1
    part.write_bytes(data)
    good, words = verify(done)
    assert not good and part.name in words


def test_lost_repeated_and_foreign_rows_are_counted(done: Config, project: Path) -> None:
    parts = sorted((project / "out/data").iterdir())
    table = pq.ParquetFile(parts[0]).read()
    again = pa.concat_tables([table.slice(1), table.slice(1, 2)])  # one row gone, two twice
    with pq.ParquetWriter(parts[0], table.schema, write_page_checksum=True) as writer:
        writer.write_table(again)
        writer.add_key_value_metadata({b"batchq.receipt": pq.read_metadata(parts[-1]).metadata[b"batchq.receipt"]})
    good, words = verify(done)
    assert not good and "1 input rows are missing, 2 rows are repeated" in words
    assert "other rows than its receipt says" in words and "name that isn't its own" in words


def test_a_missing_part_and_a_stray_are_named(done: Config, project: Path) -> None:
    parts = sorted((project / "out/data").iterdir())
    shutil.copy(parts[0], project / "out/data/copy.parquet")
    parts[-1].unlink()
    good, words = verify(done)
    assert not good and "copy.parquet: is none of this run's objects" in words
    assert "isn't committed whole" in words and "manifest.json: says 45 rows; there are" in words


def test_clean_keeps_what_counts(done: Config, project: Path) -> None:
    left = project / "out/meta/tmp/part-00000.parquet.killed"
    left.write_bytes(b"half")
    assert "removed" in clean(done)
    assert not left.exists() and not (project / "out/meta/attempts").exists()
    assert verify(done)[0]


def test_clean_leaves_an_unfinished_run_alone(compose: Callable[..., Config], project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    config = compose()
    with pytest.raises(BatchqError, match="no run"):
        clean(config)
    planned(config)
    with pytest.raises(BatchqError, match="shards to go"):
        clean(config)
