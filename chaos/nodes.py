"""A Ray cluster of two nodes, each with processes of its own on this machine, on loopback: a node dies, the head dies.

The driver joins it by `cluster.address`, as it would join one of several machines.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chaos.drivers import Job, Tally, end, until
from chaos.trial import Trial, times

HEAD_S = 12  # that Ray waits for its head; 60 unless said


NODE: dict[str, Any] = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20}


@contextlib.contextmanager
def cluster_of(**head: Any) -> Iterator[Any]:
    """Ray's own cluster for tests: a head, and the nodes that are added to it."""
    # Or drivers take 127.0.0.1 for the machine's outer address, where nothing listens. Ray reads it at its import.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False, **head})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Any, Any]]:
    """Two nodes of one core each, and the one that isn't the head."""
    with cluster_of() as cluster:
        yield cluster, cluster.add_node(**NODE)


def lost_nodes(work: Path, share: float) -> Trial:
    """The node of one of two replicas dies with all its processes: the other replica does the rest."""
    trials, tally = times(5, share), Tally()
    for n in range(trials):
        job = Job(work / str(n), 300)
        with two_nodes() as (cluster, node):
            slowly = "+engine.options.tokens_per_s=400"  # so that both are at work when it dies
            process = job.start(slowly, f"cluster.address={cluster.address}", "cluster.replicas=2", *job.noting())
            until(process, lambda job=job: len(job.stamps()) >= 4)  # type: ignore[misc]
            before = job.stamps()
            cluster.remove_node(node, allow_graceful=False)
            ended = end(process)
        tally.completed(job, ended)
        tally.struck(job.lost_replicas() == 1)
        tally.require(job.lost_replicas() == 1, f"{job.lost_replicas()} replicas lost")
        tally.require(before.items() <= job.stamps().items(), "a committed object changed")
    return tally.trial("a node dies", trials, "the other one did the rest; no committed object changed")


def lost_heads(work: Path, share: float) -> Trial:
    """Ray's head dies, and all nodes with it: the driver says so and ends; another one without them does the rest."""
    trials, tally, seconds = times(5, share), Tally(), [0.0]
    for n in range(trials):
        job = Job(work / str(n), 300)
        with two_nodes() as (cluster, node):
            os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = str(HEAD_S)  # noqa: SIM112, Ray names it so
            # 15 seconds of work, so that it isn't done before everything is dead.
            slowly = "+engine.options.tokens_per_s=400"
            process = job.start(slowly, f"cluster.address={cluster.address}", "cluster.replicas=2")
            until(process, lambda job=job: len(job.stamps()) >= 4)  # type: ignore[misc]
            for each in (cluster.head_node, node):
                each.kill_all_processes(check_alive=False, allow_graceful=False)
            ended = end(process)
        seconds.append(ended.seconds)
        told = ended.code == 1 and "Ray's head" in ended.err and "Traceback" not in ended.err
        tally.struck(told)
        tally.require(told, f"exit code {ended.code}: {ended.err[-600:]}")
        tally.require(ended.seconds < HEAD_S, f"{ended.seconds:.0f} s after the head's death")
        before = job.stamps()
        tally.completed(job, job.run())
        tally.require(before.items() <= job.stamps().items(), "a committed object changed")
    note = f"exit code 1 within {max(seconds):.0f} s and a line that says why; the next driver did the rest"
    return tally.trial("Ray's head dies", trials, note)


TRIALS: list[Callable[[Path, float], Trial]] = [lost_nodes, lost_heads]
