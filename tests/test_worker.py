"""A worker and the store, without Ray: what is committed after shards of every kind, faults included."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from batchq import storage
from batchq.config import Config, Scheme
from batchq.errors import EngineError, Expired, OutputTaken, Stopped, StorageError
from batchq.output.schema import schema_from_text, schema_to_text
from batchq.plan.committed import read_committed
from batchq.plan.draft import ingredients, make_plan
from batchq.plan.stored import refuse_drift, refuse_other, store_plan
from batchq.records import Receipt
from batchq.worker.counters import Snapshot
from tests.helpers import rows_of, write_jsonl
from tests.jobs import labelled, planned, rows, worker
from tests.s3 import S3, flaky


def test_every_row_once_with_its_columns(compose: Callable[..., Config], project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(105))
    config = compose()
    receipts = asyncio.run(labelled(config, planned(config)))
    found = rows(config)
    assert len({r["batchq_id"] for r in found}) == 105 == sum(r.usage.rows for r in receipts)
    assert sorted(r["id"] for r in found) == list(range(105))
    assert all(r["label"] in config.task.labels and r["batchq_error"] is None for r in found)
    assert all(abs(sum(r["label_distribution"].values()) - 1) < 1e-5 for r in found)
    assert sum(r.usage.gold for r in receipts) == 105


def test_failures_are_rows_with_a_code_and_neighbours_are_untouched(
    compose: Callable[..., Config], project: Path
) -> None:
    good = [json.dumps(row) for row in rows_of(3)]
    bad = {
        "invalid_json": '{"id": 7, "text": "half a',
        "empty": json.dumps({"id": 8, "text": ""}),
        "too_long": json.dumps({"id": 9, "text": "word " * 900}),
        "schema": json.dumps({"id": "not a number", "text": "fine otherwise"}),
    }
    (project / "rows.jsonl").write_text("\n".join([*good, *bad.values()]) + "\n")
    config = compose("input.limit=null")
    schema = make_plan(config, "m", Scheme.none, "m")
    assert schema.format == "jsonl"
    # The sample would see the drifting id; a plan made when all ids were numbers meets it later.
    write_jsonl(project / "first.jsonl", rows_of(3))
    narrow = make_plan(compose("input.path=first.jsonl"), "m", Scheme.none, "m")
    # Version 0.1.0 had no batchq_extra in some plans; with it the row would be answered.
    columns = schema_from_text(narrow.schema)
    former = schema_to_text(columns.remove(columns.get_field_index("batchq_extra")))
    fixed = store_plan(dataclasses.replace(schema, schema=former), storage.normalize(config.output.path))
    asyncio.run(labelled(config, fixed))
    found = rows(config)
    assert sorted(r["batchq_error"] for r in found if r["batchq_error"]) == sorted(bad)
    assert sum(r["label"] is not None for r in found) == 3
    by_code = {r["batchq_error"]: r for r in found}
    assert by_code["invalid_json"]["batchq_raw"] == bad["invalid_json"]
    assert "not a number" in by_code["schema"]["batchq_raw"]
    assert by_code["too_long"]["id"] == 9
    assert all("word" not in (r["batchq_message"] or "") for r in found)


def test_a_worker_says_how_many_rows_failed_so_far(compose: Callable[..., Config], project: Path) -> None:
    rows = rows_of(50)
    for row in rows[:7]:
        row["text"] = "word " * 900
    write_jsonl(project / "rows.jsonl", [*rows, {"id": 50, "text": ""}])
    config = compose()
    fixed = planned(config)

    async def asked() -> Snapshot:
        made = worker(config, fixed)
        await made.start()
        try:
            await asyncio.gather(*map(made.label, fixed.shards))
            return made.snapshot()
        finally:
            await made.close()

    seen = asyncio.run(asked())
    assert (seen.counters.rows, seen.counters.failures) == (51, 8)


def test_where_credentials_run_out_new_ones_go_on(
    s3: S3, compose: Callable[..., Config], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(105))
    with flaky(s3) as proxy:
        for name, value in proxy.env.items():
            monkeypatch.setenv(name, value)
        config = compose(f"output.path={s3.make_bucket('expired')}/out")
        output, fixed = storage.normalize(config.output.path), planned(config)
        proxy.choose = lambda head: "expired" if b"data/part-00003" in head.splitlines()[0] else "pass"
        with pytest.raises(Expired, match=r"part-00003.*: the credentials have expired .*; renew them, and") as raised:
            asyncio.run(labelled(config, fixed))
        assert raised.value.exit_code == 1
        proxy.choose = None
        left = read_committed(fixed, output).remaining
        assert left
        asyncio.run(labelled(config, dataclasses.replace(fixed, shards=tuple(left))))
        assert not read_committed(fixed, output).remaining


def test_unknown_keys_of_later_rows_are_kept(compose: Callable[..., Config], project: Path) -> None:
    write_jsonl(project / "first.jsonl", rows_of(2))
    narrow = make_plan(compose("input.path=first.jsonl"), "m", Scheme.none, "m")
    write_jsonl(project / "rows.jsonl", [*rows_of(1), {"id": 5, "text": "late", "gold": "bad", "region": "north"}])
    config = compose()
    drifting = dataclasses.replace(make_plan(config, "m", Scheme.none, "m"), schema=narrow.schema)
    asyncio.run(labelled(config, store_plan(drifting, storage.normalize(config.output.path))))
    extras = {r["id"]: r["batchq_extra"] for r in rows(config)}
    assert extras == {0: None, 5: '{"region": "north"}'}


def gzipped(path: Path, count: int) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows_of(count)).encode()))


def test_a_stream_commits_parts_and_resumes_between_them(compose: Callable[..., Config], project: Path) -> None:
    gzipped(project / "rows.jsonl.gz", 70)
    config = compose("input.path=rows.jsonl.gz")
    fixed = planned(config)
    assert [s.range.unit for s in fixed.shards] == ["stream"]
    with pytest.raises(EngineError):
        asyncio.run(labelled(config, fixed, die_after=45, latency_s=0.2))  # there is time to commit meanwhile
    committed = sorted(p.name for p in (project / "out/data").iterdir())
    assert committed, "a part is committed before the shard ends"
    stamps = {p.name: p.stat().st_mtime_ns for p in (project / "out/data").iterdir()}
    receipts = asyncio.run(labelled(config, fixed))
    assert [r.part for r in receipts] == [0, 1, 2, 3]
    assert [r.last for r in receipts] == [False, False, False, True]
    assert sorted(r["id"] for r in rows(config)) == list(range(70))
    assert {n: (project / "out/data" / n).stat().st_mtime_ns for n in committed} == stamps


def test_a_stream_whose_rows_fill_its_parts_ends_without_an_empty_one(
    compose: Callable[..., Config], project: Path
) -> None:
    gzipped(project / "rows.jsonl.gz", 40)
    config = compose("input.path=rows.jsonl.gz")
    receipts = asyncio.run(labelled(config, planned(config)))
    assert [(r.part, r.last, r.usage.rows) for r in receipts] == [(0, False, 20), (1, True, 20)]


def test_a_last_part_that_stands_alone_is_no_finished_stream(compose: Callable[..., Config], project: Path) -> None:
    """Parts are committed side by side: a kill may leave the third without the second."""
    gzipped(project / "rows.jsonl.gz", 50)
    config = compose("input.path=rows.jsonl.gz")
    fixed = planned(config)
    asyncio.run(labelled(config, fixed))
    (project / "out/data/part-00000-0001.parquet").unlink()
    output = storage.normalize(config.output.path)
    assert read_committed(fixed, output).remaining == fixed.shards
    asyncio.run(labelled(config, fixed))
    assert sorted(r["id"] for r in rows(config)) == list(range(50))
    assert not read_committed(fixed, output).remaining


def test_spilled_answers_are_not_asked_again(compose: Callable[..., Config], project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(20))
    config = compose("output.rows_per_shard=1000")
    fixed = planned(config)
    with pytest.raises(EngineError):
        asyncio.run(labelled(config, fixed, die_after=12))
    receipts = asyncio.run(labelled(config, fixed))
    assert [r.usage.rows for r in receipts] == [20]
    assert receipts[0].from_spill >= 12
    assert not list((project / "out/meta/partial").rglob("*.parquet"))
    assert len(list((project / "out/meta/attempts/00000").iterdir())) >= 2


def test_an_empty_shard_and_one_of_failures_leave_a_clean_table(compose: Callable[..., Config], project: Path) -> None:
    # One row of 3,000 bytes: shards cut by bytes inside it hold no row's first byte.
    write_jsonl(project / "rows.jsonl", [{"id": 0, "text": "x" * 3000, "gold": "bad"}, *rows_of(3)])
    config = compose("output.rows_per_shard=1")
    receipts = asyncio.run(labelled(config, planned(config)))
    assert any(r.usage.rows == 0 for r in receipts)
    assert any(r.usage.rows == r.usage.failures > 0 for r in receipts)
    assert len(rows(config)) == 4
    standing = read_committed(planned(config), storage.normalize(config.output.path))
    assert not standing.remaining


def test_stop_keeps_what_was_answered(compose: Callable[..., Config], project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(300))
    config = compose("output.rows_per_shard=1000")
    fixed = planned(config)

    async def stopped() -> None:
        made = worker(config, fixed, latency_s=0.01)
        await made.start()
        label = asyncio.create_task(made.label(fixed.shards[0]))
        while made.snapshot().counters.rows < 30:
            await asyncio.sleep(0)
        made.stop(20)
        with pytest.raises(Stopped):
            await label
        await made.close()

    asyncio.run(stopped())
    receipts = asyncio.run(labelled(config, fixed))
    assert receipts[0].from_spill >= 30
    assert len(rows(config)) == 300


def test_two_workers_on_one_shard_make_one_result(compose: Callable[..., Config], project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(20))
    config = compose("output.rows_per_shard=1000")
    fixed = planned(config)

    async def race() -> list[list[Receipt]]:
        workers = [worker(config, fixed) for _ in range(4)]
        await asyncio.gather(*(w.start() for w in workers))
        try:
            return await asyncio.gather(*(w.label(fixed.shards[0]) for w in workers))
        finally:
            await asyncio.gather(*(w.close() for w in workers))

    results = asyncio.run(race())
    assert len({r[0].attempt for r in results}) == 1, "all follow the winner's receipt"
    assert len(rows(config)) == 20


def test_another_runs_objects_are_never_taken_for_ours(compose: Callable[..., Config], project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    config = compose()
    fixed = planned(config)
    asyncio.run(labelled(config, fixed))
    foreign = dataclasses.replace(fixed, fingerprint="f" * 64)
    with pytest.raises(StorageError, match="belongs to another run"):
        read_committed(foreign, storage.normalize(config.output.path))
    other = compose("task.prompt='Another {{ text }}'")
    with pytest.raises(OutputTaken, match=r"another task\.prompt"):
        refuse_drift(fixed, ingredients(other, "model", Scheme.none), "out")


def test_a_driver_that_loses_the_race_for_the_plan_leaves(compose: Callable[..., Config], project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    mine, theirs = compose(), compose("task.prompt='Theirs {{ text }}'")
    planned(theirs)
    draft = make_plan(mine, "model", Scheme.none, "model")
    standing = store_plan(draft, storage.normalize(mine.output.path))
    with pytest.raises(OutputTaken, match=r"task\.prompt"):
        refuse_other(standing, draft, "model", "out")


def test_another_checkpoint_than_the_one_that_answered_is_refused(
    compose: Callable[..., Config], project: Path
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    fixed = planned(compose())
    refuse_other(fixed, fixed, "model", "out")
    with pytest.raises(OutputTaken, match="quantizing now gives"):
        refuse_other(fixed, fixed, "made with a newer library", "out")


def test_an_optional_key_that_a_row_lacks_is_null(compose: Callable[..., Config], project: Path) -> None:
    write_jsonl(project / "rows.jsonl", [*rows_of(2, note="n"), *rows_of(1)])
    config = compose("task.prompt='{{ text }}{% if note %} ({{ note }}){% endif %}'")
    asyncio.run(labelled(config, planned(config)))
    assert [r["batchq_error"] for r in rows(config)] == [None, None, None]


@pytest.mark.parametrize("suffix", ["csv", "txt", "parquet", "jsonl.zst", "csv.bz2"])
def test_formats(suffix: str, compose: Callable[..., Config], project: Path) -> None:
    import bz2

    import pandas as pd
    from backports import zstd

    frame = pd.DataFrame(rows_of(45))
    file = project / f"rows.{suffix}"
    if suffix == "parquet":
        frame.to_parquet(file, row_group_size=10)
    elif suffix == "txt":
        file.write_text("\n".join(frame.text))
    elif suffix.startswith("csv"):
        data = frame.to_csv(index=False).encode()
        file.write_bytes(bz2.compress(data) if suffix.endswith("bz2") else data)
    else:
        file.write_bytes(zstd.compress(frame.to_json(orient="records", lines=True).encode()))
    gold = "null" if suffix == "txt" else "gold"
    config = compose(f"input.path=rows.{suffix}", f"task.gold={gold}")
    asyncio.run(labelled(config, planned(config)))
    found = rows(config)
    assert len({r["batchq_id"] for r in found}) == 45
    assert {r["text"] for r in found} == set(frame.text)


def test_limit_takes_the_first_rows(compose: Callable[..., Config], project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(90))
    gzipped(project / "rows.gz.jsonl.gz", 90)
    for path in ("rows.jsonl", "rows.gz.jsonl.gz"):
        config = compose("input.limit=33", f"input.path={path}", f"output.path=out-{path}")
        asyncio.run(labelled(config, planned(config)))
        assert sorted(r["id"] for r in rows(config)) == list(range(33))
