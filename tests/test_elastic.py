"""A cluster whose nodes come and go while a run works, and a driver inside a Ray job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos.drivers import Job, end, until
from chaos.nodes import NODE, cluster_of

IN_A_JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": {"OF": "the job"}}, "metadata": {}})}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Its head gives nobody a core, as KubeRay's."""
    with cluster_of(num_cpus=0) as made:
        yield made


def test_nodes_are_waited_for_used_when_they_join_and_replaced_when_they_go(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in IN_A_JOB.items():
        monkeypatch.setenv(name, value)
    job = Job(tmp_path / "job", 300)
    where = [f"cluster.address={cluster.address}", "cluster.replicas=2"]

    late = job.run(*where, "cluster.wait_s=1")
    assert late.code == 1 and "no node with 1 CPU joined the cluster at" in late.err, late.err
    assert "Traceback" not in late.err and not job.data.exists()

    process = job.start("+engine.options.tokens_per_s=300", *where)
    first = cluster.add_node(**NODE)
    until(process, lambda: len(job.stamps()) >= 2)
    cluster.add_node(**NODE)
    until(process, lambda: len(replica_logs(job)) == 2 and len(job.stamps()) >= 4)
    before = job.stamps()
    cluster.remove_node(first, allow_graceful=False)
    ended = end(process)

    assert ended.code == 0, ended.err
    assert job.count() == (0, 0) and before.items() <= job.stamps().items()
    assert "replica 1 starts on a node that has room for it" in ended.err
    assert job.lost_replicas() == 1, "the node was lost once"
    assert "Traceback" not in ended.err and "raylet" not in ended.out + ended.err and "\x1b[" not in ended.out


def replica_logs(job: Job) -> list[str]:
    return [path.name for path in (job.folder / "cache/logs/mine").glob("*/replica-*.log")]
