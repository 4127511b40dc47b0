"""What is committed of a plan, from the receipts of its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from batchq.errors import StorageError
from batchq.output import receipts
from batchq.records import Plan, Receipt, Shard


@dataclass(frozen=True)
class Committed:
    """All parts of a plan that are committed, by URI, and the shards that are still to do."""

    by_uri: Mapping[str, Receipt]
    remaining: tuple[Shard, ...]

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        return tuple(self.by_uri.values())

    @cached_property
    def rows(self) -> int:
        return sum(receipt.usage.rows for receipt in self.by_uri.values())

    @cached_property
    def failures(self) -> int:
        return sum(receipt.usage.failures for receipt in self.by_uri.values())

    @cached_property
    def truncated(self) -> int:
        return sum(receipt.usage.truncated for receipt in self.by_uri.values())


def read_committed(plan: Plan, output: str, known: Committed | None = None) -> Committed:
    """Read the receipts that aren't `known` yet: a committed part never changes.

    A shard is done when its last part is committed and all before it: a stream's parts are committed side by side, so a
    kill may leave the last one alone. Raises StorageError if a committed object belongs to another plan.
    """
    by_uri = receipts.read_all(output, known.by_uri if known else {})
    for receipt in by_uri.values():
        if receipt.fingerprint != plan.fingerprint:
            raise StorageError(f"{output}/data: part of shard {receipt.shard} belongs to another run; move it away")
    parts = Counter(r.shard for r in by_uri.values())
    done = {r.shard for r in by_uri.values() if r.last and parts[r.shard] == r.part + 1}
    return Committed(by_uri, tuple(s for s in plan.shards if s.index not in done))
