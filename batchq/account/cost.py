"""What devices were held for -> money: at a price list, or at the prices that were booked. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from batchq.account.usage import Rate, Rated, ReplicaAccount, RunAccount
from batchq.config import PricingConfig


def matched(accelerator: str, pricing: PricingConfig) -> str:
    """The longest key of the price list that stands in the name as whole words, or "": L4 is no L40, A100 no A1000."""
    keys = [k for k in pricing.per_hour if re.search(rf"(?i)(?<![a-z0-9]){re.escape(k)}(?![a-z0-9])", accelerator)]
    return max(keys, key=len, default="")


def price(accelerator: str, pricing: PricingConfig) -> float | None:
    """Price of one device-hour; None if the list has none."""
    key = matched(accelerator, pricing)
    return pricing.per_hour[key] if key else None


def cost(device_seconds: float, per_hour: float) -> float:
    """What devices cost that are held for so long in all, at a price per device and hour."""
    return device_seconds / 3600 * per_hour


def cost_of(replicas: Iterable[ReplicaAccount], pricing: PricingConfig) -> float | None:
    """What these cost at a price list; None if one of the accelerators has no price."""
    replicas = tuple(replicas)
    return booked(replicas, rated(replicas, pricing, ""))


def rated(replicas: Iterable[ReplicaAccount], pricing: PricingConfig, at: str) -> Rated:
    """What a device-hour of each accelerator costs at a price list; `at` is when that was looked up."""
    names = sorted({replica.accelerator for replica in replicas})
    rates = tuple(Rate(name, matched(name, pricing), price(name, pricing)) for name in names)
    return Rated(at, pricing.currency, pricing.as_of, pricing.source, rates)


def booked(replicas: Iterable[ReplicaAccount], at: Rated) -> float | None:
    """What these cost at the prices that were booked; None if one of the accelerators had none."""
    prices = {rate.accelerator: rate.per_hour for rate in at.rates}
    total = 0.0
    for replica in replicas:
        per_hour = prices.get(replica.accelerator)
        if per_hour is None:
            return None
        total += cost(replica.device_seconds, per_hour)
    return total


def with_prices(
    runs: Iterable[RunAccount], pricing: PricingConfig, anew: bool = False
) -> list[tuple[RunAccount, Rated]]:
    """Each record and its booked prices; those of this list for a record that has none, or for all where it is asked
    what they would cost `anew`."""
    return [(run, rated(run.replicas, pricing, "") if anew or run.rated is None else run.rated) for run in runs]


def spent(priced: Iterable[tuple[RunAccount, Rated]]) -> tuple[dict[str, float], bool]:
    """(what all these cost, by currency; whether each of them has a price)."""
    costs: dict[str, float] = {}
    whole = True
    for run, at in priced:
        amount = booked(run.replicas, at)
        whole &= amount is not None
        if run.replicas and amount is not None:
            costs[at.currency] = costs.get(at.currency, 0.0) + amount
    return costs, whole


def total(costs: dict[str, float], whole: bool) -> float | None:
    """One sum, where there is one: all has a price, and in one currency."""
    return sum(costs.values()) if whole and len(costs) < 2 else None


def price_list(at: Rated) -> str:
    """Which list that is, in words: its source, which says whether it is an example, and its date."""
    return ", ".join(word for word in (at.source, at.as_of or "no date") if word)
