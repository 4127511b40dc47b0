"""How many replicas run, and where: the one rule for what is started, what shares a node's memory, and forecasts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from batchq.config import ClusterConfig
from batchq.errors import ConfigError
from batchq.machine.hardware import Hardware, Node


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one replica: a node, and on a node without accelerators the cores it may use."""

    node: str  # Ray's id; empty for this machine, before Ray runs
    cores: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Replicas:
    """The slots that replicas take, in the order in which they are filled: as many as are asked for, or all."""

    slots: tuple[Slot, ...]
    possible: int  # slots that the cluster has, whatever is asked for
    gpus_each: int  # 0 on a CPU

    @property
    def devices(self) -> int:
        """GPUs of all replicas together, or cores."""
        return sum(self.gpus_each or len(slot.cores) for slot in self.slots)

    @property
    def on_fullest_node(self) -> int:
        """The most replicas on any one node, which share its memory; at least 1."""
        return max(Counter(slot.node for slot in self.slots).values(), default=1)


def arrange(cluster: ClusterConfig, hardware: Hardware) -> Replicas:
    """Slots for `cluster.replicas`, or all that there are: each node's first slot before any node's second. Fewer than
    asked for where there aren't enough; `require` refuses that."""
    slots = _all(cluster, hardware)
    return Replicas(tuple(slots[: cluster.replicas]), len(slots), least(cluster, hardware.gpus != ()).get("GPU", 0))


def free(cluster: ClusterConfig, hardware: Hardware, used: Sequence[Slot]) -> list[Slot]:
    """Slots beside those that are used, up to `cluster.replicas` in all: of nodes that joined, and of lost replicas. No
    core is given twice, though the shares of a node's cores are other ones once there are more nodes."""
    left, taken = Counter(used), {(slot.node, core) for slot in used for core in slot.cores}
    found = []
    for slot in _all(cluster, hardware):
        left[slot] -= 1
        if left[slot] < 0 and not any((slot.node, core) in taken for core in slot.cores):
            found.append(slot)
    return found if cluster.replicas is None else found[: max(0, cluster.replicas - len(used))]


def least(cluster: ClusterConfig, on_gpus: bool) -> dict[str, int]:
    """What one replica takes of a node at least, by Ray's names of resources."""
    if on_gpus:
        return {"GPU": cluster.tensor_parallel_size * cluster.pipeline_parallel_size}
    return {"CPU": cluster.cpus_per_replica or 1}


def _all(cluster: ClusterConfig, hardware: Hardware) -> list[Slot]:
    gpus = least(cluster, hardware.gpus != ()).get("GPU", 0)
    # A cluster's head often gives no core to anybody: it is no place, and takes no share.
    nodes = [node for node in hardware.nodes if node.gpus or node.cores]
    by_node = [_slots(cluster, node, gpus, len(nodes)) for node in nodes]
    return [slot for row in itertools.zip_longest(*by_node) for slot in row if slot is not None]


def require(cluster: ClusterConfig, hardware: Hardware) -> Replicas:
    """As `arrange`, but raises ConfigError if there are fewer slots than are asked for; on a cluster, which nodes may
    join, if there is none."""
    placed = arrange(cluster, hardware)
    if placed.slots and cluster.address is not None:
        return placed  # more may join
    if not placed.slots or len(placed.slots) < (cluster.replicas or 1):
        each = f"{placed.gpus_each} GPUs" if placed.gpus_each else f"{cluster.cpus_per_replica or 1} cores"
        lower = "cluster.tensor_parallel_size or cluster.pipeline_parallel_size"
        if not placed.gpus_each:
            lower = "cluster.cpus_per_replica"
        if cluster.replicas is None:
            raise ConfigError(f"no node has the {each} that one replica takes; lower {lower}")
        raise ConfigError(
            f"cluster.replicas={cluster.replicas}: there are slots for {placed.possible} (of {each} each); "
            f"lower it or {lower}"
        )
    return placed


def _slots(cluster: ClusterConfig, node: Node, gpus: int, nodes: int) -> list[Slot]:
    """All slots of one node. Without `cluster.cpus_per_replica` its cores are shared out evenly."""
    if gpus:
        return [Slot(node.id, ())] * (node.gpus // gpus)
    on_each = -(-(cluster.replicas or 1) // nodes)
    share = cluster.cpus_per_replica or max(1, len(node.cores) // on_each)
    starts = range(0, len(node.cores) - share + 1, share)
    return [Slot(node.id, node.cores[start : start + share]) for start in starts]
