"""What a field carries beside its type: the range of its number, in its metadata, and its words, in its class's
docstring."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

MISSING = "???"  # the default of a field that has to be given


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field takes; null is refused by the field's type, where it isn't allowed."""

    holds: Callable[[float], bool]
    words: str


# The metadata of a number's field, or of one that maps names to numbers. What isn't a number (.nan) is in no range.
POSITIVE = {"range": Range(lambda n: n > 0, "must be above 0")}
NOT_NEGATIVE = {"range": Range(lambda n: n >= 0, "can't be negative")}
SHARE = {"range": Range(lambda n: 0 <= n <= 1, "between 0 and 1")}
OPEN_SHARE = {"range": Range(lambda n: 0 < n < 1, "between 0 and 1, exclusive")}
PORT = {"range": Range(lambda n: 0 < n < 65536, "between 1 and 65535")}
OBJECT = {"range": Range(lambda n: 1 <= n <= 4096, "1 to 4096 MiB: larger objects aren't taken at once by S3")}
PRICE = {"range": Range(lambda n: n >= 0, "a price can't be negative")}


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """(name with dots, field, value) of every field below a configuration dataclass, groups themselves left out."""
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, value


def docs(kind: type) -> dict[str, str]:
    """Each field of a configuration dataclass and its paragraph, `name: what it is`, in one line."""
    _, _, paragraphs = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")
    matches = re.findall(r"^(\w+): (.*(?:\n +.*)*)", paragraphs, re.M)
    return {name: " ".join(words.split()) for name, words in matches}
