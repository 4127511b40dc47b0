"""task.length: what can't fit is told by its length alone, and never wrongly."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from batchq.task.length import _letter, token_length

WORDS = [
    "hello",
    " ",
    "\n",
    "  " * 9,
    "naïve",
    "e\u0301",
    "x" * 40,
    "中文",
    "\U0001f600",
    "<|end|>",
    "\t",
    "ſ",
    "\u1f82",
    "-" * 30,
]


def byte_level(normalizer: Any = None) -> Tokenizer:
    return _bpe(models.BPE(*_merged(pre_tokenizers.ByteLevel.alphabet())), pre_tokenizers.ByteLevel(False), normalizer)


def metaspace(normalizer: Any = None) -> Tokenizer:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary, merges = _merged([*"helox-▁", "<unk>"])
    for token in bytes_:
        vocabulary[token] = len(vocabulary)
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    return _bpe(
        model, None, normalizer or normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    )


def _merged(letters: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary with long runs of one letter in it, as real ones have."""
    runs = [
        run
        for letter in ("x", "-", "Ġ", "▁")
        if letter in letters
        for run in (letter, letter * 2, letter * 4, letter * 8)
    ]
    tokens = dict.fromkeys([*letters, *runs])
    merges = [(run, run) for run in runs if len(run) < 8]
    return {token: number for number, token in enumerate(tokens)}, merges


def _bpe(model: models.BPE, pre_tokenizer: Any, normalizer: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def without_control() -> Tokenizer:
    """As SmolLM2's: bytes that it wasn't trained on are one unknown token, however many come."""
    letters = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter not in "ĀāĂ\u00c0\u00f5"]
    model = models.BPE(*_merged([*letters, "<|unk|>"]), unk_token="<|unk|>", fuse_unk=True)
    return _bpe(model, pre_tokenizers.ByteLevel(False), None)


def test_a_bytes_letter_is_that_of_the_library() -> None:
    assert sorted(map(_letter, range(256))) == sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str("a \0\n\x7fé")[0][0]
    assert spelled == "".join(map(_letter, "a \0\n\x7fé".encode()))


def swallowing() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True)])
    return tokenizer


@pytest.mark.parametrize(
    "make",
    [
        byte_level,
        lambda: byte_level(normalizers.NFC()),
        lambda: byte_level(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
        metaspace,
        lambda: metaspace(normalizers.Replace("hello", "h")),
        swallowing,
        without_control,
    ],
    ids=[
        "bytes",
        "composed",
        "compatible",
        "metaspace",
        "a shorter word",
        "a token that swallows spaces",
        "no control",
    ],
)
def test_what_is_called_too_long_is_and_what_is_far_too_long_is_called_so(make: Callable[[], Tokenizer]) -> None:
    tokenizer, luck = make(), random.Random(0)
    bound = token_length(tokenizer)
    assert bound is not None
    texts = ["".join(luck.choices(WORDS, k=luck.randint(1, 60))) for _ in range(300)]
    texts += [word * 50 for word in WORDS] + ["<|user|>" + " " * 3000, "\0\1" * 5000, "\0a" * 500]
    for text in texts:
        count = len(tokenizer.encode(text).ids)
        assert not bound.exceeds(text, count), ascii(text)
    assert bound.exceeds("hello " * 1000, 20) and not bound.exceeds("hello", 20)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")),
        lambda: Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        lambda: Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
        lambda: Tokenizer(models.BPE({"a": 0}, [])),  # what it doesn't know, it drops
        lambda: Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=True)),
        lambda: byte_level(normalizers.Strip()),
        lambda: byte_level(normalizers.Replace(Regex(" +"), " ")),
        lambda: byte_level(normalizers.Sequence([normalizers.NFC(), normalizers.Replace("x", "")])),
        lambda: _bpe(
            models.BPE(*_merged(pre_tokenizers.ByteLevel.alphabet())),
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)]),
            None,
        ),
        lambda: _bpe(
            models.BPE(*_merged(pre_tokenizers.ByteLevel.alphabet())),
            pre_tokenizers.Sequence([pre_tokenizers.Split("-", "removed"), pre_tokenizers.ByteLevel(False)]),
            None,
        ),
    ],
    ids=[
        *("words", "pieces of words", "unigram", "drops", "one token for all unknown", "strips", "one space for many"),
        *("deletes", "splits at spaces", "splits at dashes"),
    ],
)
def test_nothing_is_said_where_a_token_may_stand_for_any_length(make: Callable[[], Tokenizer]) -> None:
    assert token_length(make()) is None


def test_the_tiny_model_has_a_bound(tiny: Path) -> None:
    bound = token_length(Tokenizer.from_file(str(tiny / "tokenizer.json")))
    assert bound is not None and 5 < bound.characters < 40
