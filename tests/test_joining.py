"""Many small input files: a shard has several of them, and every row is there once, under its own file's name."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchq import input
from batchq.cli import main
from batchq.config import Config
from batchq.errors import EngineError
from batchq.input.joining import LEAST, MOST_PIECES
from batchq.plan.stored import load_plan
from batchq.records import InputObject, Range
from tests import jobs
from tests.helpers import rows_of
from tests.test_poison import labelled_to_the_end, token_of

FILES, EACH = 150, 4


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    return ("id,text,gold\n" + "".join(f'{r["id"]},"{r["text"]}",{r["gold"]}\n' for r in rows)).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


KINDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": as_jsonl,
    "jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
    "csv": as_csv,
    "parquet": as_parquet,
}


def write_files(project: Path, kind: str, files: int = FILES, text: dict[int, str] | None = None) -> None:
    """So many files of EACH rows, ten to a folder that is a column; `text`: of some rows, by id."""
    made = rows_of(files * EACH)
    for id, words in (text or {}).items():
        made[id]["text"] = words
    for n in range(files):
        folder = project / f"many/hour={n // 10:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n:04d}.{kind}").write_bytes(KINDS[kind](made[n * EACH : (n + 1) * EACH]))


def file_of(id: str) -> str:
    return id.replace("@", ":").rpartition(":")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_many_small_files_are_few_objects_and_every_row_is_its_own_files(
    kind: str, compose: Callable[..., Config], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(project, kind)
    config = compose("input.path=many")
    plan = jobs.planned(config)
    assert LEAST <= len(plan.shards) < FILES and load_plan(str(project / "out")) == plan
    jobs.completed(config, plan)
    found = jobs.rows(config)
    assert sorted(int(r["id"]) for r in found) == list(range(FILES * EACH))
    for row in found:
        number, hour = int(row["id"]) // EACH, int(row["id"]) // EACH // 10
        assert (file_of(row["batchq_id"]), row["hour"]) == (f"hour={hour:02d}/{number:04d}.{kind}", hour)
    assert len({r["batchq_id"] for r in found}) == FILES * EACH
    assert len(list((project / "out/data").glob("*.parquet"))) == len(plan.shards)
    assert main(["verify", "job=mine", "engine=fake", "input.path=many"]) == 0
    assert f"verified: 600 rows = 600 answers + 0 failures in {len(plan.shards)} objects" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_shard_of_several_files_is_resumed_where_it_was(
    kind: str, compose: Callable[..., Config], project: Path
) -> None:
    write_files(project, kind)
    config = compose("input.path=many")
    plan = jobs.planned(config)
    with pytest.raises(EngineError):
        asyncio.run(jobs.labelled(config, plan, die_after=300))
    asked = project / "asked"
    receipts = asyncio.run(jobs.labelled(config, plan, asked=str(asked)))
    assert sum(r.usage.rows for r in receipts) == FILES * EACH
    assert sorted(int(r["id"]) for r in jobs.rows(config)) == list(range(FILES * EACH))
    assert len(asked.read_text().splitlines()) <= FILES * EACH - 300 + 16, "what was answered is not asked again"


def test_a_shard_whose_first_parts_are_committed_goes_on_in_the_file_where_the_next_begins(
    compose: Callable[..., Config], project: Path
) -> None:
    write_files(project, "jsonl")
    config = compose("input.path=many")
    plan = dataclasses.replace(jobs.planned(config), bytes_per_part=8000)  # some three rows
    with pytest.raises(EngineError):
        asyncio.run(jobs.labelled(config, plan, die_after=300))
    before = {path.name for path in (project / "out/data").iterdir()}
    assert any("-0001." in name for name in before)
    asyncio.run(jobs.labelled(config, plan))
    assert sorted(r["id"] for r in jobs.rows(config)) == list(range(FILES * EACH))
    assert len(list((project / "out/data").iterdir())) > len(plan.shards) + 20


def test_a_row_that_kills_engines_is_found_in_its_file(compose: Callable[..., Config], project: Path) -> None:
    write_files(project, "jsonl", text={13: "~", 500: "~"})
    config = compose("input.path=many")
    lost = asyncio.run(labelled_to_the_end(config, jobs.planned(config), die_token=token_of(config, "~")))
    failed = [r for r in jobs.rows(config) if r["batchq_error"]]
    assert [(r["id"], r["batchq_error"]) for r in failed] == [(13, "killed_engine"), (500, "killed_engine")]
    assert lost <= 2 * 6 and len(jobs.rows(config)) == FILES * EACH


def test_few_files_stay_as_they_are_and_a_file_to_be_put_aside_is_alone(
    compose: Callable[..., Config], project: Path
) -> None:
    write_files(project, "jsonl", files=LEAST)
    config = compose("input.path=many")
    assert not any(shard.more for shard in jobs.planned(config).shards)
    write_files(project, "jsonl")
    config = compose("input.path=many", "input.unreadable=quarantine", "output.path=aside")
    assert len(plan := jobs.planned(config).shards) >= FILES and not any(shard.more for shard in plan)


def test_large_and_small_files_side_by_side() -> None:
    """Each group has no more than a shard's rows, unless it is one file; neighbours stay neighbours."""
    sizes = [10, 990, 600, 500, *[1] * 5000, 2000]
    objects = [InputObject(f"/{n}.parquet", f"{n}.parquet", size, "") for n, size in enumerate(sizes)]
    places = [(n, Range("rows", 0, size)) for n, size in enumerate(sizes)]
    groups = input.join_small(places, objects, "parquet", rows_per_shard=1000)
    assert [place for group in groups for place in group] == places
    rows = [sum(sizes[n] for n, _ in group) for group in groups]
    assert all(count <= sum(sizes) / LEAST or len(group) == 1 for count, group in zip(rows, groups, strict=True))
    assert len(groups) < 2 * LEAST and max(map(len, groups)) <= MOST_PIECES
