"""infra/airflow's DAGs for Kubernetes: Airflow's operators and client make pods and RayJobs and read how they end.

There is no Kubernetes here: an API server that apiserver.py stands in for keeps what is made, and runs its commands.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from infra.check import dates, kubernetes
from infra.check.airflow import airflow, dags_test, ended, home, wait_for
from infra.check.apiserver import Cluster, cluster
from infra.check.check import Check, How, said


@dataclass
class Night:
    """An Airflow, a cluster, and a DAG that labels a folder's dates in it."""

    dag: str
    work: Path
    cluster: Cluster
    env: dict[str, str]

    def give(self, date: str) -> None:
        folder = self.work / f"in/ds={date}"
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_bytes(dates.lines(date))

    def labelling(self) -> list[psutil.Process]:
        """The batchq that runs in a pod, once there is one."""
        below = psutil.Process(os.getpid()).children(recursive=True)
        return [each for each in below if "job=tickets" in each.cmdline() and each.cmdline()[0].endswith("python")]

    def run(self, date: str, code: int = 0, **variables: str) -> str:
        return ended(dags_test(self.dag, date, {**self.env, **variables}), code)

    def killed(self, date: str) -> str:
        """A run whose batchq is killed once some of the date is committed; every row has to come all the same."""
        self.give(date)
        output = self.work / f"out/ds={date}"
        process = dags_test(self.dag, date, self.env)
        wait_for(process, lambda: len(list((output / "data").glob("*.parquet"))) >= 3)
        (victim,) = self.labelling()
        victim.send_signal(signal.SIGKILL)
        out = ended(process)
        assert "batchq ended in exit code 137: it was killed; another try goes on" in out
        dates.require_once(date, str(output))
        return out


@contextmanager
def night(dag: str, folder: Path, work: Path) -> Iterator[Night]:
    """`folder` is the kustomization that the pods are made of."""
    dates.make_job(work)
    (work / "manifest.yaml").write_text(yaml.safe_dump_all(kubernetes.built(folder)))
    env = {"BATCHQ_CONF": f"{work}/conf", "BATCHQ_CACHE": f"{work}/cache", "HOME": str(work)}
    with cluster(work, env) as (made, kubeconfig):
        connection = {
            "conn_type": "kubernetes",
            "extra": {"kube_config": json.dumps(kubeconfig), "namespace": "default"},
        }
        settings = {
            "manifest": f"{work}/manifest.yaml",
            "job": "tickets",
            "input": f"{work}/in/ds=%Y-%m-%d",
            "output": f"{work}/out/ds=%Y-%m-%d",
            "options": dates.SLOW,
        }
        variables = {f"AIRFLOW_VAR_{dag}_{name}".upper(): value for name, value in settings.items()}
        env = {**home(work), **variables, "AIRFLOW_CONN_KUBERNETES_DEFAULT": json.dumps(connection)}
        said([airflow(), "db", "migrate"], env=env)
        yield Night(dag, work, made, env)


def pods(work: Path) -> str:
    """The CronJob's pod: killed and made again; not made again after exit code 2; not made without input."""
    with night("batchq_pod", kubernetes.HERE / "cronjob/base", work) as run:
        run.killed("2026-11-21")
        made = {kind for kind, _ in run.cluster.made}
        label = [pod for (_, name), pod in run.cluster.made.items() if name.startswith("label")]
        assert made == {"pods"} and len(label) == 2
        (container,) = label[0]["spec"]["containers"]
        assert container["image"] == "batchq-cuda" and container["resources"]["limits"]["nvidia.com/gpu"] == "1"

        run.give("2026-11-22")
        out = run.run("2026-11-22", code=1, AIRFLOW_VAR_BATCHQ_POD_OPTIONS="engine=none")
        assert "batchq ended in exit code 2: bad configuration or input" in out and "another try" not in out
        assert sum(name.startswith("label") for _, name in run.cluster.made) == 3

        assert "there is nothing to label yet" in run.run("2026-11-23")
        assert sum(name.startswith("label") for _, name in run.cluster.made) == 3
    return f"{dates.ROWS} rows, each once; 137 tried again, 2 not, a date without input skipped"


def ray_jobs(work: Path) -> str:
    """A RayJob whose entrypoint is killed: another RayJob does the rest."""
    with night("batchq_rayjob", kubernetes.HERE / "raycronjob/base", work) as run:
        run.killed("2026-11-21")
        names = sorted(name for kind, name in run.cluster.made if kind == "rayjobs")
        assert names == ["batchq-rayjob-20261121-1", "batchq-rayjob-20261121-2"]
        made = {**run.cluster.made["rayjobs", names[0]]}
        assert not kubernetes.errors(made), kubernetes.errors(made)
    return f"{dates.ROWS} rows, each once; {len(names)} RayJobs, valid as KubeRay's"


STAND_IN = "the API server is a stand-in that runs their commands"
CHECKS = [
    Check("airflow", f"pods of the CronJob; {STAND_IN}", How.RAN, pods),
    Check("airflow", f"RayJobs of the RayCronJob; {STAND_IN}", How.RAN, ray_jobs),
]
