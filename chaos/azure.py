"""Trials on Azure's blob store, as far as Microsoft's emulator (azurite, from npm) goes."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos import corpus, count
from chaos.store import Bench, at_every_step, measured
from chaos.trial import Trial

VERSION = "3.35.0"
ACCOUNT = "devstoreaccount1"  # the emulator's own, public, like its key
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
CONTAINER = "chaos"


def killed_at_every_step_on_azure(work: Path, share: float) -> Trial:
    """A tenth of the trials that S3 has. Installs the emulator with npm; without npm nothing is proved."""
    promise = "killed or failing at each step, Azure's emulator"
    if shutil.which("npm") is None:
        return Trial(promise, 0, 0, 0, 0, "npm is missing")
    with _emulator(work) as env:
        return at_every_step(measured(Bench(work, corpus.make(work), f"az://{CONTAINER}", env)), share / 10, promise)


@contextmanager
def _emulator(work: Path) -> Iterator[dict[str, str]]:
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(work / "npm")]
    subprocess.run([*install, f"azurite@{VERSION}"], check=True, capture_output=True)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [str(work / "npm/node_modules/.bin/azurite-blob"), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    command += ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    with (work / "azurite.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_for(port, process)
        env = {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/{ACCOUNT}",
        }
        count.azure(env).create_dir(CONTAINER)
        yield env
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError("the Azure emulator did not come up")
