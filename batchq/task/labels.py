"""Which texts represent the labels in the model's answer, and the token id that each begins with."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from batchq.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LabelTokens:
    """What the model is asked to answer with, in the labels' order; empty where there are no labels."""

    texts: tuple[str, ...] = ()  # the labels themselves, or a letter for each
    token_ids: tuple[int, ...] = ()  # the first of each text's tokens, all different


def tokens_of(
    labels: Sequence[str], codes: bool | None, lists_choices: bool, continuation: Callable[[str], list[int]]
) -> LabelTokens:
    """The labels themselves where their first tokens differ, else letters. `codes`: task.codes.

    `lists_choices`: whether the prompt tells the model which letter is which label. `continuation`: text -> the tokens
    that it adds to a prompt. Raises ConfigError if the labels can be told apart in neither way.
    """
    if not labels:
        return LabelTokens()
    if not codes:
        firsts = tuple(continuation(label)[0] for label in labels)
        if len(set(firsts)) == len(firsts):
            return LabelTokens(tuple(labels), firsts)
        if codes is False:
            raise ConfigError(
                "task.codes=false: some labels begin with the same token for this model; "
                "leave task.codes unset to answer by letter, or rename the labels"
            )
    letters = tuple(string.ascii_uppercase[: len(labels)])
    if len(letters) < len(labels):
        raise ConfigError(f"task.labels: {len(labels)} labels that collide; at most 26 can be coded by letter")
    if not lists_choices:
        raise ConfigError(
            "task.prompt: labels are answered by letter here (they begin with the same token, or task.codes=true), "
            "so the prompt has to list them: put {{ choices }} in it"
        )
    return LabelTokens(letters, tuple(continuation(letter)[0] for letter in letters))


def choices(labels: Sequence[str], texts: Sequence[str]) -> str:
    """What {{ choices }} prints: the labels, or a line for each letter with its label."""
    if tuple(texts) == tuple(labels):
        return ", ".join(labels)
    return "\n".join(f"{code}: {label}" for code, label in zip(texts, labels, strict=True))
