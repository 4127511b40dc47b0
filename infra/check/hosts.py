"""Three hosts in network namespaces of this machine: a head of no cores and two workers that come, go and are cut off.

Each host has an address of its own, so Ray's nodes are as far apart as on three machines; they share a disk, as nodes
with a shared file system do. Needs root and iproute2.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chaos.drivers import Ended, Job, end, until
from infra.check.check import Check, How, Missing, said

PORT = 6379
PATIENCE_S = 120.0
SLOWLY = "+engine.options.tokens_per_s=500"  # 300 rows take a replica some 30 s
# Ray looks at its nodes every 3 seconds, and takes a node for dead after 5 looks without an answer; here it is quicker.
HEALTH = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000"}


class Hosts:
    """The namespaces, and Ray's nodes on them. Host 1 is the head."""

    def __init__(self, work: Path) -> None:
        self.name = f"bq{os.getpid() % 10_000}"
        self.work = work
        # Sockets lie in it, so its name is short.
        self.ray = Path(tempfile.mkdtemp(prefix="bq-", dir="/tmp"))
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **HEALTH}

    def up(self) -> None:
        switch = f"{self.name}sw"
        said(["ip", "netns", "add", switch])
        said(["ip", "-n", switch, "link", "add", "br0", "type", "bridge"])
        said(["ip", "-n", switch, "link", "set", "br0", "up"])
        for host in (1, 2, 3):
            space = self.space(host)
            said(["ip", "netns", "add", space])
            said(["ip", "-n", space, "link", "set", "lo", "up"])
            said(
                ["ip", "-n", switch, "link", "add", f"p{host}", "type", "veth", "peer", "name", "eth0", "netns", space]
            )
            said(["ip", "-n", switch, "link", "set", f"p{host}", "master", "br0"])
            self.connect(host)
            said(["ip", "-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0"])
            said(["ip", "-n", space, "link", "set", "eth0", "up"])

    def down(self) -> None:
        for host in list(self.nodes):
            self.kill(host)
        for space in (*map(self.space, (1, 2, 3)), f"{self.name}sw"):
            subprocess.run(["ip", "netns", "del", space], stderr=subprocess.DEVNULL)
        shutil.rmtree(self.ray, ignore_errors=True)

    def space(self, host: int) -> str:
        return f"{self.name}-{host}"

    def address(self, host: int) -> str:
        return f"10.77.0.{host}"

    def within(self, host: int) -> list[str]:
        return ["ip", "netns", "exec", self.space(host)]

    def start(self, host: int, cores: int) -> None:
        """A node of Ray's on that host; returns once it is up."""
        log = self.work / f"host-{host}-{time.monotonic_ns()}.log"
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        role = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self.ray}"]
        where = [f"--node-ip-address={self.address(host)}", f"--num-cpus={cores}", "--object-store-memory=104857600"]
        with log.open("wb") as file:
            self.nodes[host] = subprocess.Popen(
                [*self.within(host), *ray, *where, *(role if host == 1 else [f"--address={self.address(1)}:{PORT}"])],
                env={**os.environ, **self.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE_S
        while b"Ray runtime started" not in log.read_bytes():
            assert self.nodes[host].poll() is None and time.monotonic() < deadline, log.read_text()[-500:]
            time.sleep(0.1)

    def kill(self, host: int) -> None:
        """End all processes on that host at once."""
        for each in said(["ip", "netns", "pids", self.space(host)]).split():
            with suppress(ProcessLookupError):
                os.kill(int(each), signal.SIGKILL)
        self.nodes.pop(host).wait()

    def cut_off(self, host: int) -> None:
        said(["ip", "-n", f"{self.name}sw", "link", "set", f"p{host}", "down"])

    def connect(self, host: int) -> None:
        said(["ip", "-n", f"{self.name}sw", "link", "set", f"p{host}", "up"])

    def job(self, work: Path) -> Job:
        """A job whose driver runs on the head's host."""
        job = Job(work, 300)
        job.within, job.environment = self.within(1), self.environment
        return job

    def run(self, job: Job, *overrides: str) -> subprocess.Popen[str]:
        return job.start(f"cluster.address={self.address(1)}:{PORT}", "cluster.replicas=2", SLOWLY, *overrides)


@contextmanager
def three_hosts(work: Path) -> Iterator[Hosts]:
    """The hosts, with Ray's head on the first. Raises Missing without root or iproute2."""
    if os.geteuid() or not shutil.which("ip"):
        raise Missing("network namespaces take root and iproute2 (apt-get install iproute2)")
    hosts = Hosts(work)
    try:
        hosts.up()
        hosts.start(1, cores=0)
        yield hosts
    finally:
        hosts.down()


def whole(job: Job, ended: Ended, lost: int) -> None:
    """Every row is there once, so many replicas were lost, and the driver said so in lines of its own."""
    assert ended.code == 0, f"exit code {ended.code}: {ended.err[-1500:]}"
    assert job.count() == (0, 0), f"rows lost and repeated: {job.count()}"
    assert job.lost_replicas() == lost, f"{job.lost_replicas()} replicas lost, not {lost}"
    assert "Traceback" not in ended.err and "raylet" not in ended.out + ended.err, ended.err[-1500:]


def plain(hosts: Hosts, work: Path) -> None:
    job = hosts.job(work)
    whole(job, end(hosts.run(job)), lost=0)
    assert len({replica["devices"] for run in job.runs() for replica in run["replicas"]}) == 1


def killed(hosts: Hosts, work: Path) -> None:
    job = hosts.job(work)
    process = hosts.run(job)
    until(process, lambda: len(job.stamps()) >= 4)
    hosts.kill(3)
    whole(job, end(process), lost=1)


def joining(hosts: Hosts, work: Path) -> None:
    job = hosts.job(work)
    process = hosts.run(job)
    until(process, lambda: len(job.stamps()) >= 2)
    hosts.start(3, cores=1)
    ended = end(process)
    whole(job, ended, lost=0)
    assert "replica 1 starts on a node that has room for it" in ended.err, ended.err[-1500:]


def cut_off(hosts: Hosts, work: Path) -> None:
    job = hosts.job(work)
    process = hosts.run(job)
    until(process, lambda: len(job.stamps()) >= 4)
    hosts.cut_off(3)
    whole(job, end(process), lost=1)
    hosts.kill(3)
    hosts.connect(3)


def late(hosts: Hosts, work: Path) -> None:
    job = hosts.job(work)
    ended = end(hosts.run(job, "cluster.wait_s=2"))
    assert ended.code == 1 and "cluster.wait_s=2: no node with 1 CPU joined" in ended.err, ended.err[-500:]
    process = hosts.run(job)
    hosts.start(2, cores=1)
    whole(job, end(process), lost=0)


def replaced(hosts: Hosts, work: Path) -> None:
    """The only worker goes; another one comes in its place."""
    job = hosts.job(work)
    process = hosts.run(job)
    until(process, lambda: len(job.stamps()) >= 3)
    hosts.kill(2)
    hosts.start(3, cores=1)
    whole(job, end(process), lost=1)


def come_and_go(work: Path) -> str:
    """All trials on one head, in an order in which each leaves the workers that the next one needs."""
    with three_hosts(work) as hosts:
        trials: list[Callable[[Hosts, Path], None]] = [late, joining, plain, cut_off]
        for trial in trials:
            trial(hosts, work / trial.__name__)
        hosts.start(3, cores=1)
        killed(hosts, work / "killed")
        replaced(hosts, work / "replaced")
    return "300 rows each, every row once, one loss counted as one"


def real_engines(work: Path) -> str:
    """Two hosts with vLLM on a tiny random model, one of them killed in mid-run."""
    with three_hosts(work) as hosts:
        for host in (2, 3):
            hosts.start(host, cores=1)
        job = Job(work / "job", 3000)
        job.engine, job.within, job.environment = "vllm", hosts.within(1), hosts.environment
        process = job.start(f"cluster.address={hosts.address(1)}:{PORT}", "cluster.replicas=2")
        until(process, lambda: len(list(job.folder.glob("cache/logs/mine/*/replica-*.log"))) == 2 and job.stamps())
        hosts.kill(3)
        whole(job, end(process), lost=1)
    return "3,000 rows, every row once"


WHAT = "three hosts: workers late, one joins, both work, one cut off, one killed, one replaced; head of 0 CPUs"
CHECKS = [
    Check("hosts", WHAT, How.RAN, come_and_go),
    Check("vllm", "two hosts with real vLLM, one killed", How.RAN, real_engines),
]
