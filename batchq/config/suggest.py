"""What somebody may have meant who wrote a name, a choice or a value that isn't one: the ends of messages."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from batchq.config.schema import Config

NEAR = 0.6  # of difflib's ratio, its own default
# Values that look like a path or a name of the hub, where a group's choice is asked for.
FIELD_OF_GROUP = {"input": "input.path", "output": "output.path", "pricing": "pricing.budget", "gate": "gate.recovery"}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message, "; did you mean NAME?", or nothing where no known name is near."""
    names = {each.casefold(): each for each in known}
    near = get_close_matches(name.casefold(), names, n=1, cutoff=NEAR)
    return f"; did you mean {names[near[0]]}?" if near else ""


def choice(group: str, value: str, known: Sequence[str]) -> str:
    """What to say of a value that is none of the group's choices."""
    stem = re.sub(r"\.ya?ml$", "", value.rpartition("/")[2])
    if stem != value and stem in known:
        return f"; say {group}={stem}: a name in conf/{group}, without a path and .yaml"
    if group == "model" and re.search(r"[/:.]", value):
        return (
            "; a model of the hub is model=hub model.path=hf://OWNER/NAME model.revision=COMMIT, "
            "a local one model=folder model.path=FOLDER"
        )
    if group in FIELD_OF_GROUP and re.search(r"[/.:\d]", value):
        return f"; or did you mean {FIELD_OF_GROUP[group]}={value}?"
    return did_you_mean(value, known)


def field(key: str) -> str:
    """What to say of a field that isn't there: the nearest, or those of other groups that are called so."""
    known = _fields(Config, "")
    last = key.rpartition(".")[2]
    alike = [name for name in known if name.rpartition(".")[2] == last]
    if alike:
        return f"; did you mean {' or '.join(alike[:3])}?"
    above = key.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == above]
    return did_you_mean(key, siblings) or did_you_mean(key, known)


def as_fields(word: str) -> list[str]:
    """The fields that a word names, with or without their group; a group names its choice."""
    if word in (f.name for f in dataclasses.fields(Config)):
        return [word]
    return [name for name in _fields(Config, "") if word in (name, name.rpartition(".")[2])]


def flag(word: str) -> str:
    """What to say of a flag that isn't Hydra's: a field is set without dashes."""
    name, _, value = word.lstrip("-").partition("=")
    named = as_fields(name.replace("-", "_"))
    if not named:
        return f"{word}: no such flag; a field is set as key=value, without dashes"
    written = " or ".join(f"{each}={value or 'VALUE'}" for each in named[:3])
    return f"{word}: a field is set without dashes: {written}"


def quoted(override: str) -> str:
    """What to say of an override that Hydra's grammar can't read."""
    key, equals, value = override.partition("=")
    how = f"'{key}=\"...\"'"
    if re.search(r"\s", key):
        hint = "write the key without blanks" if equals else "say key=value"
        return f"{key}: a key with blanks can't stand on the command line; {hint}, or put it into the job's file"
    if key.startswith("input.csv."):
        return (
            f"{key}: say a word for the character: comma, semicolon, tab, pipe, space, double, single, backslash, none"
        )
    if match := re.fullmatch(r"\((.*)\)", value):
        return f"{key}: a list is written with brackets: '{key}=[{match[1]}]'"
    if value.startswith("[") and not value.endswith("]"):
        return f"{key}: a list ends with a bracket; was it cut at a blank? Put quotes around all of it: '{key}=[a, b]'"
    return f"{key}: can't be read as Hydra's key=value; quote its value twice, for the shell too: {how}"


def stray(before: str, word: str, after: str) -> str:
    """What to say of a word that is neither key=value nor a flag, by the words beside it; empty if nothing is known."""
    key = before.partition("=")[0]
    if after.startswith("="):
        return f"{word}: no blanks around =; say {word}={after[1:] or 'VALUE'}"
    if before.endswith("="):
        return f"{before} {word}: no blanks around =; say {before}{word}"
    if "=" in before and (before.count("[") > before.count("]") or before.count("{") > before.count("}")):
        return f"{before} {word}: a shell cuts at blanks; put quotes around all of it: '{before} {word}'"
    if (match := re.fullmatch(r"([\w.]+):(.*)", word)) and as_fields(match[1]):
        return f"{word}: on the command line it is {match[1]}={match[2] or after or 'VALUE'}"
    if named := as_fields(word) if "." in word else []:
        return f"{word}: its value is missing; say {named[0]}=VALUE"
    if "=" in before and as_fields(key) and not before.endswith(word):
        return f"{word}: no such verb; if it belongs to {key}, put quotes around all of it: '{before} {word}'"
    return ""


def _fields(kind: Any, prefix: str) -> list[str]:
    """Every field's name with dots."""
    found: list[str] = []
    for each in dataclasses.fields(kind):
        name = prefix + each.name
        inner = each.default_factory
        found += _fields(inner, f"{name}.") if dataclasses.is_dataclass(inner) else [name]
    return found
