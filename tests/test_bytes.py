"""Limits in bytes: whatever the rows' sizes, memory stays small, and parts are cut in the same places by everyone."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchq import input
from batchq.config import Config
from batchq.input import tables
from batchq.input.sizes import table_sizes
from batchq.output import layout, parts, spills
from batchq.plan import sample
from batchq.records import Answer, Range, Receipt, Shard
from batchq.task import answers
from batchq.worker.attempt import Attempt, Part
from tests import inputs
from tests.helpers import write_jsonl
from tests.jobs import labelled, planned, rows

# Run in a process of its own: labels two inputs with one worker each and prints how far the peak of memory rose at the
# second, in MB, and what became of its rows.
PROBE = """
import asyncio, sys
from pathlib import Path
from batchq.cli import compose
from tests.jobs import labelled, planned

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

def label(path):
    words = ["task.gold=null", "output.rows_per_shard=4096", f"input.path={path}", f"output.path={path}.out"]
    config = compose(["job=mine", "engine=fake", *words])
    receipts = asyncio.run(labelled(config, planned(config)))
    return sum(r.usage.rows for r in receipts), sum(r.failures.get("too_long", 0) for r in receipts)

label(sys.argv[1])
before = peak()
print(*label(sys.argv[2]), peak() - before)
"""


def long_rows(count: int, size: int) -> list[dict[str, Any]]:
    text = "".join(f"word {n} " for n in range(size // 8))[:size]
    return [{"id": n, "text": f"{n} {text}"} for n in range(count)]


def write(folder: Path, name: str, made: list[dict[str, Any]]) -> Path:
    """Rows in a file of that name; Parquet in one row group, as pyarrow does it."""
    path = folder / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(made), path)
    elif name.endswith("csv"):
        path.write_text("id,text\n" + "".join(f'{row["id"]},"{row["text"]}"\n' for row in made))
    else:
        write_jsonl(path, made)
    return path


@pytest.mark.parametrize(("name", "count"), [("big.jsonl", 50), ("big.csv", 50), ("big.parquet", 8)])
def test_rows_of_megabytes_take_little_memory(project: Path, name: str, count: int) -> None:
    """8 MB each, 35 times that if they were tokenised. Parquet's are in one page, as pyarrow writes so few rows."""
    ending = name.partition(".")[2]
    inputs_ = [write(project, f"small.{ending}", long_rows(3, 100)), write(project, name, long_rows(count, 8_000_000))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", PROBE, *inputs_], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    labelled_rows, too_long, more = map(int, done.stdout.split())
    assert (labelled_rows, too_long) == (count, count)
    assert more < 500  # 180 to 330 were seen; gigabytes before there were limits


def test_what_is_too_long_says_so_without_being_counted(project: Path, compose: Callable[..., Config]) -> None:
    write_jsonl(project / "rows.jsonl", [{"text": "well " * n, "gold": "good"} for n in (20, 300, 2_000_000)])
    asyncio.run(labelled(config := compose(), planned(config)))
    found = {row["batchq_error"]: row["batchq_message"] for row in rows(config)}
    assert set(found) == {None, "too_long"}
    messages = sorted(row["batchq_message"] for row in rows(config) if row["batchq_error"])
    assert all(
        message.endswith(" prompt tokens; engine.max_model_len leaves 255 for the prompt") for message in messages
    )
    assert messages[0].split()[0].isdigit() and messages[1].startswith("more than 255 ")


# ---- parts ----


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv"])
def test_parts_are_cut_by_bytes_in_the_same_places_by_whoever_goes_on(
    project: Path, compose: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("batchq.plan.draft.PART_BYTES", 40_000)
    write(project, name, [{"id": n, "text": f"row {n} " + "of the long ones " * (n % 17 * 20)} for n in range(150)])
    config = compose(f"input.path={name}", "task.gold=null", "output.rows_per_shard=1000")
    plan = planned(config)
    assert plan.bytes_per_part == 40_000 and len(plan.shards) == 1
    whole = asyncio.run(labelled(config, plan))
    assert len(whole) > 5 and [receipt.part for receipt in whole] == list(range(len(whole)))
    assert [receipt.last for receipt in whole] == [False] * (len(whole) - 1) + [True]
    first = rows(config)
    assert len(first) == 150 == len({row["batchq_id"] for row in first})
    for lost in ([0], [1, 3], range(2, len(whole))):
        for part in lost:
            Path(layout.part(config.output.path, plan.shards[0], part)).unlink()
        again = asyncio.run(labelled(config, plan))
        assert [r.next_position for r in again] == [r.next_position for r in whole]
        assert rows(config) == first


def test_a_plan_of_before_has_no_bound(project: Path, compose: Callable[..., Config]) -> None:
    write_jsonl(project / "rows.jsonl", long_rows(40, 10_000))
    plan = dataclasses.replace(
        planned(config := compose("task.gold=null", "output.rows_per_shard=1000")), bytes_per_part=0
    )
    assert len(asyncio.run(labelled(config, plan))) == 1


def test_full_parts_are_waited_for(
    project: Path, compose: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that need no engine come as fast as they are read: no more than two parts' are held."""
    held: list[int] = []
    monkeypatch.setattr("batchq.plan.draft.PART_BYTES", 100_000)
    monkeypatch.setattr("batchq.worker.attempt.MOST_HELD", 200_000)
    monkeypatch.setattr("batchq.worker.batch.BATCH_BYTES", 20_000)
    commit = Attempt.commit

    def slow(made: Attempt, part: Part, quarantined: str) -> Receipt:
        held.append(sum(each.size for each in made.parts))
        return commit(made, part, quarantined)

    monkeypatch.setattr(Attempt, "commit", slow)
    write_jsonl(project / "rows.jsonl", long_rows(100, 20_000))
    config = compose("task.gold=null", "output.rows_per_shard=1000")
    receipts = asyncio.run(labelled(config, planned(config)))
    assert sum(receipt.usage.rows for receipt in receipts) == 100 and len(held) > 10
    assert max(held) <= 200_000 + 45_000


def test_saved_answers_of_committed_rows_are_not_read_again(project: Path, compose: Callable[..., Config]) -> None:
    config = compose()
    shard = Shard(0, 0, Range("stream"))
    answer = Answer({f.name: None for f in answers.of(config.task).fields()}, 5, 0, 1)
    ids = [f"a:b@c.csv:{n}" for n in range(10)]
    columns = parts.outcome_columns(config.task, ids, ["k"] * 10, [answer] * 10, [None] * 10)
    spills.save("out", shard, "attempt", 1, "print", columns)
    assert set(spills.read("out", shard, "print", config.task, 7)) == set(ids[7:])
    assert set(spills.read("out", shard, "print", config.task)) == set(ids)


# ---- ranges and rows ----


def test_shards_of_long_rows_have_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchq.input.ranges.TEXT_BYTES", 1_000_000)
    monkeypatch.setattr("batchq.input.ranges.TABLE_BYTES", 1_000_000)
    made = long_rows(40, 300_000)
    for name in ("x.jsonl", "x.parquet"):
        obj, format = inputs.one(write(tmp_path, name, made))
        ranges = input.split(obj, format, rows_per_shard=4096)
        assert 8 <= len(ranges) <= 16
        found = [row.columns["id"] for each in ranges for row in input.read_rows(obj, format, each, columns=None)]
        assert found == list(range(40))


def test_long_rows_are_counted_by_their_length(tmp_path: Path, compose: Callable[..., Config]) -> None:
    write_jsonl(tmp_path / "long.jsonl", long_rows(20, 400_000))
    plan = planned(compose("input.path=long.jsonl", "task.gold=null", "output.rows_per_shard=4096"))
    assert sample.expected_rows(plan, None) == pytest.approx(20, abs=1)


def test_a_row_has_the_same_size_in_whichever_batch_it_comes() -> None:
    table = pa.table(
        {
            "text": ["a", None, "äöü", ""],
            "binary": pa.array([b"12345", None, b"", b"1"], pa.large_binary()),
            "number": [1, None, 3, 4],
            "list": [["a", "bcd"], None, [], ["efgh", None]],
            "fixed": pa.array([["a", "b"], None, ["ccc", "d"], ["e", None]], pa.list_(pa.string(), 2)),
            "struct": [{"x": "abc", "y": [1, 2]}, None, {"x": None, "y": None}, {"x": "d", "y": []}],
            "map": pa.array([[("k", "v")], None, [], [("a", "b"), ("c", "dd")]], pa.map_(pa.string(), pa.string())),
            "kind": pa.array(["long one", None, "b", "long one"]).dictionary_encode(),
            "view": pa.array(["a", None, "more than twelve", ""], pa.string_view()),
            "when": pa.array([1, 2, None, 4], pa.timestamp("us", "UTC")),
            "nothing": pa.nulls(4),
        }
    )
    [batch] = table.to_batches()
    whole = table_sizes(batch)
    assert [size for n in range(4) for size in table_sizes(batch.slice(n, 1))] == whole
    assert table_sizes(batch.slice(1, 2)) == whole[1:3]
    assert whole[0] > whole[1] and table_sizes(batch.select([])) == [0] * 4
    texts = pa.record_batch({"text": ["", "x" * 1000]})
    assert table_sizes(texts)[1] - table_sizes(texts)[0] == 1000


def test_short_rows_come_many_at_a_time_and_long_ones_alone(tmp_path: Path) -> None:
    texts = ["x" * 100] * 5000 + ["y" * 3_000_000] * 3
    pq.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet", use_dictionary=False)
    obj, format = inputs.one(tmp_path / "rows.parquet")
    batches = [batch for _, batch in tables.table_batches(obj, format, Range("rows"), None)]
    assert pa.Table.from_batches(batches)["text"].to_pylist() == texts
    assert len(batches) < 20, "a batch of sixteen costs as much as its rows"
    assert max(batch.nbytes for batch in batches) < tables.BATCH_BYTES


def test_few_long_rows_among_many_short_ones_are_decoded_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["short"] * 3000 + ["l" * 200_000] * 40 + ["short"] * 10
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    obj, format = inputs.one(tmp_path / "x.parquet")
    monkeypatch.setattr("batchq.input.tables.BATCH_BYTES", 500_000)
    largest = max(batch.nbytes for _, batch in tables.table_batches(obj, format, Range("rows"), None))
    assert largest <= 500_000
    assert [row.columns["text"] for row in input.read_rows(obj, format, Range("rows"), columns=None)] == texts


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl", "x.csv"])
def test_a_row_above_the_limit_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("batchq.input.broken.MAX_LINE", 100_000)
    monkeypatch.setattr("batchq.input.lines.BLOCK", 10_000)
    monkeypatch.setattr("batchq.input.tables.BATCH_BYTES", 10_000)
    made = [{"id": n, "text": "word " * (10 if n != 2 else 30_000)} for n in range(4)]
    found = inputs.rows(write(tmp_path, name, made))
    code = "row_too_long" if name == "x.parquet" else "line_too_long"
    assert [row.error and row.error[0] for row in found] == [None, None, code, None]
    assert [row.size < 200 for row in found] == [True] * 4
