from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from batchq.account.cost import cost_of, price
from batchq.account.summary import efficiency, summarise
from batchq.account.usage import (
    Counters,
    PhaseClock,
    ReplicaAccount,
    RunAccount,
    account_from_json,
    computed_tokens,
    kv_tokens_read,
)
from batchq.config import PricingConfig
from batchq.records import Receipt, Usage


class Ticks:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_every_second_is_exactly_one_phase() -> None:
    ticks = Ticks()
    clock = PhaseClock("start", ticks)
    for phase, seconds in [("load", 3.0), ("idle", 40.0), ("infer", 2.0), ("idle", 10.0)]:
        ticks.now += seconds
        clock.enter(phase)
    ticks.now += 5
    clock.move("load", "compile", 15.0)
    assert clock.seconds() == {"start": 3, "load": 25, "compile": 15, "quantize": 0, "gate": 0, "infer": 10, "idle": 7}
    assert sum(clock.seconds().values()) == ticks.now - 100


def test_the_longest_key_prices_an_accelerator() -> None:
    pricing = PricingConfig(per_hour={"H100": 3.0, "H100 NVL": 2.5, "cpu_core": 0.05})
    assert price("NVIDIA H100 80GB HBM3", pricing) == 3.0
    assert price("NVIDIA H100 NVL", pricing) == 2.5
    assert price("NVIDIA B200", pricing) is None


def receipt(**usage: float) -> Receipt:
    return Receipt(0, 0, True, "a", "f", Usage(**usage), {"good": 1})  # type: ignore[arg-type]


def run(phases: dict[str, float], accelerator: str = "NVIDIA H100") -> RunAccount:
    return RunAccount("id", "complete", "", sum(phases.values()), (ReplicaAccount(accelerator, 2, phases),))


def test_every_device_costs_for_as_long_as_it_was_held() -> None:
    held = ReplicaAccount("NVIDIA H100", 2, {"load": 600.0, "infer": 900.0, "idle": 300.0})
    assert held.device_seconds == 3600
    assert cost_of([held, held], PricingConfig(per_hour={"H100": 2.5})) == pytest.approx(5.0)
    assert cost_of([held, ReplicaAccount("Mystery", 1, {})], PricingConfig(per_hour={"H100": 2.5})) is None


def test_cost_covers_waste_and_is_charged_to_rows_that_came_out() -> None:
    pricing = PricingConfig(per_hour={"H100": 3.6})
    killed, good = run({"load": 100.0, "infer": 400.0}), run({"infer": 500.0})
    rows = [receipt(rows=10, answers=9, failures=1, prompt_tokens=900_000, output_tokens=100_000, gold=8, correct=6)]
    summary = summarise(rows, [killed, good], pricing)
    assert summary["cost"] == pytest.approx(2 * 1000 * 3.6 / 3600)
    assert summary["cost_per_million_tokens"] == pytest.approx(2.0)
    assert summary["cost_per_thousand_rows"] == pytest.approx(200.0)
    assert summary["accuracy"] == 0.75
    assert summary["device_seconds"]["load"] == 200


def test_an_unknown_accelerator_has_no_cost_rather_than_a_wrong_one() -> None:
    summary = summarise(
        [receipt(rows=1, answers=1)], [run({"infer": 1.0}, "Mystery")], PricingConfig(per_hour={"H100": 3.0})
    )
    assert summary["cost"] is None
    assert summary["unpriced"] == ["Mystery"]


def worked(devices: int = 1, computed: int = 800, joules: float | None = None) -> ReplicaAccount:
    phases = {"load": 90.0, "infer": 40.0, "idle": 10.0}
    return ReplicaAccount("NVIDIA H200", devices, phases, {}, Counters(tokens=1000, computed_tokens=computed), joules)


def of(*replicas: ReplicaAccount, flop: float | None = 2e9, peak: float | None = 1e11, **decoding: Any) -> RunAccount:
    return RunAccount("id", "complete", "", 140.0, replicas, flop_per_token=flop, peak_flops=peak, **decoding)


def test_a_token_that_is_cached_or_that_nothing_follows_is_not_computed() -> None:
    assert computed_tokens(prompt=1000, cached=960, output=1) == 40  # a label: one prefill
    assert computed_tokens(prompt=1000, cached=0, output=128) == 1127
    assert computed_tokens(prompt=7, cached=0, output=0) == 7


def test_mfu_is_what_was_computed_over_what_the_devices_could_have() -> None:
    one = efficiency([of(worked())])
    assert one["mfu"] == pytest.approx(800 * 2e9 / (40 * 1e11))
    assert efficiency([of(worked(devices=2))])["mfu"] == pytest.approx(one["mfu"] / 2)
    # A killed invocation's work counts, and the time in which it was done; loading isn't inference.
    both = efficiency([of(worked(computed=0)), of(worked(), peak=2e11)])
    assert both["mfu"] == pytest.approx(800 * 2e9 / (40 * 1e11 + 40 * 2e11))


def test_this_is_the_figure_that_was_measured_by_hand() -> None:
    """INT8 on an H200, 6.98e9 linear parameters, 69,853 prompt tokens per second: 49% of 1,979 teraFLOPS."""
    answered = Counters(tokens=6_985_300, computed_tokens=6_985_300)
    replica = ReplicaAccount("NVIDIA H200", 1, {"infer": 100.0}, {}, answered, 68_456.0)
    found = efficiency([of(replica, flop=2 * 6.98e9, peak=1979e12)])
    assert found["mfu"] == pytest.approx(0.49, abs=0.005)
    assert found["joules_per_thousand_tokens"] == pytest.approx(9.8, abs=0.005)


def test_a_generated_token_reads_all_that_stand_before_it() -> None:
    assert kv_tokens_read(prompt=1000, cached=0, output=1) == 0  # the prefill gives the first
    assert kv_tokens_read(prompt=1000, cached=0, output=4) == 1001 + 1002 + 1003
    assert kv_tokens_read(prompt=1000, cached=960, output=4) == 41 + 42 + 43
    assert kv_tokens_read(prompt=7, cached=0, output=0) == 0


def test_mbu_is_what_decoding_has_read_over_what_the_memory_gives() -> None:
    """10,000 rows of 1,000 prompt tokens and 201 of output in 200 s, at most 256 at once: Llama 3.1 8B in BF16, its
    layers 13.96 GB and a token's keys and values 131,072 bytes, on an H100, 3.35 TB/s."""
    written = 10_000 * 201
    read = 10_000 * kv_tokens_read(1000, 0, 201)
    assert read == 10_000 * 200 * (1000 + 201 / 2)
    decoding: dict[str, Any] = {
        "weight_bytes_per_output_token": 13.96e9 / 256,
        "kv_bytes_per_token": 131_072,
        "peak_bandwidth": 3.35e12,
    }
    replica = ReplicaAccount(
        "NVIDIA H100", 1, {"infer": 200.0}, counters=Counters(output_tokens=written, kv_tokens_read=read)
    )
    moved = written / 256 * 13.96e9 + read * 131_072
    found = efficiency([of(replica, **decoding)])["mbu"]
    assert found == pytest.approx(moved / (200 * 3.35e12)) == pytest.approx(0.594, abs=0.0005)
    assert efficiency([of(dataclasses.replace(replica, devices=2), **decoding)])["mbu"] == pytest.approx(found / 2)
    assert efficiency([of(replica, **decoding), of(replica, **decoding)])["mbu"] == pytest.approx(found)
    # Labels are scored and nothing is decoded; or the device isn't known, in one invocation of two.
    assert efficiency([of(replica)])["mbu"] is None
    assert efficiency([of(replica, **decoding), of(replica, **{**decoding, "peak_bandwidth": None})])["mbu"] is None


def test_joules_are_summed_over_replicas_and_invocations() -> None:
    found = efficiency([of(worked(joules=5000.0), worked(joules=4000.0)), of(worked(joules=1000.0))])
    assert (found["joules"], found["tokens_answered"]) == (10_000, 3000)
    assert found["joules_per_thousand_tokens"] == pytest.approx(10_000 / 3)


def test_what_is_not_counted_everywhere_is_left_out_rather_than_wrong() -> None:
    uncounted = efficiency([of(worked(joules=5000.0), worked())])
    assert uncounted["joules"] is None and uncounted["joules_per_thousand_tokens"] is None
    assert uncounted["mfu"] is not None
    assert efficiency([of(worked()), of(worked(), peak=None)])["mfu"] is None
    assert efficiency([of(worked(), flop=None)])["mfu"] is None
    assert efficiency([])["mfu"] is None and efficiency([])["joules"] is None
    only_loaded = of(ReplicaAccount("NVIDIA H200", 1, {"load": 9.0}), peak=None)
    assert efficiency([only_loaded, of(worked(joules=1.0))])["mfu"] is not None


def test_a_record_of_before_there_were_these_figures_is_read() -> None:
    record = dataclasses.asdict(of(worked(joules=5.0)))
    assert account_from_json(json.loads(json.dumps(record))) == of(worked(joules=5.0))
    for name in (
        "flop_per_token",
        "peak_flops",
        "weight_bytes_per_output_token",
        "kv_bytes_per_token",
        "peak_bandwidth",
    ):
        del record[name]
    for name in ("counters", "joules"):
        del record["replicas"][0][name]
    old = efficiency([account_from_json(record)])
    assert old["mfu"] is None and old["mbu"] is None


def test_a_record_of_the_version_before_is_read() -> None:
    stored = """{"id": "20260901T080000-1234abcd", "state": "complete", "started": "2026-09-01T08:00:00+00:00",
        "wall_seconds": 61.5, "replicas": [{"accelerator": "NVIDIA H100", "devices": 2,
            "phases": {"load": 20.0, "infer": 40.0}, "cpu": {"read": 1.5}, "tokens": 900, "computed": 700,
            "joules": 12.5, "generated": 40, "recalled": 5000}],
        "lost_replicas": 1, "reached": {"model": 0.5}, "flop_per_token": 2e9, "peak_flops": 1e15,
        "bytes_per_generated": 5.5e7, "bytes_per_recalled": 131072, "peak_bandwidth": 3.35e12}"""
    read = account_from_json(json.loads(stored))
    counters = Counters(tokens=900, computed_tokens=700, output_tokens=40, kv_tokens_read=5000)
    phases = {"load": 20.0, "infer": 40.0}
    assert read.replicas == (ReplicaAccount("NVIDIA H100", 2, phases, {"read": 1.5}, counters, 12.5),)
    assert (read.weight_bytes_per_output_token, read.kv_bytes_per_token) == (5.5e7, 131_072)
    assert efficiency([read])["mbu"] == pytest.approx((40 * 5.5e7 + 5000 * 131_072) / (2 * 40 * 3.35e12))


def test_counters_add_up_field_by_field() -> None:
    fields = [f.name for f in dataclasses.fields(Counters) if f.name != "failures_by_code"]
    ones: dict[str, Any] = {name: n for n, name in enumerate(fields, 1)}
    one = Counters(**ones, failures_by_code={"empty": 1, "too_long": 2})
    other = Counters(**{name: 10 * n for name, n in ones.items()}, failures_by_code={"too_long": 3})
    added = {name: 11 * n for n, name in enumerate(fields, 1)}
    assert dataclasses.asdict(one + other) == {**added, "failures_by_code": {"empty": 1, "too_long": 5}}


def test_an_invocations_line_and_their_sum_agree() -> None:
    pricing = PricingConfig(per_hour={"H200": 3.6})
    summary = summarise([receipt(rows=1, answers=1)], [of(worked()), of(worked(devices=2))], pricing)
    assert [r["cost"] for r in summary["runs"]] == pytest.approx([0.14, 0.28])
    assert summary["cost"] == pytest.approx(0.42)
    assert summary["runs"][1]["device_seconds"]["load"] == 180
