"""A model's tokenizer and its chat template, without what transformers imports to open one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchq.errors import ModelError
from batchq.machine.cache import cache_dir
from batchq.machine.digests import digest_of, file_digest
from batchq.machine.words import last_line
from batchq.model import export

if TYPE_CHECKING:
    import tokenizers

# All that transformers reads to open a tokenizer; a weight file is none of it.
FILES = ("*.json", "*.jinja", "*/*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
LIBRARIES = ("transformers", "tokenizers")


@dataclass
class Tokenizer:
    """What is needed of a tokenizer of transformers, under the names that it has there."""

    backend_tokenizer: tokenizers.Tokenizer
    chat_template: Any  # Jinja, or several by name
    special_tokens_map: dict[str, Any]
    unk_token_id: int | None

    @property
    def added_tokens_decoder(self) -> dict[int, tokenizers.AddedToken]:
        added: dict[int, tokenizers.AddedToken] = self.backend_tokenizer.get_added_tokens_decoder()
        return added

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool, **arguments: Any
    ) -> str:
        """The text of a conversation. Raises what the template raises, and ValueError where no template is there."""
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize, "texts alone"
        template = self.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if template is None:
            raise ValueError("there is no chat template, or none of several is the default")
        given = {**self.special_tokens_map, **arguments}
        rendered: Any = render_jinja_template(
            [conversation], chat_template=template, add_generation_prompt=add_generation_prompt, **given
        )
        texts, _ = rendered  # the second: where the assistant speaks
        return str(texts[0])


def open_tokenizer(path: str | Path, trusted: bool = False) -> Any:
    """The folder's tokenizer: a Tokenizer, or transformers' own if it is `trusted`, since only then its code runs.

    Raises ModelError when there is none that transformers can read, or it isn't a fast one, of the tokenizers library.
    """
    if trusted:
        try:
            tokenizer = export.opened(str(path), trusted)
        except Exception as error:
            raise _unreadable(path, str(error) or type(error).__name__) from error
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise _slow(path, type(tokenizer).__name__)
        return tokenizer
    return _made(_found(Path(path)))


def _found(path: Path) -> Mapping[str, Any]:
    """What `export` says of the folder's tokenizer, from the cache if it has said so before."""
    files = sorted(file for pattern in FILES for file in path.glob(pattern) if file.is_file())
    versions = [metadata.version(name) for name in LIBRARIES]
    key = digest_of([versions, [[str(file.relative_to(path)), file_digest(file)] for file in files]])
    kept = cache_dir() / "tokenizers" / f"{key}.json"
    with suppress(OSError, ValueError):  # there is none, it can't be read, or was cut short
        known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return known
    # Where torch is there anyway, a process of its own would save nothing.
    found = export.exported(str(path)) if "torch" in sys.modules else _exported_apart(path)
    if why := found.get("error"):
        raise _unreadable(path, why)
    if kind := found.get("slow"):
        raise _slow(path, kind)
    temporary = kept.with_name(f".{kept.name}.{uuid.uuid4().hex}")
    with suppress(OSError):  # a cache that can only be read
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(found), encoding="utf-8")
        temporary.rename(kept)
    return found


def _exported_apart(path: Path) -> dict[str, Any]:
    apart = {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, export.__file__, str(path)]
    ended = subprocess.run(command, env={**os.environ, **apart}, capture_output=True, text=True, encoding="utf-8")
    if ended.returncode:
        return {"error": last_line(ended.stderr) or f"exit code {ended.returncode}"}
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def _made(found: Mapping[str, Any]) -> Tokenizer:
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(found["backend"])
    return Tokenizer(backend, found["chat_template"], dict(found["special_tokens"]), found["unk_token_id"])


def _unreadable(path: str | Path, why: str) -> ModelError:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    return ModelError(f"{path}: no tokenizer that can be read by {versions} ({last_line(why)})")


def _slow(path: str | Path, kind: str) -> ModelError:
    return ModelError(f"{path}: its tokenizer, a {kind}, has no fast form; batchq needs a tokenizer.json")
