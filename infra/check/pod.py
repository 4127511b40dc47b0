"""A pod's container without Kubernetes: its command and environment, as a process or in an image's file system."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchq.machine.words import last_line
from infra.check.check import said

Container = dict[str, Any]


def mount(data: Mapping[str, str], folder: Path) -> None:
    """A ConfigMap's files as the kubelet lays them out: links to links, so that all change at once."""
    version = folder / "..2026_01_01"
    version.mkdir(parents=True)
    (folder / "..data").symlink_to(version.name)
    for name, text in data.items():
        (version / name).write_text(text)
        (folder / name).symlink_to(f"..data/{name}")


def command(container: Container, env: Mapping[str, str]) -> list[str]:
    """As Kubernetes fills it in: $(NAME) of a variable that it knows, and $$ is $."""
    known = {f"$({name})": value for name, value in env.items()} | {"$$": "$"}
    words = (*container["command"], *container["args"])
    return [re.sub(r"\$\$|\$\([^)]*\)", lambda found: known.get(found[0], found[0]), word) for word in words]


def environment(container: Container) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container["env"]}


def as_process(container: Container, work: Path, more: Mapping[str, str]) -> tuple[int, str]:
    """Run a container's command as a process with the container's environment and no other: exit code and last line."""
    env = environment(container) | dict(more)
    assert env["BATCHQ_CONF"] == "/etc/batchq"
    assert {"name": "job", "mountPath": "/etc/batchq/job", "readOnly": True} in container["volumeMounts"]
    env |= {"BATCHQ_CONF": f"{work}/conf", "HOME": f"{work}/cache", "BATCHQ_CACHE": f"{work}/cache"}
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = command(container, env)
    done = subprocess.run(words, cwd=work, env=env, timeout=300, capture_output=True, text=True)
    return done.returncode, last_line(done.stdout + done.stderr)


KUBELET = """set -e
root=$1 user=$2 folder=$3; shift 3
mount --bind "$root" "$root"
for volume in $VOLUMES; do mkdir -p "$root${volume#*=}"; done
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"; mount --rbind /sys "$root/sys"; mount --rbind /dev "$root/dev"
for volume in $VOLUMES; do
  case $volume in
    =*) mount -t tmpfs -o mode=1777 tmpfs "$root${volume#*=}";;
    *) mount --bind "${volume%%=*}" "$root${volume#*=}";;
  esac
done
ip link set lo up
exec chroot --userspec="$user" "$root" /usr/bin/env -i --chdir="$folder" "$@"
"""


def in_root(pod: Mapping[str, Any], root: Path, image: Mapping[str, Any], volumes: Mapping[str, Path]) -> str:
    """Run a pod's container on an image's file system, read-only, in namespaces of its own, with the pod's user,
    mounts and environment. A volume without a folder is memory. Gives what it prints, if it ends in 0."""
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    env = dict(each.split("=", 1) for each in image["Env"]) | environment(container)
    mounts = " ".join(f"{volumes.get(each['name'], '')}={each['mountPath']}" for each in container["volumeMounts"])
    user = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    apart = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "/bin/sh", "-c", KUBELET, "sh"]
    variables = [f"{name}={value}" for name, value in env.items()]
    words = [*apart, str(root), user, image["WorkingDir"], *variables, *command(container, env)]
    return said(words, env={**os.environ, "VOLUMES": mounts})
