from __future__ import annotations

import pytest

from batchq.account import PhaseClock, ReplicaAccount, RunAccount, price, summarise
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
