"""replicas: how many run, where, and what follows from it for memory and forecasts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from batchq import pool
from batchq.config import ClusterConfig, Config, Scheme
from batchq.errors import ConfigError, EngineError
from batchq.machine.hardware import Hardware, Node
from batchq.model import kv_cache
from batchq.model.tensors import Shape
from batchq.sizing import replicas, settings
from batchq.sizing.fit import Fit, require_memory
from batchq.sizing.memory import kv_cache_bytes
from tests.machines import FULL, GIB, LLAMA_8B, cpu, cuda, llama_8b

H100 = cuda("NVIDIA H100 80GB HBM3", 9, 0)
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 256}


def cores(count: int, memory: int = 64 * GIB) -> Hardware:
    return dataclasses.replace(cpu(memory=memory), cores=tuple(range(count)))


def cluster_of(like: Hardware, *counts: int) -> Hardware:
    """Nodes with so many GPUs each, or so many cores where `like` has no GPU."""
    nodes = [
        Node(f"node-{i}", count, like.cores) if like.gpus else Node(f"node-{i}", 0, tuple(range(count)))
        for i, count in enumerate(counts)
    ]
    return dataclasses.replace(like, cluster=tuple(nodes))


def names(found: replicas.Replicas) -> list[str]:
    return [slot.node.removeprefix("node-") for slot in found.slots]


# ---- where they go ----


def test_one_machine_has_one_replica_of_all_its_cores_unless_told_otherwise() -> None:
    found = replicas.arrange(ClusterConfig(), cores(16))
    assert [slot.cores for slot in found.slots] == [tuple(range(16))] and found.devices == 16
    three = replicas.arrange(ClusterConfig(replicas=3), cores(16))
    assert [slot.cores for slot in three.slots] == [tuple(range(i, i + 5)) for i in (0, 5, 10)]
    assert (three.devices, three.on_fullest_node) == (15, 3)


def test_each_nodes_first_comes_before_any_nodes_second() -> None:
    there = cluster_of(cores(16), 16, 16, 16)
    found = replicas.arrange(ClusterConfig(cpus_per_replica=8), there)
    assert names(found) == ["0", "1", "2", "0", "1", "2"]
    assert [slot.cores[0] for slot in found.slots] == [0, 0, 0, 8, 8, 8]


def test_every_gpu_of_every_node_is_used() -> None:
    found = replicas.arrange(ClusterConfig(), cluster_of(H100, 8, 8, 8, 8))
    assert (len(found.slots), found.devices, found.on_fullest_node) == (32, 32, 8)


def test_uneven_nodes_are_filled_as_far_as_each_goes() -> None:
    found = replicas.arrange(ClusterConfig(), cluster_of(H100, 4, 1, 0))
    assert names(found) == ["0", "1", "0", "0", "0"] and found.on_fullest_node == 4
    on_cores = replicas.arrange(ClusterConfig(replicas=4), cluster_of(cores(16), 2, 16))
    assert names(on_cores) == ["0", "1", "0", "1"]
    assert [len(slot.cores) for slot in on_cores.slots] == [1, 8, 1, 8] and on_cores.devices == 18


@pytest.mark.parametrize(("ways", "stages", "count"), [(3, 1, 4), (2, 3, 2), (8, 1, 2), (1, 5, 2)])
def test_what_does_not_divide_a_node_leaves_gpus_over_and_spans_no_two_nodes(
    ways: int, stages: int, count: int
) -> None:
    asked = ClusterConfig(tensor_parallel_size=ways, pipeline_parallel_size=stages)
    found = replicas.arrange(asked, cluster_of(H100, 8, 8))
    assert (len(found.slots), found.devices) == (count, count * ways * stages)


def test_more_than_there_are_slots_for_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"replicas=5: there are slots for 4 .of 2 GPUs each"):
        replicas.require(ClusterConfig(replicas=5, tensor_parallel_size=2), cluster_of(H100, 4, 4))
    with pytest.raises(ConfigError, match="no node has the 16 GPUs that one replica takes; lower cluster"):
        replicas.require(ClusterConfig(tensor_parallel_size=16), cluster_of(H100, 8, 8))


def test_what_is_started_is_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    there = cluster_of(cores(16), 16, 4)
    records = [{"NodeID": node.id, "Resources": {"CPU": float(len(node.cores))}} for node in there.nodes]
    monkeypatch.setattr(pool.cluster, "nodes", lambda: records)
    for asked in (ClusterConfig(), ClusterConfig(replicas=3), ClusterConfig(cpus_per_replica=4)):
        assert tuple(pool.cluster.slots(asked, cores(16))) == replicas.arrange(asked, there).slots


def test_what_is_free_is_what_joined_or_was_left_and_no_core_is_given_twice() -> None:
    two = ClusterConfig(replicas=2)
    one_node, another = cluster_of(cores(16), 16), cluster_of(cores(16), 16, 16)
    (begun, _) = replicas.arrange(two, one_node).slots
    assert begun.cores == tuple(range(8)), "one node's cores are shared by both"
    (joined,) = replicas.free(two, another, [begun])
    assert joined == replicas.Slot("node-1", tuple(range(16))), "the first node's second half is given to nobody twice"
    assert replicas.free(two, another, [begun, joined]) == []
    assert replicas.free(ClusterConfig(), cluster_of(H100, 2, 2), [replicas.Slot("node-0", ())]) == [
        replicas.Slot("node-1", ()),
        replicas.Slot("node-0", ()),
        replicas.Slot("node-1", ()),
    ]
    whole = ClusterConfig(tensor_parallel_size=2, replicas=3)
    assert len(replicas.free(whole, cluster_of(H100, 2, 1, 3), [])) == 2, "an engine stays on one node"


def test_a_head_without_cores_is_no_place_and_takes_no_share() -> None:
    there = cluster_of(cores(16), 0, 2)
    found = replicas.require(ClusterConfig(replicas=2), there)
    assert [(slot.node, len(slot.cores)) for slot in found.slots] == [("node-1", 1), ("node-1", 1)]


def test_on_a_cluster_a_run_begins_with_what_is_there() -> None:
    asked = ClusterConfig(address="auto", replicas=4, tensor_parallel_size=8)
    assert len(replicas.require(asked, cluster_of(H100, 8)).slots) == 1
    with pytest.raises(ConfigError, match="replicas=4: there are slots for 0"):
        replicas.require(asked, cluster_of(H100, 4))


def test_a_cluster_whose_nodes_went_is_no_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1: a scheduler tries again."""
    monkeypatch.setattr(pool.cluster, "nodes", list)
    with pytest.raises(EngineError, match=r"every node of head:6379 with room for a replica is gone"):
        pool.cluster.slots(ClusterConfig(address="head:6379"), cores(16))


# ---- what they share ----


def reserved(config: Config, here: Hardware, weights: int) -> int:
    """Bytes of KV cache that all replicas on the fullest node are started with, together."""
    found = replicas.arrange(config.cluster, here)
    sharing = found.on_fullest_node
    return sharing * kv_cache_bytes(
        LLAMA_8B, here, weights=weights, max_model_len=2048, max_num_seqs=64, replicas=sharing
    )


def test_replicas_that_follow_from_cores_share_the_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 cores with one each are 16 engines, and their caches have to fit together."""
    config = Config(cluster=ClusterConfig(cpus_per_replica=1))
    monkeypatch.setattr(settings, "read_config", lambda _: SMALL)
    here = cores(16, 24 * GIB)
    assert len(replicas.arrange(config.cluster, here).slots) == 16
    spec = settings.engine_spec(config, settings.Weights("model", GIB // 4), here)
    one = kv_cache.sequence_bytes(SMALL, 2048)
    assert one <= spec.options["kv_cache_memory_bytes"]
    assert 16 * (spec.options["kv_cache_memory_bytes"] + GIB // 4) < 24 * GIB


def test_replicas_on_other_nodes_take_nothing_of_this_nodes_memory() -> None:
    """Each of 16 GiB, one replica on each: 8 GB of INT8 weights fit, as they do alone."""
    config = Config(cluster=ClusterConfig(replicas=4))
    four = cluster_of(cores(2, 16 * GIB), 2, 2, 2, 2)
    fit = Fit(FULL, four, config, Shape(llama_8b(), LLAMA_8B))
    assert fit.fits(Scheme.int8)
    require_memory(fit.memory(Scheme.int8), Scheme.int8, four, config)
    alone = dataclasses.replace(cores(4, 16 * GIB))
    with pytest.raises(ConfigError, match=r"fewer cluster\.replicas"):
        require_memory(fit.memory(Scheme.int8), Scheme.int8, alone, config)
    assert reserved(config, four, 4 * GIB) == reserved(Config(), cores(2, 16 * GIB), 4 * GIB)
