"""Stands in for Kubernetes where there is none: answers as its API server does, and runs what a pod would.

Pods and RayJobs that are created are kept; the command of a pod's first container, or a RayJob's entrypoint, is run as
a process of this machine, and its exit code is what they end in. Nothing else of Kubernetes or KubeRay is in here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Document = dict[str, Any]
STARTED = "2026-01-01T00:00:00Z"


class Cluster:
    """What has been created, by kind and name. `env` is what every process gets."""

    def __init__(self, work: Path, env: Mapping[str, str]) -> None:
        self.work = work
        self.env = {**env, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.made: dict[tuple[str, str], Document] = {}
        self.processes: dict[tuple[str, str], subprocess.Popen[bytes]] = {}

    def create(self, kind: str, document: Document) -> Document:
        key = kind, document["metadata"]["name"]
        spec, env = document["spec"], dict(self.env)
        if kind == "pods":
            container = spec["containers"][0]
            env |= {each["name"]: each["value"] for each in container.get("env") or [] if "value" in each} | self.env
            command = [*container["command"], *container["args"]]
        else:  # the submitter's shell reads it, and `ray job submit` hands the words to a shell on the head
            words = shlex.split(spec["entrypoint"])
            command = ["/bin/sh", "-c", subprocess.list2cmdline(words)]
        with self.log(key).open("wb") as log:
            self.processes[key] = subprocess.Popen(command, cwd=self.work, env=env, stdout=log, stderr=log)
        self.made[key] = document
        return self.seen(key)

    def log(self, key: tuple[str, str]) -> Path:
        return self.work / f"{key[0]}-{key[1]}.log"

    def seen(self, key: tuple[str, str]) -> Document:
        """A document with its status as it is now."""
        code = self.processes[key].poll()
        code = 128 - code if code is not None and code < 0 else code
        return {**self.made[key], "status": (_pod if key[0] == "pods" else _ray_job)(self.made[key], code)}

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


def _pod(pod: Document, code: int | None) -> Document:
    state = {"running": {"startedAt": STARTED}} if code is None else {"terminated": {"exitCode": code}}
    status = {"name": pod["spec"]["containers"][0]["name"], "state": state, "ready": code is None}
    status |= {"image": "none", "imageID": "", "restartCount": 0}
    phase = "Running" if code is None else "Failed" if code else "Succeeded"
    return {"phase": phase, "startTime": STARTED, "containerStatuses": [status]}


def _ray_job(_: Document, code: int | None) -> Document:
    if code is None:
        return {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
    if code == 0:
        return {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
    message = f"Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):\n"
    return {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": message}


def _selected(document: Document, selector: str) -> bool:
    labels = document["metadata"].get("labels", {})
    for term in filter(None, selector.split(",")):
        name, wanted, value = re.fullmatch(r"!?([^!=]+)(!?=?)(.*)", term).groups()  # type: ignore[union-attr]
        if term[0] == "!":
            held = name not in labels
        else:
            held = (labels.get(name) == value) is (wanted == "=")
        if not held:
            return False
    return True


class _Handler(BaseHTTPRequestHandler):
    cluster: Cluster

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: Document | bytes, status: int = 200) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(body, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do(self) -> None:
        url = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        found = re.fullmatch(r".*/namespaces/[\w-]+/(\w+)(?:/([\w.-]+))?(/log)?", url.path)
        kind, name, log = found.groups() if found else ("", "", "")
        key = kind, name or ""
        if kind not in ("pods", "rayjobs"):
            self.answer({"kind": "List", "metadata": {}, "items": []})
        elif self.command == "POST":
            self.answer(self.cluster.create(kind, body), 201)
        elif not name:
            items = [self.cluster.seen(key) for key in list(self.cluster.made) if key[0] == kind]
            items = [each for each in items if _selected(each, asked.get("labelSelector", ""))]
            self.answer({"kind": "PodList", "metadata": {}, "items": items})
        elif key not in self.cluster.made:
            self.answer({"kind": "Status", "status": "Failure", "code": 404, "reason": "NotFound"}, 404)
        elif log:
            self.cluster.processes[key].wait()
            lines = self.cluster.log(key).read_text().splitlines()
            self.answer("".join(f"{STARTED} {line}\n" for line in lines).encode())
        elif self.command == "DELETE":
            self.cluster.processes[key].terminate()
            self.answer(self.cluster.seen(key))
        else:
            self.cluster.made[key]["metadata"].setdefault("labels", {}).update(
                body.get("metadata", {}).get("labels", {})
            )
            self.answer(self.cluster.seen(key))

    do_GET = do_POST = do_PATCH = do_DELETE = do


@contextmanager
def cluster(work: Path, env: Mapping[str, str]) -> Iterator[tuple[Cluster, Document]]:
    """A cluster on loopback, and a kubeconfig for it, until the block ends."""
    made = Cluster(work, env)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"cluster": made}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "default"}}],
        "current-context": "here",
    }
    try:
        yield made, kubeconfig
    finally:
        server.shutdown()
        made.close()
