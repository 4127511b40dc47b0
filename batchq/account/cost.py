"""What devices were held for -> money. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from batchq.account.usage import ReplicaAccount
from batchq.config import PricingConfig


def price(accelerator: str, pricing: PricingConfig) -> float | None:
    """Price of one device-hour: the longest key of the price list that the name contains."""
    keys = [k for k in pricing.per_hour if k.lower() in accelerator.lower()]
    return pricing.per_hour[max(keys, key=len)] if keys else None


def cost(device_seconds: float, per_hour: float) -> float:
    """What devices cost that are held for so long in all, at a price per device and hour."""
    return device_seconds / 3600 * per_hour


def cost_of(replicas: Iterable[ReplicaAccount], pricing: PricingConfig) -> float | None:
    """What these held cost; None if one of the accelerators has no price."""
    total = 0.0
    for replica in replicas:
        per_hour = price(replica.accelerator, pricing)
        if per_hour is None:
            return None
        total += cost(replica.device_seconds, per_hour)
    return total
