"""What a pod's container does, as a process of this machine: its command, its environment, its ConfigMap."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchq.machine.words import last_line


def mount(data: dict[str, str], folder: Path) -> None:
    """A ConfigMap's files as the kubelet lays them out: links to links, so that all change at once."""
    version = folder / "..2026_01_01"
    version.mkdir(parents=True)
    (folder / "..data").symlink_to(version.name)
    for name, text in data.items():
        (version / name).write_text(text)
        (folder / name).symlink_to(f"..data/{name}")


def in_pod(container: dict[str, Any], work: Path, more: Mapping[str, str]) -> tuple[int, str]:
    """Run a container's command as a process with the container's environment and no other: exit code and last line."""
    env = {each["name"]: each["value"] for each in container["env"]} | dict(more)
    assert env["BATCHQ_CONF"] == "/etc/batchq"
    assert {"name": "job", "mountPath": "/etc/batchq/job", "readOnly": True} in container["volumeMounts"]
    env |= {"BATCHQ_CONF": f"{work}/conf", "HOME": f"{work}/cache", "BATCHQ_CACHE": f"{work}/cache"}
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def expanded(text: str) -> str:  # as Kubernetes does: $(NAME) of a name that it knows; $$ is $
        known = {f"$({name})": value for name, value in env.items()} | {"$$": "$"}
        return re.sub(r"\$\$|\$\([^)]*\)", lambda found: known.get(found[0], found[0]), text)

    command = [expanded(each) for each in (*container["command"], *container["args"])]
    done = subprocess.run(command, cwd=work, env=env, timeout=300, capture_output=True, text=True)
    return done.returncode, last_line(done.stdout + done.stderr)
