"""Ray's nodes, and the slots on them that replicas take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from batchq.config import ClusterConfig
from batchq.engine.protocol import EngineSpec
from batchq.errors import EngineError
from batchq.machine import hardware
from batchq.machine.hardware import Hardware, Node
from batchq.machine.log import LogFile
from batchq.machine.words import last_line
from batchq.pool.replica import Replica
from batchq.sizing import replicas
from batchq.sizing.replicas import Slot


def why(error: BaseException) -> str:
    """What kept a process from working: our own words, or the library that its node lacks. Of other errors the class
    alone, since their messages may quote a row."""
    kind, _, words = last_line(str(error)).partition(": ")
    if isinstance(error, ImportError):
        return str(error)
    if kind.startswith("batchq.errors.") or kind in ("ModuleNotFoundError", "ImportError"):  # of an actor's beginning
        return words
    return type(error).__name__


def nodes() -> list[dict[str, Any]]:
    """Ray's records of the nodes that are alive, always in the same order."""
    import ray

    records: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return sorted((n for n in records if n["Alive"]), key=lambda n: str(n["NodeID"]))


def alive(slot: Slot) -> bool:
    """Whether the node is still there."""
    return any(node["NodeID"] == slot.node for node in nodes())


def log_of(slot: Slot, file: str, cluster: ClusterConfig) -> str:
    """In words where that slot's replica logs: on a cluster, on its node."""
    hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes()} if cluster.address else {}
    return f"{file} on {hosts[slot.node]}" if slot.node in hosts else file


def detect() -> Hardware:
    """The hardware of the best equipped node, and all nodes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    records = nodes()
    best = min(records, key=lambda n: (-n["Resources"].get("GPU", 0), -n["Resources"].get("CPU", 0)))
    on_best = NodeAffinitySchedulingStrategy(best["NodeID"], soft=False)
    of_best: Hardware = ray.get(
        ray.remote(hardware.detect).options(num_cpus=0, scheduling_strategy=on_best).remote()  # type: ignore[arg-type]
    )
    return _with_nodes(of_best, records)


def has_room(record: dict[str, Any], wanted: dict[str, int]) -> bool:
    """Whether a node of Ray's records has so much of each resource, whoever uses it now."""
    return all(record["Resources"].get(name, 0) >= count for name, count in wanted.items())


def slots(cluster: ClusterConfig, hardware: Hardware) -> list[Slot]:
    """The replicas' slots on the nodes that are alive now. Raises ConfigError if this machine has fewer than are asked
    for, EngineError if a cluster has none any more."""
    if cluster.address is None:
        return list(replicas.require(cluster, _with_nodes(hardware, nodes())).slots)
    if found := free_slots(cluster, hardware, []):
        return found
    raise EngineError(f"every node of {cluster.address} with room for a replica is gone; the same command goes on")


def free_slots(cluster: ClusterConfig, hardware: Hardware, used: Sequence[Slot]) -> list[Slot]:
    """Slots beside the used ones, on the nodes that are alive now; up to `cluster.replicas` in all."""
    records = nodes()
    return replicas.free(cluster, _with_nodes(hardware, records), used) if records else []


def _with_nodes(hardware: Hardware, records: list[dict[str, Any]]) -> Hardware:
    """The same with the nodes of Ray's records; a node's cores are taken to have the ids that the best one's have."""
    resources = [
        (str(r["NodeID"]), int(r["Resources"].get("GPU", 0)), int(r["Resources"].get("CPU", 0))) for r in records
    ]
    return dataclasses.replace(
        hardware, cluster=tuple(Node(id, gpus, hardware.cores[:cpus]) for id, gpus, cpus in resources)
    )


def start(slot: Slot, spec: EngineSpec, hardware: Hardware, log: LogFile) -> Any:
    """A replica at that place; the handle of Ray's actor. It loads nothing before it is told to."""
    import ray

    return ray.remote(Replica).options(**placement(slot, spec, hardware)).remote(spec, log)  # type: ignore[arg-type]


def placement(slot: Slot, spec: EngineSpec, hardware: Hardware) -> dict[str, Any]:
    """Ray's options for the actor that runs one engine."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cuda = hardware.device == "cuda"
    return {
        "num_cpus": 0 if cuda else len(slot.cores),
        "num_gpus": spec.devices if cuda else 0,
        "max_restarts": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(slot.node, soft=False),
    }
