"""batchq as a Ray job, as KubeRay's RayJob submits it: to its end, stopped, and resumed."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from chaos.drivers import Job
from infra.check.check import Check, How, Missing, said

PATIENCE_S = 180.0
GRACE = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "35"}}  # Ray's own 3 s are shorter than cluster.grace_seconds
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class Head:
    """A Ray head on loopback with two cores and the job API at `address`; drivers join it at `gcs`."""

    def __init__(self, address: str, gcs: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.address, self.gcs, self.folder, self.environment = address, gcs, folder, environment

    def ray(self, *words: str) -> str:
        return said([_ray(), "job", *words], env={**self.environment, "RAY_ADDRESS": self.address})

    def submit(self, job: Job, *overrides: str) -> str:
        """Submit the job's folder with its conf/, as a person would; the submission's id."""
        command = [sys.executable, "-m", "batchq", "job=mine", "engine=fake", "cluster=ray", "cluster.replicas=2"]
        where = [f"output.path={job.folder / 'out'}", *overrides]
        options = ["--no-wait", f"--working-dir={job.folder}", f"--runtime-env-json={json.dumps(GRACE)}"]
        told = self.ray("submit", *options, "--", *command, *where)
        found = re.search(r"raysubmit_\w+", told)
        assert found, told[-500:]
        return str(found[0])

    def state(self, submission: str) -> str:
        told = self.ray("status", submission)
        found = re.findall(r"PENDING|RUNNING|SUCCEEDED|FAILED|STOPPED", told.upper())
        assert found, told[-500:]
        return str(found[-1])

    def ended(self, submission: str) -> str:
        """The state it ends in."""
        deadline = time.monotonic() + PATIENCE_S
        while (state := self.state(submission)) not in ENDED:
            assert time.monotonic() < deadline, self.ray("logs", submission)[-1500:]
        return state


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def head(work: Path, *more: str, **settings: str) -> Iterator[Head]:
    """`more` goes to `ray start`, `settings` to its environment and its drivers'.

    Raises Missing where Ray came without ray[default]."""
    if find_spec("aiohttp_cors") is None:  # of its dashboard
        raise Missing("ray[default]: install from requirements/")
    port, dashboard = free_ports(2)
    folder = Path(tempfile.mkdtemp(prefix="bq-", dir="/tmp"))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "BATCHQ_CACHE": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        **settings,
    }
    options = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    options += [
        *more,
        "--node-ip-address=127.0.0.1",
        "--num-cpus=2",
        "--object-store-memory=104857600",
        f"--temp-dir={folder}",
    ]
    log = work / "head.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [_ray(), "start", "--block", "--disable-usage-stats", *options],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while b"Ray runtime started" not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-800:]
            time.sleep(0.1)
        yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", folder, environment)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def submitted(work: Path) -> str:
    """To the end in one, and another one stopped in mid-run and submitted again."""
    with head(work) as cluster:
        done = Job(work / "done", 300)
        first = cluster.submit(done)
        assert cluster.ended(first) == "SUCCEEDED", cluster.ray("logs", first)[-2000:]
        assert done.count() == (0, 0)

        job = Job(work / "stopped", 300)
        stopped = cluster.submit(job, "+engine.options.tokens_per_s=800", *job.noting())
        deadline = time.monotonic() + PATIENCE_S
        while len(job.stamps()) < 2:
            assert time.monotonic() < deadline, cluster.ray("logs", stopped)[-1500:]
            time.sleep(0.1)
        cluster.ray("stop", stopped)
        assert cluster.ended(stopped) == "STOPPED"
        told = cluster.ray("logs", stopped)
        assert "stopped before the end; the same command goes on from here" in told, told[-1500:]
        before, saved = job.stamps(), job.saved()
        assert saved < job.rows, "it was done before it was stopped"
        again = cluster.submit(job, *job.noting())
        assert cluster.ended(again) == "SUCCEEDED", cluster.ray("logs", again)[-2000:]
        assert job.count() == (0, 0) and before.items() <= job.stamps().items()
        assert (asked := job.notes()) == job.rows, f"{asked} rows were asked"
    return f"300 rows each; stopped with {saved} saved, and every row was asked once"


CHECKS = [Check("ray-jobs", "ray job submit, stop, and a resume", How.RAN, submitted)]
