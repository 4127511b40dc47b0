"""Engines that die, stall and run out of memory: which row is to blame, and that its neighbours are answered."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from batchq.config import Config
from batchq.errors import EngineError, Stopped
from batchq.model.tokenizer import open_tokenizer
from batchq.output import marks
from batchq.output.marks import Mark, Search
from batchq.pool import losses
from batchq.records import Plan
from batchq.worker import poison
from tests.helpers import rows_of, write_jsonl
from tests.jobs import labelled, planned, rows, worker


def token_of(config: Config, text: str) -> int:
    """The id of a character that only one row holds."""
    (token,) = open_tokenizer(config.model.path).backend_tokenizer.encode(text, add_special_tokens=False).ids
    return int(token)


async def labelled_to_the_end(config: Config, fixed: Plan, **options: Any) -> int:
    """As the pool would: another worker for every one whose engine dies; returns how many were lost."""
    for lost in range(50):
        try:
            await labelled(config, fixed, **options)
            return lost
        except EngineError:
            continue
    raise AssertionError("no end")


@pytest.mark.parametrize("where", [0, 7, 15, 16, 150, 299])
def test_a_row_that_kills_engines_is_found_and_its_neighbours_are_answered(
    where: int, compose: Callable[..., Config], project: Path
) -> None:
    made = rows_of(300)
    made[where]["text"] = "~"
    write_jsonl(project / "rows.jsonl", made)
    config = compose("output.rows_per_shard=150")
    fixed = planned(config)
    lost = asyncio.run(labelled_to_the_end(config, fixed, die_token=token_of(config, "~")))
    found = rows(config)
    assert len(found) == len({r["batchq_id"] for r in found}) == 300
    assert [r["id"] for r in found if r["batchq_error"]] == [where]
    assert [r["batchq_error"] for r in found if r["batchq_error"]] == ["killed_engine"]
    assert lost <= math.log2(16) + 2, "only what was in flight is suspected, 16 rows"


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_two_rows_that_kill_engines_in_one_object(kind: str, compose: Callable[..., Config], project: Path) -> None:
    made = rows_of(120)
    made[3]["text"] = made[77]["text"] = "~"
    write_jsonl(project / "rows.jsonl", made)
    if kind.endswith("gz"):
        (project / "rows.jsonl.gz").write_bytes(gzip.compress((project / "rows.jsonl").read_bytes()))
    config = compose(f"input.path=rows.{kind}", "output.rows_per_shard=50")
    lost = asyncio.run(labelled_to_the_end(config, planned(config), die_token=token_of(config, "~")))
    found = rows(config)
    assert sorted(r["id"] for r in found) == list(range(120))
    assert [r["id"] for r in found if r["batchq_error"]] == [3, 77]
    assert lost <= 2 * (math.log2(16) + 2)


def test_memory_pressure_lowers_concurrency_and_blames_no_row(compose: Callable[..., Config], project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(100))
    config = compose("output.rows_per_shard=1000")
    fixed = planned(config)
    lost = asyncio.run(labelled_to_the_end(config, fixed, oom_above=5))
    assert [r["batchq_error"] for r in rows(config)] == [None] * 100
    assert lost <= math.log2(16) + 2


def test_a_stalled_engine_ends_the_attempt_and_its_row_is_found(compose: Callable[..., Config], project: Path) -> None:
    made = rows_of(40)
    made[20]["text"] = "~"
    write_jsonl(project / "rows.jsonl", made)
    config = compose("output.rows_per_shard=1000")
    fixed = planned(config)
    hang = {"hang_token": token_of(config, "~"), "stall": 0.1}
    with pytest.raises(EngineError, match=r"1 rows in flight and no answer for engine\.stall_timeout_s=0\.1"):
        asyncio.run(labelled(config, fixed, **hang))
    lost = 1 + asyncio.run(labelled_to_the_end(config, fixed, **hang))
    assert [r["id"] for r in rows(config) if r["batchq_error"] == "killed_engine"] == [20]
    assert lost == 2, "once among others, once alone"


def test_what_is_not_answered_within_the_grace_is_given_up_and_the_rest_kept(
    compose: Callable[..., Config], project: Path
) -> None:
    made = rows_of(40)
    made[20]["text"] = "~"
    write_jsonl(project / "rows.jsonl", made)
    config = compose("output.rows_per_shard=1000")
    fixed = planned(config)

    async def stopped() -> None:
        hung = worker(config, fixed, hang_token=token_of(config, "~"))
        await hung.start()
        label = asyncio.create_task(hung.label(fixed.shards[0]))
        while hung.snapshot().counters.rows < 39:
            await asyncio.sleep(0)
        hung.stop(0.05)
        with pytest.raises(Stopped):
            await label
        await hung.close()

    asyncio.run(stopped())
    receipts = asyncio.run(labelled(config, fixed))
    assert receipts[0].from_spill == 39
    assert [r["batchq_error"] for r in rows(config)] == [None] * 40, "to be told to leave accuses no row"


def test_the_search_goes_on_where_another_driver_left_it() -> None:
    search = poison.died(poison.died(Search()))  # two processes lost; nobody knows which rows were in flight
    assert poison.searching(search) and search.suspects is None
    search = poison.ask_alone(search, range(50, 100))
    killed_driver = [Mark("a", search)]
    assert poison.resumed(killed_driver).suspects is None, "an end that nobody saw accuses no row"
    lost = poison.after_loss(killed_driver, "a")
    assert lost is not None and lost.search.suspects == tuple(range(50, 100))
    again = [marks.from_json(json.loads(json.dumps(dataclasses.asdict(m)))) for m in (*killed_driver, lost)]
    assert poison.resumed(again).suspects == tuple(range(50, 100))
    assert poison.after_loss(again, "a") is None, "one loss counts once"
    assert poison.after_loss(again, "b") is None, "another's marks accuse nobody"
    alone = poison.ask_alone(lost.search, [77])
    assert poison.died(alone).culprits == (77,)


def test_a_shard_that_waits_while_another_is_searched_is_not_given_up(
    compose: Callable[..., Config], project: Path
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(40))
    config = compose("output.rows_per_shard=20")
    fixed = planned(config)
    spec = worker(config, fixed).spec
    searched, waits = fixed.shards[:2]
    suspected = poison.died(poison.died(Search()))
    group: Sequence[int] = range(16)
    for engine in range(4):  # each takes both shards, and dies of a group of the first's rows
        lost = [(searched, f"a{engine}"), (waits, f"b{engine}")]
        marks.add(spec.output, searched, Mark(f"a{engine}", poison.ask_alone(suspected, group)), 1)
        marks.add(spec.output, waits, Mark(f"b{engine}", poison.resumed(marks.read(spec.output, waits))), 1)
        followed = losses.note(spec, lost, most=9, why="(its process died)")
        assert [shard for shard, _ in followed] == [searched]
        suspected = poison.resumed(marks.read(spec.output, searched))
        group = group[poison.half(group) :]
    assert suspected.lost == 6 and len(suspected.suspects or ()) == 2
    assert poison.resumed(marks.read(spec.output, waits)) == Search(), "its rows were never asked"
