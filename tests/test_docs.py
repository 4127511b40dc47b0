"""The documents name only what there is: fields, verbs, groups, files and make's targets."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from batchq.cli import VERBS
from batchq.config import Config, choices
from tests.test_packages import PACKAGES

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    *("README.md", "RELIABILITY.md", "SECURITY.md", "CONTRIBUTING.md", "jobs/sentiment_transcripts/README.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
GROUPS = tuple(field.name for field in dataclasses.fields(Config))


def fields() -> set[str]:
    """Every field's name with dots, as on the command line."""
    found: set[str] = set()

    def walk(kind: Any, prefix: str) -> None:
        for field in dataclasses.fields(kind):
            found.add(prefix + field.name)
            if dataclasses.is_dataclass(field.default_factory):
                walk(field.default_factory, f"{prefix}{field.name}.")

    walk(Config, "")
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_field_that_is_named_exists(name: str) -> None:
    named = re.findall(rf"(?<![\w/.])((?:{'|'.join(GROUPS)})\.[a-z_]+)(?![\w(/])", (ROOT / name).read_text())
    files = {path.name for folder in ("batchq", "conf/job", "docs") for path in (ROOT / folder).rglob("*.*")}
    unknown = {n for n in named if n not in fields() and n not in files}
    assert not unknown, f"{name} names {unknown}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_choice_and_verb_that_is_named_exists(name: str) -> None:
    text = (ROOT / name).read_text()
    for group in GROUPS:
        for choice in re.findall(rf"(?<![\w.-]){group}=([a-z]\w*)\b", text):
            known = set(choices(group)) | {"mine", "tickets"} if group == "job" else set(choices(group))
            assert choice in known, f"{name} names {group}={choice}"
    for words in re.findall(r"python -m batchq (\w[^\n`]*)", text):
        verb = words.split()[0]
        assert "=" in verb or verb in VERBS, f"{name} names the verb {verb}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_script_and_target_that_is_named_exists(name: str) -> None:
    text = (ROOT / name).read_text()
    for script in re.findall(r"\b((?:benchmarks|chaos|tests|jobs)/[\w/]+\.py)\b", text):
        assert (ROOT / script).is_file(), f"{name} names {script}"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"`?make ([\w-]+)", "\n".join(re.findall(r"^make .*|`make [^`]*`", text, re.M))):
        assert target in targets, f"{name} names make {target}"


def test_architecture_shows_the_packages_in_their_order_and_their_modules() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    table = re.findall(r"^\| `(\w+)/` \|[^|]*\|([^|]*)\|$", page, re.M)
    packages = [name for name in PACKAGES if (ROOT / "batchq" / name).is_dir()]
    assert [package for package, _ in table] == packages
    for package, modules in table:
        folder = ROOT / "batchq" / package
        there = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
        assert set(re.findall(r"`(\w+)/?`", modules)) == there - {"__init__", "__pycache__"}, package


def calls() -> list[tuple[str, str]]:
    """(caller, what it calls) of the architecture page's way from command to commit; the caller of a root is ""."""
    page = (ROOT / "docs/architecture.md").read_text()
    (block,) = re.findall(r"call by call.*?```\n(.*?)```", page, re.S)
    above: list[str] = []
    found = []
    for indent, name in re.findall(r"^( *)([\w./]+)", block, re.M):
        del above[len(indent) // 2 :]
        found.append((above[-1] if above else "", name))
        above.append(name)
    return found


def named(name: str) -> Any:
    """The function or class called `package/module.name`, or `package.name` where it is the package's face."""
    module, _, name = name.partition(".")
    return attrgetter(name)(importlib.import_module(f"batchq.{module.replace('/', '.')}"))


@pytest.mark.parametrize(("caller", "name"), calls())
def test_the_way_from_command_to_commit_is_the_codes(caller: str, name: str) -> None:
    assert callable(named(name))
    if caller:
        last = name.rpartition(".")[2]
        assert re.search(rf"\b{last}\b", inspect.getsource(named(caller))), f"{caller} doesn't call {name}"


def test_every_place_that_the_architecture_page_names_exists() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    paths = re.findall(r"`([\w/]+\.py)`", page)
    missing = {path for path in paths if not (ROOT / "batchq" / path).is_file() and not (ROOT / path).is_file()}
    assert len(paths) > 30 and not missing
    for name, path in re.findall(r"`([\w.]+)`,? in `([\w/]+)\.py`", page):
        assert named(f"{path}.{name}") is not None
