"""batchq in a cluster's own pods: operators that make them of a manifest, and read the exit code.

The manifest is what `kubectl kustomize` makes of your folder (docs/kubernetes.md), with a CronJob, RayJob or
RayCronJob in it. The pods are made of that: its image, devices, account, volumes and secrets; the command is the DAG's.
Nothing of it is applied from here: what else it holds, such as the ConfigMap with the job, has to be there already.
"""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import Any

import yaml
from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from batchq_command import Command, judge
from kubernetes.client import V1Pod, V1ResourceRequirements
from kubernetes.client.exceptions import ApiException

GRACE_S = 60  # batchq ends within cluster.grace_seconds (25) of a SIGTERM
RAY_JOBS = {"group": "ray.io", "version": "v1", "plural": "rayjobs"}
POLL_S = 5
SMALL = V1ResourceRequirements(requests={"cpu": "100m", "memory": "512Mi"}, limits={"memory": "1Gi"})
KINDS = ("CronJob", "RayJob", "RayCronJob")


def read_manifest(path: str) -> tuple[dict[str, Any], str | None]:
    """What runs batchq in a manifest: a CronJob's Job, or a RayJob; and its namespace, None if it names none."""
    found = [each for each in yaml.safe_load_all(Path(path).read_text()) if each and each["kind"] in KINDS]
    if len(found) != 1:
        raise AirflowFailException(f"{path}: it has to have one of {', '.join(KINDS)}, and has {len(found)}")
    (document,) = found
    job = document["spec"].get("jobTemplate", document["spec"])  # a RayCronJob's template is a spec at once
    return job.get("spec", job), document["metadata"].get("namespace")


class BatchqPodOperator(KubernetesPodOperator):
    """A pod that looks for input, or labels it. Of a RayJob it is made as Ray's head is."""

    def __init__(self, *, command: Command, look: bool = False, **options: Any) -> None:
        resources = SMALL if look else None
        super().__init__(cmds=["python"], container_resources=resources, termination_grace_period=GRACE_S, **options)
        self.command, self.looks = command, look

    def execute(self, context: Any) -> Any:
        job, self.namespace = read_manifest(self.command.setting("manifest"))
        template = job["rayClusterSpec"]["headGroupSpec"]["template"] if "rayClusterSpec" in job else job["template"]
        self.pod_template_dict = {"apiVersion": "v1", "kind": "Pod", "metadata": {}, **template}
        self.base_container_name = template["spec"]["containers"][0]["name"]
        date = context["logical_date"]
        self.arguments = self.command.look(date) if self.looks else self.command.label(date)
        return super().execute(context)

    def cleanup(self, pod: V1Pod, remote_pod: V1Pod | None, *more: Any, **named: Any) -> None:
        try:
            super().cleanup(pod, remote_pod, *more, **named)
        except AirflowException:
            for container in (remote_pod and remote_pod.status.container_statuses) or []:
                if container.name == self.base_container_name and container.state.terminated:
                    judge(container.state.terminated.exit_code)
            raise  # evicted or deleted: another try


class BatchqRayJobOperator(BaseOperator):
    """A RayJob for each try: a cluster of its own, in which batchq goes on where the try before it ended."""

    def __init__(self, *, command: Command, **options: Any) -> None:
        super().__init__(**options)
        self.command = command
        self.running: tuple[str, str | None] | None = None  # name and namespace

    def execute(self, context: Any) -> None:
        spec, namespace = read_manifest(self.command.setting("manifest"))
        spec["entrypoint"] = shlex.join(["python", *self.command.label(context["logical_date"])])
        spec["backoffLimit"] = 0  # Airflow tries again, since it knows the exit code
        name = f"{self.dag_id}-{context['ds_nodash']}-{context['ti'].try_number}".replace("_", "-")
        body = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name}, "spec": spec}
        self.running = name, namespace
        KubernetesHook().create_custom_object(**RAY_JOBS, body=body, namespace=namespace)
        status: dict[str, Any] = {}
        while status.get("jobDeploymentStatus") not in ("Complete", "Failed"):
            time.sleep(POLL_S)
            status = KubernetesHook().get_custom_object(**RAY_JOBS, name=name, namespace=namespace).get("status", {})
        self.log.info("RayJob %s: %s", name, status)
        if status["jobDeploymentStatus"] == "Failed" or status.get("jobStatus") == "FAILED":
            said = re.search(r"failed with exit code (-?\d+)", status.get("message", ""))  # Ray's words
            judge(int(said[1]) if said else 1)

    def on_kill(self) -> None:
        if self.running is not None:
            name, namespace = self.running
            try:
                KubernetesHook().delete_custom_object(**RAY_JOBS, name=name, namespace=namespace)
            except ApiException as error:
                self.log.warning("RayJob %s isn't deleted: %s", name, error.reason)
