"""A model's folder: its config.json, weight files and digest, and whether it can be served."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from batchq.errors import ModelError
from batchq.machine.digests import digest_of, file_digest

# All that decides a model's answers; other files in a folder (cards, logs, pickles, code) are neither read nor hashed.
FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")

CODE = "*.py"  # a model's own, where model.trust_remote_code allows it

NOT_FILES = ("batchq.json", "consolidated*.safetensors")  # our own card; a second copy of Mistral's weights

# vLLM generates text with these; the image side of a ForConditionalGeneration is left unused.
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


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


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the language model's part, where that is a section of its own, on top."""
    return {**config, **(config.get("text_config") or {})}


def first_of(config: dict[str, Any], *names: str) -> int:
    """A figure that has gone by several names. Raises ModelError if config.json has none of them."""
    for name in names:
        if config.get(name):
            return int(config[name])
    raise ModelError(f"config.json has none of {', '.join(names)}")


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the output head is the embedding's own table."""
    return bool(text_config(config).get("tie_word_embeddings", False))


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files that make up the weights, as the index names them, or all of them.

    Raises ModelError when the index names one that is missing: a copy that was cut short.
    """
    folder = Path(path)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(p for p in folder.glob("*.safetensors") if not _excluded(p))
    named = sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    if missing := [p.name for p in named if not p.is_file()]:
        raise ModelError(f"{folder}: {len(missing)} of {len(named)} weight files are missing, {missing[0]} first")
    return named


def quantization_of(config: dict[str, Any]) -> str | None:
    """How a checkpoint says it was quantized, in its method's own name, or None."""
    section = config.get("quantization_config") or config.get("compression_config")
    if not section:
        return None
    method = str(section.get("quant_method") or "compressed-tensors")
    if method != "compressed-tensors":
        return method
    for group in (section.get("config_groups") or {}).values():
        if weights := group.get("weights"):
            kind = "int" if weights.get("type", "int") == "int" else "fp"
            return f"{method} {kind}{weights.get('num_bits', 8)}"
    return method


def content_digest(folder: str | Path) -> str:
    """sha256 over the names and contents of all files that decide a model's answers."""
    files = sorted({p for pattern in FILES for p in Path(folder).glob(pattern) if p.is_file() and not _excluded(p)})
    with ThreadPoolExecutor(4) as threads:  # hashing leaves the interpreter's lock alone
        return digest_of(list(zip((p.name for p in files), threads.map(file_digest, files), strict=True)))


def _excluded(path: Path) -> bool:
    return path.name.startswith(".") or any(path.match(pattern) for pattern in NOT_FILES)


def require_servable(folder: Path, where: str, weights: bool = True) -> None:
    """Raise ModelError if vLLM can't generate text with the model; `where` is what a person called it."""
    if weights:
        require_weights(folder, where)
    config = read_config(folder)
    kinds = config.get("architectures") or []
    if config.get("is_encoder_decoder") or not any(str(kind).endswith(GENERATES) for kind in kinds):
        raise ModelError(f"model.path={where}: {', '.join(kinds) or 'no architecture'} is no causal language model")


def require_own_code(folder: Path) -> None:
    """Raise ModelError if the model would fetch its code from another repository, where nothing is pinned."""
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
        if elsewhere := re.search(r'"([\w.-]+/[\w.-]+)--', json.dumps(settings.get("auto_map"))):
            raise ModelError(
                f"{folder / name}: its code comes from {elsewhere[1]}, which isn't pinned; copy it into the folder"
            )


def require_weights(folder: Path, where: str) -> None:
    """Raise ModelError if something that every model has is missing."""
    require_names([path.name for path in folder.iterdir()], where)
    weight_files(folder)


def require_names(names: list[str], where: str) -> None:
    """Raise ModelError if files of these names can't be a model."""
    if not names:
        raise ModelError(f"model.path={where}: nothing there")
    if "config.json" not in names:
        raise ModelError(f"model.path={where}: no config.json there, so it isn't a model's folder")
    if not any(name.endswith(".safetensors") for name in names):
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
        why = "its weights are pickled, which can run code" if pickled else "no *.safetensors there"
        raise ModelError(f"model.path={where}: {why}; batchq loads safetensors only")
