"""output.reuse: a new output that copies an old one's answers and asks the rest."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchq import storage
from batchq.cli import main
from batchq.config import Config, Scheme
from batchq.errors import EngineError, NotFound
from batchq.model.source import resolve
from batchq.model.tokenizer import open_tokenizer
from batchq.plan.draft import make_plan
from batchq.plan.stored import store_plan
from batchq.worker import reuse
from batchq.worker.reuse import Reuse
from tests.helpers import rows_of, write_jsonl
from tests.jobs import labelled, planned
from tests.jobs import rows as rows_at
from tests.s3 import S3

RUN = ["job=mine", "engine=fake"]
AGAIN = [*RUN, "output.path=again", "output.reuse=out"]


def rows(out: Path) -> dict[int, dict[str, Any]]:
    return {r["id"]: r for r in pq.read_table(out / "data").to_pylist()}


def answer_of(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != "batchq_id"}


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "meta/report.json").read_text())  # type: ignore[no-any-return]


def token(text: str, tiny: Path) -> int:
    (found,) = open_tokenizer(tiny).backend_tokenizer.encode(text, add_special_tokens=False).ids
    return int(found)


def asked(project: Path) -> int:
    """Rows that the engine was asked since the last call."""
    noted = project / "asked"
    count = len(noted.read_text().splitlines()) if noted.exists() else 0
    noted.unlink(missing_ok=True)
    return count


def test_failures_and_new_rows_are_asked_and_nothing_else(
    project: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noting = f"+engine.options.asked={project / 'asked'}"
    old = rows_of(60)
    for i in (7, 33):
        old[i]["text"] = f"row {i} has a ~ in it"
    write_jsonl(project / "rows.jsonl", old)
    assert main([*RUN, f"+engine.options.refuse_token={token('~', tiny)}"]) == 0
    before = rows(project / "out")
    assert {i for i, r in before.items() if r["batchq_error"]} == {7, 33}

    # New rows in the middle too, so that no row stands where it stood.
    new = [{"id": 100 + i, "text": f"another row, {i}", "gold": "bad"} for i in range(5)]
    write_jsonl(project / "rows.jsonl", [*new[:3], *old[:30], *new[3:], *old[30:]])
    capsys.readouterr()
    assert main([*AGAIN, noting]) == 0
    said = capsys.readouterr().out
    assert asked(project) == 2 + 5
    assert f"58 answers of {project / 'out'}: copied, not asked, not billed" in said
    after = rows(project / "again")
    assert len(after) == 65 and not any(r["batchq_error"] for r in after.values())
    assert all(answer_of(after[i]) == answer_of(r) for i, r in before.items() if i not in (7, 33))
    assert main(["verify", *AGAIN]) == 0
    told = report(project / "again")
    assert (told["rows"], told["copied_rows"], told["reused_rows"]) == (65, 58, 0)
    paid = sum(
        r["batchq_prompt_tokens"] + r["batchq_output_tokens"] for i, r in after.items() if i in (7, 33) or i > 99
    )
    assert told["prompt_tokens"] + told["output_tokens"] - told["copied_tokens"] == paid
    assert told["cost_per_thousand_rows"] == pytest.approx(told["cost"] * 1000 / 7)

    shutil.rmtree(project / "out")
    assert main([*AGAIN, noting]) == 0, "all is committed; the old output isn't needed any more"
    assert asked(project) == 0
    capsys.readouterr()
    assert main([*RUN, "output.path=again"]) == 2
    assert "with another output.reuse" in capsys.readouterr().err


def test_another_prompt_reuses_nothing_and_says_so(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(30))
    assert main(RUN) == 0
    capsys.readouterr()
    assert main([*AGAIN, "task.prompt='Say: {{ text }}'", f"+engine.options.asked={project / 'asked'}"]) == 0
    assert "which has another task.prompt" in capsys.readouterr().err
    assert asked(project) == 30
    assert report(project / "again")["copied_rows"] == 0


def test_what_cannot_be_reused_is_refused_in_a_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(60))
    assert main(RUN) == 0
    (project / "out/data/part-00001.parquet").unlink()
    for override, words in {
        "output.reuse=again": "is output.path itself",
        "output.reuse=nowhere": "no run has been planned there",
        "output.reuse=out": "1 of its",
    }.items():
        for verb in ([], ["plan"]):
            capsys.readouterr()
            assert main([*verb, *AGAIN, override]) == 2
            (line,) = [found for found in capsys.readouterr().err.splitlines() if found.startswith("batchq: ")]
            assert line.startswith("batchq: output.reuse=") and words in line
    assert not (project / "again").exists()


def test_a_resume_is_refused_when_the_old_output_is_gone(
    compose: Callable[..., Config], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would ask every row."""
    write_jsonl(project / "rows.jsonl", rows_of(30))
    first = compose()
    asyncio.run(labelled(first, planned(first)))
    config = compose("output.path=again", "output.reuse=out")
    digest = resolve(config.model).digest
    store_plan(make_plan(config, digest, Scheme.none, digest), str(project / "again"))
    shutil.rmtree(project / "out")
    assert main(AGAIN) == 2
    assert "no run has been planned there" in capsys.readouterr().err


def test_a_checkpoint_that_was_lost_is_not_replaced_by_another(
    project: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calibration follows the corpus. While the checkpoint is kept it is served, though the corpus has grown."""
    write_jsonl(project / "rows.jsonl", rows_of(40))
    calibrated = ["quantization.scheme=w4a16", "quantization.samples=4", "gate=off"]
    assert main([*RUN, *calibrated, f"quantization.cache={project / 'checkpoints'}"]) == 0
    write_jsonl(project / "rows.jsonl", rows_of(80))
    assert main([*AGAIN, *calibrated, f"quantization.cache={project / 'checkpoints'}"]) == 0
    assert report(project / "again")["copied_rows"] == 40
    capsys.readouterr()
    assert main([*AGAIN, *calibrated, "output.path=third", f"quantization.cache={project / 'empty'}"]) == 2
    assert "isn't in quantization.cache any more" in capsys.readouterr().err
    assert not (project / "third/meta/plan.json").exists()


def test_a_run_that_dies_on_the_way_copies_again_and_asks_no_row_twice(
    compose: Callable[..., Config], project: Path
) -> None:
    """Copied answers are no progress of an attempt, and are not spilled with its own."""
    write_jsonl(project / "rows.jsonl", rows_of(20))
    first = compose("output.rows_per_shard=1000")
    asyncio.run(labelled(first, planned(first)))
    write_jsonl(project / "rows.jsonl", rows_of(60))
    config = compose("output.rows_per_shard=1000", "output.path=again", "output.reuse=out")
    fixed = planned(config)
    with pytest.raises(EngineError):
        asyncio.run(labelled(config, fixed, die_after=25, asked=str(project / "asked")))
    spilled = sum(pq.read_table(p).num_rows for p in (project / "again/meta/partial").rglob("*.parquet"))
    assert 25 <= spilled < 40
    asked(project)
    (receipt,) = asyncio.run(labelled(config, fixed, asked=str(project / "asked")))
    assert (receipt.from_reuse, receipt.from_spill, asked(project)) == (20, spilled, 40 - spilled)
    assert len(rows_at(config)) == 60


def test_reuse_from_a_store(
    compose: Callable[..., Config], project: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    write_jsonl(project / "rows.jsonl", rows_of(50))
    old = f"output.path={s3.make_bucket('old')}/out"
    first = compose(old)
    asyncio.run(labelled(first, planned(first)))
    config = compose("output.path=again", old.replace("path", "reuse"))
    receipts = asyncio.run(labelled(config, planned(config)))
    assert sum(r.from_reuse for r in receipts) == 50


def test_answers_are_found_in_any_order_within_little_memory(
    compose: Callable[..., Config], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of a part or so: a shuffled corpus reads parts again and again, and finds the same."""
    bad = {"id": 999, "text": "", "gold": None}
    write_jsonl(project / "rows.jsonl", [*rows_of(100), bad, *rows_of(3)])  # three rows twice
    config = compose()
    asyncio.run(labelled(config, planned(config)))
    stand = [r for r in rows_at(config) if r["batchq_key"]]
    assert len(stand) == 103
    random.Random(0).shuffle(stand)
    output = storage.normalize(config.output.path)
    monkeypatch.setattr(reuse, "CACHE", 2000)
    earlier = Reuse(output, config.task)
    assert len(earlier) == 100, "a key each, none of them the failure's"
    found = earlier.find([*(r["batchq_key"] for r in stand), "00" * 16, "ff" * 16])
    assert len(found) == 100
    for row in stand:
        got = found[row["batchq_key"]]
        assert got.columns == {name: row[name] for name in got.columns} and len(got.columns) == 4
        assert (got.prompt_tokens, got.cached_tokens, got.output_tokens) == tuple(
            row[f"batchq_{kind}_tokens"] for kind in ("prompt", "cached", "output")
        )
    assert len(earlier._cache) < len(list((project / "out/data").iterdir()))
    with pytest.raises(NotFound):
        Reuse(str(project / "nowhere"), config.task)


def test_another_engine_has_other_keys(compose: Callable[..., Config], project: Path) -> None:
    """Equal keys have equal answers: so what decides an answer beside prompt and weights is in the key."""
    write_jsonl(project / "rows.jsonl", rows_of(5))
    keys = []
    for name, override in {"a": "engine.max_model_len=300", "b": "+engine.options.dtype=float16"}.items():
        config = compose(f"output.path={name}", override)
        fixed = store_plan(make_plan(config, "model", Scheme.none, "model"), storage.normalize(config.output.path))
        if name == "b":
            config.engine.options.clear()  # the fake engine doesn't know it
        asyncio.run(labelled(config, fixed))
        keys.append({r["batchq_key"] for r in rows_at(config)})
    plain = compose("output.path=c")
    asyncio.run(labelled(plain, planned(plain)))
    assert {r["batchq_key"] for r in rows_at(plain)} == keys[0], "the limit decides no answer"
    assert not keys[0] & keys[1]
