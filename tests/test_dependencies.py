"""What is imported is declared, and what is declared is locked in a version that will do."""

from __future__ import annotations

import ast
import itertools
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
OURS = ("batchq", "benchmarks", "chaos", "infra", "jobs", "tests")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def locked(file: str) -> dict[str, str]:
    """Versions by name."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements" / file).read_text(), re.M))


def imports(path: Path) -> set[str]:
    """Outside packages that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    beside = {each.stem for each in path.parent.glob("*.py")}  # a script's own folder is on its path
    return {name.split(".")[0] for name in found} - {*sys.stdlib_module_names, *OURS, *beside}


@pytest.mark.parametrize("folder", [folder.replace("infra", "infra/check") for folder in OURS])
def test_what_is_imported_is_declared(folder: str) -> None:
    declared = names([*PROJECT["dependencies"], *itertools.chain(*EXTRAS.values())])
    if folder == "benchmarks":
        declared.add("triton")  # torch brings it along where there is a GPU
    if folder == "infra/check":
        declared.add("matplotlib")  # draw.py runs in an environment of its own, which the check installs
    if folder != "batchq":
        declared |= names((ROOT / "requirements/dev.in").read_text().split())
    distributions = packages_distributions()
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(path):
            known = {canonicalize_name(each) for each in distributions.get(name, [name])}
            assert known & declared, f"{path.relative_to(ROOT)} imports {name}, which nothing declares"


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_locks_hold_what_is_declared(extra: str) -> None:
    versions = {canonicalize_name(name): version for name, version in locked(f"{extra}.txt").items()}
    for line in [*PROJECT["dependencies"], *EXTRAS[extra], *EXTRAS["cluster"], *EXTRAS["lineage"], *EXTRAS["traces"]]:
        wanted = Requirement(line)
        there = versions.get(canonicalize_name(wanted.name))
        assert there and wanted.specifier.contains(there, prereleases=True), f"{extra}.txt has {there} for {line}"


def test_locks_name_no_hosts() -> None:
    for lock in (ROOT / "requirements").glob("*.txt"):
        assert "://" not in lock.read_text(), f"{lock.name} names a host"
