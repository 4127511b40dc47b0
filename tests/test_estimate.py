"""estimate: time and money before a run, from the last run, from `tune`, or by forecast."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from batchq import input
from batchq.account.usage import Counters, ReplicaAccount
from batchq.cli import main
from batchq.config import ClusterConfig, Config, InputConfig, PricingConfig, Scheme, TaskConfig, TaskKind
from batchq.machine.hardware import Hardware, Node
from batchq.model.tensors import Shape
from batchq.plan import sample
from batchq.plan.sample import Lengths
from batchq.records import Plan, Range, Shard
from batchq.sizing import estimate, tuned
from batchq.sizing.fit import Fit
from tests.helpers import rows_of, write_jsonl
from tests.inputs import compressed
from tests.machines import FULL, GIB, LLAMA_8B, cpu, cuda, llama_8b

ONE = cuda("NVIDIA H200", 9, 0, 140 * GIB)
TWO = dataclasses.replace(ONE, gpus=ONE.gpus * 2)
PRICES = PricingConfig(currency="USD", as_of="2026-11-01", per_hour={"H200": 3.6, "cpu_core": 0.05})
LENGTHS = Lengths((999,) * 100)
MILLION = tuple(Shard(n, 0, Range("rows", n * 1000, n * 1000 + 1000)) for n in range(1000))
DRAFT = Plan("", {}, "mine", (), MILLION, "parquet", "", ("text",), 1000, "fp8", "m" * 64)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHQ_CACHE", str(tmp_path / "cache"))


def job(kind: TaskKind = TaskKind.classify, **cluster: Any) -> Config:
    return Config(task=TaskConfig(kind=kind), cluster=ClusterConfig(**cluster), pricing=PRICES)


def said(config: Config, here: Hardware, draft: Plan = DRAFT, left: float = 1.0, lengths: Lengths = LENGTHS) -> str:
    fit = Fit(FULL, here, config, Shape(llama_8b(), LLAMA_8B))
    return estimate.words(config, draft, fit, Scheme.fp8, lengths, left)


def test_a_gpu_has_a_forecast() -> None:
    """1e9 tokens at 0.44 x 1,979e12 / (2 x 6.98e9) = 62,400 a second are 4:27:07, and that at 3.6 USD an hour 16.03."""
    words = said(job(), ONE)
    assert re.match(
        r"about 4:27:\d\d of labelling and 16\.0\d USD \(prices of 2026-11-01\) for the whole: 62,\d+ tokens/s", words
    )
    assert words.endswith("on 1 x NVIDIA H200, a forecast")


def test_two_gpus_take_half_the_time_for_the_same_money() -> None:
    words = said(job(), TWO)
    assert "about 2:13:" in words and re.search(r" 16\.0\d USD ", words) and "2 x NVIDIA H200" in words
    assert "on 1 x" in said(job(replicas=1), TWO) and "about 4:27:" in said(job(replicas=1), TWO)


def test_a_cluster_labels_with_all_its_nodes() -> None:
    """Four nodes of eight: 62,400 tokens/s each take 1e9 tokens in 8:21."""
    eight = dataclasses.replace(ONE, gpus=ONE.gpus * 8)
    four = dataclasses.replace(eight, cluster=tuple(Node(f"node-{i}", 8, (0,)) for i in range(4)))
    words = said(job(), four)
    assert "about 8:2" in words and "32 x NVIDIA H200" in words and re.search(r" 16\.\d\d USD ", words)
    assert "about 33:2" in said(job(), eight) and "8 x NVIDIA H200" in said(job(), eight)
    assert "cluster.replicas=40: there are slots for 32" in said(job(replicas=40), four)


def test_what_is_left_of_a_run_takes_its_share() -> None:
    words = said(job(), ONE, left=0.25)
    assert "about 1:06:" in words and "for what is left" in words


def test_short_rows_are_bound_by_rows() -> None:
    assert "of labelling" in (words := said(job(), ONE, lengths=Lengths((9,) * 10)))
    assert "20,000 tokens/s" in words and "about 8:20 " in words


def test_a_cpu_has_none_until_something_ran() -> None:
    here = cpu(memory=64 * GIB)
    assert said(job(), here) == "how fast isn't known here yet: `tune` or a first run tells"
    tuned.remember(job(), DRAFT, here, tuned.Tuned({}, 4000.0, 3500.0, 1000, "2026-11-24"))
    assert "4,000 tokens/s" in (words := said(job(), here)) and "as `tune` measured on 2026-11-24" in words
    phases = {"load": 50.0, "infer": 80.0, "idle": 20.0}
    counters = Counters(tokens=300_000, output_tokens=300)
    estimate.remember(job(), DRAFT, here, [ReplicaAccount("cpu_core", 2, phases, {}, counters)], 300)
    assert "3,000 tokens/s" in (ran := said(job(), here)) and "as a run reached on" in ran


def test_a_run_that_was_over_at_once_says_nothing() -> None:
    here = cpu(memory=64 * GIB)
    short = ReplicaAccount("cpu_core", 2, {"infer": 1.0}, counters=Counters(tokens=300))
    estimate.remember(job(), DRAFT, here, [short], 3)
    estimate.remember(job(), DRAFT, here, [ReplicaAccount("cpu_core", 2, {"infer": 90.0})], 0)
    gated = [
        ReplicaAccount("cpu_core", 2, {"gate": 30.0}),
        ReplicaAccount("cpu_core", 2, {"infer": 90.0}, counters=Counters(tokens=300_000)),
    ]
    estimate.remember(job(), DRAFT, here, gated, 300)
    assert "isn't known here yet" in said(job(), here)


def test_answers_that_are_written_count_as_long_as_they_were() -> None:
    """A thousand answers of 1,001 tokens to prompts of 999, 1,000 tokens/s: 2,000 seconds for a thousand rows."""
    config = job(TaskKind.generate)
    assert "isn't known here yet" in said(config, ONE), "a forecast can't know how long answers are"
    counters = Counters(tokens=2_000_000, output_tokens=1_001_000)
    ran = [ReplicaAccount("NVIDIA H200", 1, {"infer": 2000.0}, {}, counters)]
    estimate.remember(config, DRAFT, ONE, ran, 1000)
    whole = dataclasses.replace(DRAFT, shards=DRAFT.shards[:1])
    assert "about 33:20 of labelling and 2.00 USD" in said(config, ONE, whole)


def test_files_whose_rows_nobody_counted_have_a_price_a_thousand() -> None:
    stream = dataclasses.replace(DRAFT, format="dataset", shards=(Shard(0, 0, Range("stream")),))  # on an object store
    assert "for a thousand rows" in said(job(), ONE, stream) and "about 0:16 of" in said(job(), ONE, stream)


@pytest.mark.parametrize("name", ["calls.csv", "calls.csv.gz", "calls.jsonl.zst", "calls.txt.bz2"])
def test_rows_that_only_reading_counts_are_estimated_from_heads(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the larger file of two the head is a quarter, which is some two of bzip2's blocks: it counts by whole ones."""
    near = 0.25 if name.endswith("bz2") else 0.1
    monkeypatch.setattr(input.rows, "HEAD", 1 << 21)
    luck = random.Random(0)
    for number, rows in enumerate((12_000, 200)):
        texts = [luck.randbytes(luck.randint(50, 600)).hex() for _ in range(rows)]
        lines = {
            "csv": ["id,text", *(f'{i},"{t}\n, she said"' for i, t in enumerate(texts))],
            "jsonl": [json.dumps({"text": t}) for t in texts],
            "txt": texts,
        }
        _, kind, *packed = name.split(".")
        data = "\n".join(lines[kind]).encode()
        (tmp_path / f"{number}-{name}").write_bytes(compressed(data, f".{packed[0]}") if packed else data)
    listed = input.list_input(InputConfig(path=str(tmp_path))).objects
    shards = tuple(Shard(n, n, Range("stream")) for n in range(2))
    draft = dataclasses.replace(DRAFT, objects=tuple(listed), shards=shards, format={"txt": "text"}.get(kind, kind))
    assert sample.expected_rows(draft, None) == pytest.approx(12_200, rel=near)
    assert sample.expected_rows(draft, 7) == 7
    monkeypatch.setattr(input.rows, "HEAD", 1 << 24)
    assert sample.expected_rows(draft, None) == 12_200, "where the head is all, they are counted"

    if packed:
        (tmp_path / f"1-{name}").write_bytes(b"not packed at all" * 9)
        draft = dataclasses.replace(draft, objects=tuple(input.list_input(InputConfig(path=str(tmp_path))).objects))
        assert sample.expected_rows(draft, None) == pytest.approx(12_000, rel=near), "a damaged one doesn't stop it"


def test_plan_says_what_a_csv_will_cost(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "rows.csv").write_text("id,text,gold\n" + "".join(f"{i},row {i},good\n" for i in range(700)))
    assert main(["plan", "job=mine", "engine=fake", "input.path=rows.csv"]) == 0
    assert "for about 700 rows" in capsys.readouterr().out


def test_plan_says_what_the_last_run_reached(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "LEAST", 0.0)
    write_jsonl(project / "rows.jsonl", rows_of(40))
    assert main(["plan", "job=mine", "engine=fake"]) == 0
    assert "estimate   how fast isn't known here yet" in capsys.readouterr().out
    assert main(["job=mine", "engine=fake"]) == 0
    capsys.readouterr()
    assert main(["plan", "job=mine", "engine=fake", "output.path=out/other"]) == 0
    assert "as a run reached on" in capsys.readouterr().out
