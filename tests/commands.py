"""Commands in processes forked from one that has imported batchq, each with streams, a user and limits of its own.

    with commands() as run:
        done = run(["plan", "job=mine"], cwd=folder, stdout="full", uid=12345)

What Python makes of its streams as it starts and ends is done anew in the fork. Some 0.2 s each.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORDS = ("file", "closed", "full", "broken")  # what a stream leads to


@dataclass(frozen=True)
class Command:
    """`arguments` of batchq; `environment` is all there is of it; `stdout`, `stderr`: one of WORDS; `uid`: None for
    ours; `files`: how many may be open; `remove`: the folder that it works in is removed before."""

    arguments: Sequence[str]
    cwd: str
    environment: dict[str, str] = field(default_factory=dict)
    stdout: str = "file"
    stderr: str = "file"
    encoding: str = "ascii"
    uid: int | None = None
    files: int | None = None
    remove: bool = False


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


class Server:
    """The process that forks; one command at a time."""

    def __init__(self, process: subprocess.Popen[str], scratch: Path) -> None:
        self._process, self._out, self._err = process, scratch / "out", scratch / "err"

    def __call__(self, command: Command) -> Done:
        assert self._process.stdin and self._process.stdout
        for path in (self._out, self._err):
            path.write_bytes(b"")
        self._process.stdin.write(json.dumps({**asdict(command), "files_at": [str(self._out), str(self._err)]}) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return Done(code, *(path.read_text(errors="replace") for path in (self._out, self._err)))


@contextmanager
def commands() -> Iterator[Server]:
    code = "from tests.commands import serve; serve()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    with (
        tempfile.TemporaryDirectory() as scratch,
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        yield Server(process, Path(scratch))
        assert process.stdin
        process.stdin.close()


def serve() -> None:
    """Fork for each line on standard input, and answer with the exit code."""
    import_ahead()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            become(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def import_ahead() -> None:
    import hydra
    import obstore.store
    import omegaconf
    import pyarrow.parquet
    import transformers.models.auto
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from batchq.cli import clean, doctor, plan, preview, status, verify
    from batchq.report import pages

    del hydra, obstore, omegaconf, pyarrow, transformers, AutoTokenizer, PreTrainedTokenizerFast
    del clean, doctor, plan, preview, status, verify, pages


def become_user(uid: int) -> None:
    """Be a user that can read everything, since Python may lie where root alone can, and write what that user may."""
    libc, kept = ctypes.CDLL(None, use_errno=True), 1 << 2  # CAP_DAC_READ_SEARCH
    libc.prctl(8, 1)  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    header = struct.pack("Ii", 0x20080522, 0)  # version 3, of this process
    if libc.capset(header, struct.pack("IIIIII", kept, kept, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset")


def become(asked: dict[str, Any]) -> None:
    """Be that command's process, to its end."""
    from batchq.cli import main

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    streams: list[Any] = [open(os.devnull)]  # noqa: SIM115 open until it ends
    for number, where, path in zip((1, 2), (asked["stdout"], asked["stderr"]), asked["files_at"], strict=True):
        if where == "closed":
            os.close(number)
            streams.append(None)
            continue
        if where == "broken":
            reader, descriptor = os.pipe()
            os.close(reader)
        else:
            descriptor = os.open("/dev/full" if where == "full" else path, os.O_WRONLY)
        os.dup2(descriptor, number)
        os.close(descriptor)
        errors = "strict" if number == 1 else "backslashreplace"
        streams.append(open(number, "w", encoding=asked["encoding"], errors=errors, closefd=False))  # noqa: SIM115
    sys.stdin, sys.stdout, sys.stderr = streams
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = streams  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    if asked["remove"]:
        os.rmdir(asked["cwd"])
    if asked["uid"] is not None:
        become_user(asked["uid"])
    if asked["files"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (asked["files"], asked["files"]))
    try:
        code = main(asked["arguments"])
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in streams[1:]:
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            code = 120  # Python's own for what it can't write in the end
    os._exit(code)  # or Python would look at all modules once more, for a second
