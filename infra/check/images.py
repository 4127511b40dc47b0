"""infra/docker: the image for CPUs, built and run without a Docker engine: buildah, its base by mmdebstrap.

To stay small it is built from a lock without vLLM and torch, a part of cpu.txt, and labels with the fake engine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from batchq.errors import ExitCode
from infra.check.check import ROOT, TOOLS, Check, How, Missing, said
from infra.check.pod import in_root, mount
from tests.helpers import wait_for, write_jsonl
from tests.tiny import make_tiny_model

STORE = TOOLS / "images"
KUBERNETES = ROOT / "infra/kubernetes"
BASE, IMAGE = "localhost/batchq-base", "localhost/batchq-fake"
TOOLBOX = ("buildah", "mmdebstrap")
ANYBODY = "1000650000:0"  # as OpenShift gives a namespace a range of ids, in the group 0
BUILD_ONLY = ("hatchling", "editables")


def buildah(*arguments: str | Path) -> list[str]:
    """A command of buildah's on a store of its own, without overlays, which need privileges."""
    for tool in TOOLBOX:
        if shutil.which(tool) is None:
            if os.geteuid():
                raise Missing(f"{tool}; as root it would be installed")
            try:
                said(["apt-get", "install", "-y", "--no-install-recommends", *TOOLBOX])
            except AssertionError:
                raise Missing(f"{tool}: apt-get has none") from None
    store = ("--storage-driver", "vfs", "--root", f"{STORE}/root", "--runroot", f"{STORE}/run")
    return ["nice", "buildah", *store, *map(str, arguments)]


def has(image: str) -> bool:
    return subprocess.run(buildah("inspect", "--type", "image", image), capture_output=True).returncode == 0


def image_config() -> dict[str, Any]:
    return dict(json.loads(said(buildah("inspect", "--type", "image", IMAGE)))["OCIv1"]["config"])


def make_base() -> None:
    """Debian with Python, in place of the registry's python:3.11-slim-bookworm. Kept."""
    if has(BASE):
        return
    STORE.mkdir(parents=True, exist_ok=True)
    packages = "--include=python3,python3-dev,python3-venv,ca-certificates"
    said(["nice", "mmdebstrap", "--variant=minbase", packages, "bookworm", STORE / "base.tar"], timeout=900)
    container = said(buildah("from", "scratch")).split()[-1]
    said(buildah("add", container, STORE / "base.tar"))
    said(buildah("commit", "--rm", container, BASE))
    (STORE / "base.tar").unlink()


def make_lock(lock: Path) -> None:
    """The part of cpu.txt that batchq takes without an engine, and its files in wheels/ beside it. Both are kept."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = "\n".join((*project["dependencies"], "ray[default]", *BUILD_ONLY, ""))
    wheels = lock.with_name("wheels")
    made_for = asked + (ROOT / "requirements/cpu.txt").read_text()
    if (wheels / "made-for").exists() and (wheels / "made-for").read_text() == made_for:
        return
    wheels.mkdir(parents=True, exist_ok=True)
    needs = lock.with_suffix(".in")
    needs.write_text(asked)
    python = Path(sys.executable)
    compiled = 'source requirements/indexes.sh; "$UV" pip compile -q --generate-hashes --no-emit-index-url '
    compiled += f"--no-emit-find-links --python-version 3.11 -c requirements/cpu.txt {needs} -o {lock}"
    said(["bash", "-c", f"cd {ROOT}; PYTHON={python}; UV={python.with_name('uv')}; {compiled}"])
    pip: list[str | Path] = [python, "-m", "pip", "download", "-q", "-d", wheels, "--no-deps"]
    for each in (lock, ROOT / "requirements/setup.txt"):
        said([*pip, "--require-hashes", "-r", each], timeout=900)
    said([*pip, "setuptools<81", "wheel"])  # what is no wheel yet is built with these
    (wheels / "made-for").write_text(made_for)


def build(work: Path) -> str:
    make_base()
    make_lock(STORE / "fake.txt")
    listed = said(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"]).splitlines()
    for name in listed:  # a context without .venv and .infra; .dockerignore leaves out the rest
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, work / name)
    shutil.copyfile(STORE / "fake.txt", work / "requirements/fake.txt")
    settings = {"BASE": BASE, "LOCK": "fake.txt", "PIP_FIND_LINKS": "/wheels", "PIP_NO_INDEX": "1", "UV_OFFLINE": "1"}
    arguments = [word for name, value in settings.items() for word in ("--build-arg", f"{name}={value}")]
    where = ["--isolation", "chroot", "--network", "host", "-v", f"{STORE}/wheels:/wheels:ro"]
    file = work / "infra/docker/Dockerfile.cpu"
    said(
        buildah(
            "bud", "--pull-never", "--layers=false", "--force-rm", *where, *arguments, "-t", IMAGE, "-f", file, work
        ),
        timeout=1800,
    )
    said(buildah("rmi", "--prune", "--force"))  # the one that it takes the place of
    config = image_config()
    assert (config["User"], config["Entrypoint"], config["StopSignal"]) == ("10001", ["batchq"], "SIGTERM")
    assert not [each for each in config["Env"] if "PIP_" in each or "UV_" in each]
    return "Dockerfile.cpu, from a lock without vLLM; base by mmdebstrap instead of python:3.11-slim-bookworm"


# ---- what the image is for ----

MINE = """# @package _global_
job: {name: tickets}
task: {prompt: "{{ text }}", labels: [positive, negative]}
model: {path: /work/model}
quantization: {scheme: none}
gate: {enabled: false}
engine: {kind: fake, options: {tokens_per_s: 400}}
input: {path: in}
output: {path: out, rows_per_shard: 20}
"""
ROWS = 400


@contextmanager
def container() -> Iterator[str]:
    """The name of a container of the image."""
    if not has(IMAGE):
        raise Missing(f"the image {IMAGE}: the check that builds it didn't hold")
    name = said(buildah("from", "--pull-never", IMAGE)).split()[-1]
    try:
        yield name
    finally:
        said(buildah("rm", name))


def project(folder: Path) -> Path:
    """The folder, made a user's project, whose output any user may write to."""
    for name in ("conf/job", "in", "out"):
        (folder / name).mkdir(parents=True)
    (folder / "conf/job/mine.yaml").write_text(MINE)
    write_jsonl(folder / "in/rows.jsonl", [{"id": n, "text": f"row {n} of many"} for n in range(ROWS)])
    make_tiny_model(folder / "model")
    (folder / "out").chmod(0o777)
    return folder


def inside(name: str, folder: Path, line: str, user: str = "10001") -> list[str]:
    """A command that runs a shell's line in a container, with the folder as its working directory."""
    run = ["run", "--isolation", "chroot", "--user", user, "-v", f"{folder}:/work", name, "--"]
    return buildah(*run, "/bin/bash", "-c", line)


def labelled(output: Path) -> list[int]:
    """The input's ids that are in the output, by pyarrow alone."""
    ids: list[int] = pq.read_table(output / "data", columns=["id"])["id"].to_pylist()
    return sorted(ids)


def stop_and_resume(work: Path) -> str:
    folder = project(work / "project")
    with container() as name:
        line = "echo $$ > out/pid; exec batchq job=mine"
        stopped = subprocess.Popen(inside(name, folder, line), stdout=subprocess.PIPE, text=True)
        parts = folder / "out/data"
        wait_for(stopped, lambda: parts.is_dir() and len(list(parts.iterdir())) > 1, 120)
        os.kill(int((folder / "out/pid").read_text()), signal.SIGTERM)
        stopped.communicate(timeout=60)
        assert stopped.returncode == ExitCode.STOPPED, f"SIGTERM: exit code {stopped.returncode}"
        before = len(labelled(folder / "out"))
        assert 0 < before < ROWS
        said(inside(name, folder, "exec batchq job=mine"))
        assert labelled(folder / "out") == list(range(ROWS))
        said(inside(name, folder, "exec batchq verify job=mine"))
    return f"exit code 3 with {before} of {ROWS} rows, then 0 with each once"


def any_user(work: Path) -> str:
    folder = project(work / "project")
    with container() as name:
        said(inside(name, folder, "touch /cache/x && rm /cache/x && exec batchq job=mine", ANYBODY))
        assert labelled(folder / "out") == list(range(ROWS))
    return f"{ROWS} rows as {ANYBODY}"


def nightly_pod(work: Path) -> str:
    """The CronJob's pod: its command, user, mounts and environment; the job's file is a ConfigMap's."""
    cronjob = yaml.safe_load((KUBERNETES / "cronjob/base/cronjob.yaml").read_text())
    pod = cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    yesterday = f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}"
    cache, job = work / "cache", work / "job"
    project(cache)
    for folder in (cache, cache / "out"):
        folder.chmod(0o777)  # in place of the pod's fsGroup
    (cache / "in").rename(cache / f"ds={yesterday}")
    mount(
        {
            "mine.yaml": MINE.replace("/work", "/cache")
            .replace("path: in", 'path: "/cache/ds={date}"')
            .replace("path: out", "path: /cache/out")
        },
        job,
    )
    with container() as name:
        root = Path(said(buildah("mount", name)).split()[-1])
        in_root(pod, root, image_config(), {"cache": cache, "job": job})
        assert labelled(cache / "out") == list(range(ROWS))
        pod["containers"][0]["args"] = ["! touch /x"]
        in_root(pod, root, image_config(), {"cache": cache, "job": job})
    return f"as its user, root file system read-only: {ROWS} rows of ds={yesterday}"


# The head's command, both of its probes, and the submitter's command; the token is KubeRay's secret.
KUBERAY = """export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef
ulimit -n 65536  # KubeRay too goes on where the node forbids it
ray start --head --block --num-cpus=2 --memory=2000000000 --object-store-memory=209715200 --dashboard-host=0.0.0.0 \
  --metrics-export-port=8080 --dashboard-agent-listen-port=52365 > /tmp/ray.log 2>&1 &
probe() {{ python -c "import urllib.request; urllib.request.urlopen('http://localhost:$1', timeout=5)" 2> /dev/null; }}
until probe 52365/api/healthz && probe 8265/api/gcs_healthz; do sleep 1; done
ray job submit --address http://localhost:8265 --runtime-env-json {env} -- {entrypoint}
"""


def under_ray(work: Path) -> str:
    """What KubeRay runs in head and submitter, in namespaces of its own, so that all of it ends with the command."""
    job = yaml.safe_load((KUBERNETES / "rayjob/base/rayjob.yaml").read_text())["spec"]
    one = re.sub(r"(cluster\.replicas)=\d+", r"\1=1", job["entrypoint"])
    line = KUBERAY.format(env=shlex.quote(json.dumps(yaml.safe_load(job["runtimeEnvYAML"]))), entrypoint=one)
    apart = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "/bin/sh", "-c"]
    folder = project(work / "project")
    with container() as name:
        said([*apart, 'ip link set lo up; exec "$@"', "sh", *inside(name, folder, line)], timeout=600)
        assert labelled(folder / "out") == list(range(ROWS))
    return f"ray start with a token, both probes, the RayJob's own entrypoint: {ROWS} rows"


CHECKS = [
    Check("images", "Dockerfile.cpu is built", How.RAN, build),
    Check("images", "SIGTERM in mid-run, then a resume", How.RAN, stop_and_resume),
    Check("images", "a user id that nobody knows", How.RAN, any_user),
    Check("images", "the CronJob's pod", How.RAN, nightly_pod),
    Check("images", "Ray in it, as KubeRay starts it", How.RAN, under_ray),
]
