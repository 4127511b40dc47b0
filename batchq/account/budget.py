"""What a run may cost in all: `pricing.budget`, over every invocation on its output."""

from __future__ import annotations

from batchq.account import ledger
from batchq.account.cost import cost_of, price, spent, with_prices
from batchq.account.usage import RunAccount
from batchq.config import PricingConfig
from batchq.errors import ConfigError, LimitReached
from batchq.machine.hardware import Hardware


class Budget:
    """Checked once a second while rows are labelled. Quantizing and the gate count too, but are never stopped."""

    def __init__(self, pricing: PricingConfig, output: str, hardware: Hardware) -> None:
        """Raises ConfigError if `hardware` has no price, LimitReached if earlier invocations have spent it all."""
        self._pricing = pricing
        self._before = 0.0
        if pricing.budget is None:
            return
        runs = [run for run in ledger.read_runs(output) if run.verb == "run"]
        costs, whole = spent(with_prices(runs, pricing))
        if other := sorted(set(costs) - {pricing.currency}):
            raise ConfigError(
                f"pricing.budget={pricing.budget:g}: is in {pricing.currency}, and an earlier invocation "
                f"was booked in {other[0]}; go on with a price list in {other[0]}"
            )
        before = sum(costs.values())
        if not whole or price(hardware.accelerator, pricing) is None:
            raise ConfigError(
                f"pricing.budget={pricing.budget:g}: pricing.per_hour has no price for {hardware.accelerator}, or for "
                f"what an earlier invocation ran on; it has {', '.join(pricing.per_hour) or 'none'}"
            )
        self._before = before
        if before >= pricing.budget:
            raise LimitReached(self.words())

    def total(self, now: RunAccount | None = None) -> float:
        """What all invocations cost, `now` being this one's account so far; nothing counts that has no price."""
        return self._before + ((now and cost_of(now.replicas, self._pricing)) or 0.0)

    def share(self, now: RunAccount | None = None) -> float | None:
        """How much of the budget is spent, 1 for all; None where there is none."""
        return None if self._pricing.budget is None else self.total(now) / self._pricing.budget

    def is_spent(self, now: RunAccount) -> bool:
        return (self.share(now) or 0.0) >= 1

    def so_far(self, now: RunAccount) -> str:
        """For the live line: what this invocation cost, or what all did of the budget; nothing without prices."""
        if self._pricing.budget is not None:
            return f" · {self.total(now):.4f} of {self._pricing.budget:g} {self._pricing.currency}"
        cost = cost_of(now.replicas, self._pricing)
        return "" if cost is None else f" · {cost:.4f} {self._pricing.currency} so far"

    def words(self, now: RunAccount | None = None) -> str:
        """Why the run ends here."""
        return (
            f"pricing.budget={self._pricing.budget:g}: {self.total(now):.4f} {self._pricing.currency} are spent; every "
            "answer is saved. Raise it to resume with the same command"
        )
