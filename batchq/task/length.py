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
    """The most characters of a text that one token stands for, beside spaces that an added token swallows."""

    characters: int
    swallows_spaces: bool

    def exceeds(self, text: str, tokens: int) -> bool:
        """Whether the text has more tokens than that for sure."""
        most = self.characters * tokens
        return len(text) > most and (not self.swallows_spaces or sum(map(len, text.split())) > most)


def token_length(backend: Any) -> TokenLength | None:
    """Of a tokenizer of the `tokenizers` library; None where a token can stand for text of any length."""
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    normalizers, pre_tokenizers = list(_steps(backend.normalizer)), list(_steps(backend.pre_tokenizer))
    if not _keeps_unknown(backend.model, vocabulary, pre_tokenizers):
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
    return TokenLength(factor * max(map(len, vocabulary)), swallows)


def _keeps_unknown(model: Any, vocabulary: Mapping[str, int], pre_tokenizers: list[dict[str, Any]]) -> bool:
    """Whether each character that isn't in the vocabulary becomes a token of its own, or several."""
    if type(model).__name__ != "BPE":
        return False
    if any(step["type"] == "ByteLevel" for step in pre_tokenizers):
        from tokenizers.pre_tokenizers import ByteLevel

        return all(letter in vocabulary for letter in ByteLevel.alphabet())
    if model.byte_fallback:
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return model.unk_token in vocabulary and not model.fuse_unk


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
