"""Commands that can't do what they are asked, and machines that don't let them: one line, an exit code, no traceback.

Every case is a line of CASES. Each is run twice: as a user without name and home who can only read, cache included, on
streams in ASCII; and where nothing can be printed at all, which changes no exit code but that of verbs that only print.
"""

# ruff: noqa: E501 - a table of cases, one a line

from __future__ import annotations

import http.server
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from batchq.cli import VERBS
from tests.commands import Command, Done, Server, commands
from tests.helpers import LABELS, rows_of, write_jsonl
from tests.tiny import make_tiny_model

LONG = "x" * 300
S3 = "s3://bucket/folder"


@dataclass(frozen=True)
class Case:
    """`arguments`, parted by spaces, of a job in {here}; `line` is in what it prints. `environment`: more of it, None
    for less; `store`: the code that an S3 store answers everything with; `files` and `remove` as in Command."""

    name: str
    arguments: str
    code: int
    line: str
    environment: dict[str, str | None] = field(default_factory=dict)
    store: str = ""
    files: int | None = None
    remove: bool = False


CASES = [
    # what only reads works
    Case("plan", "plan job=mine", 0, "plan of mine"),
    Case("plan without a job", "plan", 0, "Llama"),
    Case("doctor", "doctor", 0, "can't be written: what is in it is used"),
    Case("doctor of a job", "doctor job=mine", 1, "FAIL output: {here}/out"),
    Case("help", "--help", 0, "exit codes"),
    Case("the configuration", "job=mine --cfg job", 0, "max_model_len: 256"),
    Case("a sweep", "plan job=mine -m input.limit=1,2", 0, "plan of mine"),
    Case("status of nothing", "status job=mine", 1, "{here}/out: no run has been planned there yet"),
    Case("verify of nothing", "verify job=mine", 1, "no run has been planned there yet"),
    Case("clean of nothing", "clean job=mine", 1, "no run has been planned there yet"),
    Case("report of nothing", "report job=mine", 1, "no run has been planned there yet"),
    Case("report of an empty folder", "report {here}/model", 1, "{here}/model"),
    # what writes says where it can't
    Case("an output that can't be written", "job=mine", 1, "{here}/out/meta/lease/0001.json: permission denied"),
    Case("a cache that can't be written", "quantize job=mine quantization.scheme=int8_rtn", 2, "set BATCHQ_CACHE to a folder that can be written"),
    Case("checkpoints that can't be written", "quantize job=mine quantization.scheme=int8_rtn quantization.cache={here}/c", 2, "{here}/c: Permission denied; set quantization.cache to"),
    # no home, no cache
    Case("neither home nor cache", "plan job=mine", 2, "set BATCHQ_CACHE to a folder, or HOME", {"BATCHQ_CACHE": None}),
    Case("neither home nor cache, in a sweep", "plan job=mine -m input.limit=1,2", 2, "set BATCHQ_CACHE to a folder, or HOME", {"BATCHQ_CACHE": None}),
    Case("doctor without home or cache", "doctor", 1, "FAIL cache: no home folder is known", {"BATCHQ_CACHE": None}),
    Case("a cache in a store", "plan job=mine", 2, "BATCHQ_CACHE=s3://a/b: a folder on this machine", {"BATCHQ_CACHE": "s3://a/b"}),
    Case("a cache that is a file", "quantize job=mine quantization.scheme=int8_rtn", 2, "Not a directory; set BATCHQ_CACHE", {"BATCHQ_CACHE": "/etc/hostname"}),
    Case("an input at home", "plan job=mine input.path=\"~/rows.jsonl\"", 2, "~/rows.jsonl: no home folder is known; set HOME"),
    # names
    Case("a long input", f"plan job=mine input.path={LONG}", 2, "File name too long"),
    Case("a long output", f"plan job=mine output.path={LONG}", 2, "File name too long"),
    Case("a long model", f"plan job=mine model.path=/{LONG}", 2, "no such folder"),
    Case("a long cache", "plan job=mine", 0, "plan of mine", {"BATCHQ_CACHE": f"/tmp/{LONG}"}),
    Case("a long name of a job", f"plan job=mine job.name={LONG}", 0, "plan of xxx"),
    Case("a job's name with a path", "plan job=mine job.name=../../x", 0, "plan of ../../x"),
    # groups and fields of another type
    Case("a group of null", "plan job=mine quantization=null", 2, "quantization=null: no such quantization; choices are auto"),
    # what was meant
    Case("a flag for a field", "plan job=mine --input.limit=1", 2, "a field is set without dashes: input.limit=1"),
    Case("a list cut at a blank", "plan job=mine task.labels=[a, b]", 2, "a shell cuts at blanks; put quotes around all of it: 'task.labels=[a, b]'"),
    Case("a job's file", "plan job={here}/conf/job/mine.yaml", 2, "say job=mine: a name in conf/job, without a path and .yaml"),
    Case("another tool's scheme", "plan job=mine input.path=s3a://bucket/x.csv", 2, "s3a://: write s3://"),
    Case("a file of nearly that name", "plan job=mine input.path={here}/row.jsonl", 2, "did you mean rows.jsonl?"),
    Case("a file of another format", "plan job=mine input.path={here}/rows.jsonl input.format=parquet", 2, "{here}/rows.jsonl: is damaged, or not parquet"),
    Case("a dialect of other files", "plan job=mine input.csv.delimiter=tab", 2, "input.csv.delimiter: goes with CSV files; rows.jsonl is jsonl"),
    Case("no bucket", f"plan job=mine input.path={S3}/*.jsonl", 2, "no such bucket", store="NoSuchBucket"),
    # GPUs
    Case("a part of a GPU", "plan job=mine", 2, "CUDA_VISIBLE_DEVICES=MIG-4f1: parts of a GPU (MIG) can't be used", {"CUDA_VISIBLE_DEVICES": "MIG-4f1"}),
    Case("a GPU that isn't there", "plan job=mine", 2, "CUDA_VISIBLE_DEVICES=97: 97 is no GPU of this machine", {"CUDA_VISIBLE_DEVICES": "97"}),
    Case("doctor of a GPU that isn't there", "doctor", 1, "FAIL hardware: CUDA_VISIBLE_DEVICES=97", {"CUDA_VISIBLE_DEVICES": "97"}),
    Case("no GPU", "plan job=mine", 0, "no GPU", {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}),
    # models
    Case("a newer tokenizer", "plan job=mine model.path={here}/newer", 2, "{here}/newer: no tokenizer that can be read by transformers"),
    Case("no fast tokenizer", "plan job=mine model.path={here}/slow", 2, "{here}/slow: "),
    # stores
    Case("expired credentials", f"plan job=mine input.path={S3}/*.jsonl", 1, "the credentials have expired (ExpiredToken", store="ExpiredToken"),
    Case("expired credentials, where a reply has no body", f"status job=mine output.path={S3}", 1, "the credentials have expired (ExpiredToken", store="ExpiredToken"),
    Case("a wrong clock", f"plan job=mine input.path={S3}/*.jsonl", 1, "this machine's clock is wrong", store="RequestTimeTooSkewed"),
    # the rest of the machine
    Case("a folder that was removed", "plan job=mine", 2, "the working directory was removed", remove=True),
    Case("few open files", "plan job=mine", 2, "Too many open files", files=4),
    Case("no folder for temporary files", "plan job=mine", 0, "plan of mine", {"TMPDIR": "/nowhere"}),
]  # fmt: skip


# A user id that has no name, if we may become it and let it read what Python is made of.
CAPABILITIES = int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16)
STRANGER = 12345 if os.getuid() == 0 and CAPABILITIES >> 2 & 1 else None


@pytest.fixture(scope="module")
def here() -> Iterator[Path]:
    """A project that everybody can read and nobody can write, with models in it that can't be used."""
    folder = Path(tempfile.mkdtemp(prefix="batchq-commands-"))
    model = make_tiny_model(folder / "model")
    (folder / "conf/job").mkdir(parents=True)
    (folder / "conf/job/mine.yaml").write_text(
        f"""# @package _global_
job: {{name: mine}}
task: {{prompt: "Is this {{{{ choices }}}}? {{{{ text }}}}", labels: [{", ".join(LABELS)}]}}
model: {{path: "{model}"}}
quantization: {{scheme: none}}
engine: {{kind: fake, max_model_len: 256}}
input: {{path: "{folder}/rows.jsonl"}}
output: {{path: "{folder}/out"}}
"""
    )
    write_jsonl(folder / "rows.jsonl", rows_of(3))
    newer = shutil.copytree(model, folder / "newer") / "tokenizer.json"
    newer.write_text(json.dumps({**json.loads(newer.read_text()), "model": {"type": "Next", "vocab": {}}}))
    slow = shutil.copytree(model, folder / "slow")
    (slow / "tokenizer.json").unlink()
    (slow / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    (folder / "cache").mkdir()
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def run() -> Iterator[Server]:
    with commands() as server:
        yield server


@contextmanager
def store_that_says(code: str) -> Iterator[dict[str, str]]:
    """An S3 store that answers everything with an error, as the environment that leads to it; nothing without a code."""
    if not code:
        yield {}
        return

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"<Error><Code>{code}</Code><Message>It says so.</Message></Error>".encode()
            self.send_response(400 if code == "ExpiredToken" else 403)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_PUT = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_SESSION_TOKEN": "c", "AWS_REGION": "x"}
        yield {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
        server.shutdown()


def do(run: Server, here: Path, case: Case, **streams: str) -> Done:
    with store_that_says(case.store) as store, tempfile.TemporaryDirectory() as gone:
        ours = {"PATH": os.environ["PATH"], "BATCHQ_CACHE": f"{here}/cache", "HF_HUB_OFFLINE": "1", **store}
        environment = {k: v for k, v in {**ours, **case.environment}.items() if v is not None}
        cwd = str(Path(gone, "cwd") if case.remove else here)
        if case.remove:
            os.mkdir(cwd)
        arguments = case.arguments.replace("{here}", str(here)).split()
        return run(Command(arguments, cwd, environment, **streams, uid=STRANGER, files=case.files, remove=case.remove))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_command_says_why_in_one_line(case: Case, run: Server, here: Path) -> None:
    done = do(run, here, case)
    assert "Traceback" not in done.err and "Exception ignored" not in done.err, done.err
    assert case.line.replace("{here}", str(here)) in done.out + done.err, done
    assert done.code == case.code, done
    said = [line for line in done.err.splitlines() if line.startswith("batchq: ")]
    assert not done.code or done.out or len(said) == 1 + case.arguments.count(" -m "), done


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_that_is_printed_decides_what_it_comes_to(case: Case, run: Server, here: Path) -> None:
    verb = case.arguments.split()[0]
    prints = verb.startswith("-") or "--cfg" in case.arguments or (verb in VERBS and VERBS[verb].prints)
    code = max(case.code, 1) if prints else case.code
    for stdout, stderr in (("closed", "full"), ("full", "broken"), ("broken", "closed")):
        done = do(run, here, case, stdout=stdout, stderr=stderr)
        assert (done.code, done.out, done.err) == (code, "", ""), (stdout, stderr, done)
