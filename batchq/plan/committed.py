"""What is committed of a plan, from the receipts of its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from batchq import storage
from batchq.config import Config
from batchq.errors import ConfigError, StorageError
from batchq.output import receipts
from batchq.plan.stored import load_plan
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


def source_plan(config: Config) -> Plan | None:
    """The plan of the run that output.reuse names, None if it names none.

    Raises ConfigError unless it is another output than this run's, and complete.
    """
    if not config.output.reuse:
        return None
    reuse = storage.normalize(config.output.reuse)
    if reuse == storage.normalize(config.output.path):
        raise ConfigError(f"output.reuse={reuse}: is output.path itself; what is reused goes to a new output.path")
    plan = load_plan(reuse)
    if plan is None:
        raise ConfigError(
            f"output.reuse={reuse}: no run has been planned there; name the output.path of a finished one"
        )
    if left := len(read_committed(plan, reuse).remaining):
        raise ConfigError(
            f"output.reuse={reuse}: {left} of its {len(plan.shards)} shards are to go; finish that run first"
        )
    return plan
