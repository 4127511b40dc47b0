"""How many tokens a text has at the least, by its length alone: what can't fit is refused before it is tokenised, which
takes some 35 bytes of memory for each of its characters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# What these do to a text leaves each of its characters in it, as itself or as others. Not so those that drop spaces or
# signs, or that can make a word of any length one token.
KEEPING_NORMALIZERS = {"ByteLevel", "Lowercase", "NFD", "NFKD", "Prepend"}
KEEPING_PRE_TOKENIZERS = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts"}
COMPOSING = {"NFC", "NFKC"}
COMPOSED = 4  # characters that a composed one is made of at most: Unicode Annex 15, expansion factors of NFD


@dataclass(frozen=True, slots=True)
class TokenLength:
    """The most characters of a text that one token stands for, beside those of which any number may be one token or
    none: spaces that an added token swallows, and `uncounted`, which the vocabulary lacks."""

    characters: int
    swallows_spaces: bool
    uncounted: str

    def exceeds(self, text: str, tokens: int) -> bool:
        """Whether the text has more tokens than that for sure."""
        most = self.characters * tokens
        if len(text) <= most:
            return False
        text = "".join(text.split()) if self.swallows_spaces else text
        return len(text) - sum(map(text.count, self.uncounted)) > most


def token_length(backend: Any) -> TokenLength | None:
    """Of a tokenizer of the `tokenizers` library; None where a token can stand for text of any length."""
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    normalizers, pre_tokenizers = list(_steps(backend.normalizer)), list(_steps(backend.pre_tokenizer))
    uncounted = _lost(backend.model, vocabulary, pre_tokenizers)
    if uncounted is None:
        return None
    factor = 1
    for step in normalizers:
        if step["type"] in COMPOSING:
            factor *= COMPOSED
        elif step["type"] == "Replace":
            replaced, content = step["pattern"].get("String"), step["content"]
            if not replaced or not content:
                return None
            factor *= -(-len(replaced) // len(content))
        elif step["type"] not in KEEPING_NORMALIZERS:
            return None
    if any(s["type"] not in KEEPING_PRE_TOKENIZERS or s.get("behavior") == "Removed" for s in pre_tokenizers):
        return None
    added = backend.get_added_tokens_decoder().values()
    swallows = any(token.lstrip or token.rstrip for token in added)
    return TokenLength(factor * max(map(len, vocabulary)), swallows, uncounted)


def _lost(model: Any, vocabulary: Mapping[str, int], pre_tokenizers: list[dict[str, Any]]) -> str | None:
    """Characters that don't become a token of their own, or several, where the vocabulary doesn't have them; None if
    these can be any."""
    if type(model).__name__ != "BPE":
        return None
    if any(step["type"] == "ByteLevel" for step in pre_tokenizers):
        # Vocabularies lack bytes that they were never trained on: SmolLM2's most control characters. A character beyond
        # ASCII has bytes that continue it, and these they have.
        absent = [byte for byte in range(256) if _letter(byte) not in vocabulary]
        return None if any(0x80 <= byte < 0xC0 for byte in absent) else "".join(chr(b) for b in absent if b < 0x80)
    if model.byte_fallback:
        return "" if all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)) else None
    return "" if model.unk_token in vocabulary and not model.fuse_unk else None


def _letter(byte: int) -> str:
    """What stands for a byte in such a vocabulary: itself if it can be seen, else a letter from 256 on, in order."""
    return chr(byte) if _seen(byte) else chr(256 + sum(not _seen(other) for other in range(byte)))


def _seen(byte: int) -> bool:
    return 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE


def _steps(component: Any) -> Iterator[dict[str, Any]]:
    """A normalizer's or a pre-tokenizer's steps, sequences opened, as they are stored."""
    if component is not None:
        yield from _flat(json.loads(component.__getstate__()))


def _flat(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if step["type"] != "Sequence":
        yield step
        return
    for inner in step.get("normalizers") or step.get("pretokenizers") or ():
        yield from _flat(inner)
