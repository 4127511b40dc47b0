"""The order of the packages: a package, or a module beside them, imports only from packages below it, and nothing heavy
at its top."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = [
    *("__main__", "cli", "job", "report", "pool", "worker", "sizing", "telemetry", "account", "quantize", "plan"),
    *("output", "input", "task", "engine", "model", "machine", "storage", "config", "records", "errors"),
]
HEAVY = {"torch", "ray", "vllm", "transformers", "llmcompressor", "datasets", "hydra", "omegaconf"}
ONLY_IN = {  # modules of batchq, by pattern; each pattern has to have an importer
    "ray": {
        "pool/__init__",
        "pool/cluster",
        "pool/connection",
        "pool/exporter",
        "pool/growth",
        "pool/handles",
        "pool/labelling",
    },
    "vllm": {"engine/vllm*"},
    "obstore": {"storage/*"},
    "llmcompressor": {"quantize/compress"},
    "hydra": {"config/compose"},
}


def modules() -> dict[str, ast.Module]:
    """Each package's code: that of all its modules, or of the one module."""
    packages: dict[str, ast.Module] = {}
    for path in sorted((ROOT / "batchq").rglob("*.py")):
        name = path.relative_to(ROOT / "batchq").parts[0].removesuffix(".py")
        packages.setdefault(name, ast.Module([], [])).body += ast.parse(path.read_text()).body
    del packages["__init__"]
    return packages


def imported(tree: ast.AST) -> set[str]:
    """Full names that a tree imports, down to the function or class, import_module's as far as they are literal."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func)):
            name = node.args[0] if node.args else None
            literal = name.values[0] if isinstance(name, ast.JoinedStr) and name.values else name
            if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                names.add(literal.value)
    return names


def unguarded(tree: ast.Module) -> ast.Module:
    """The module without `if TYPE_CHECKING:` blocks and function bodies: what runs when it is imported."""
    body = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))]
    return ast.Module([n for n in body if not isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)], [])


def test_every_package_imports_only_lower_ones() -> None:
    trees = modules()
    assert set(trees) == set(PACKAGES)
    for name, tree in trees.items():
        ours = {n.split(".")[1] for n in imported(tree) if n.startswith("batchq.")} & set(PACKAGES)
        above = {o for o in ours if PACKAGES.index(o) <= PACKAGES.index(name)} - {name}
        assert not above, f"{name} imports {above}, which are above it"


def test_what_runs_in_interpreters_without_batchq_imports_nothing_of_it() -> None:
    tree = ast.parse((ROOT / "batchq/quantize/compress.py").read_text())
    assert not {name for name in imported(tree) if name.split(".")[0] == "batchq"}


def test_what_is_sized_and_planned_never_looks_at_the_machine_that_the_driver_runs_on() -> None:
    """What is planned and sized is for the cluster's hardware, which is handed on."""
    for package in ("sizing", "model", "plan"):
        assert not re.search(r"\bdetect\(", source(package))


def source(package: str) -> str:
    """A package's code as text."""
    paths = [ROOT / f"batchq/{package}.py", *(ROOT / "batchq" / package).rglob("*.py")]
    return "\n".join(path.read_text() for path in paths if path.is_file())


def test_modules_in_a_folder_import_each_other_in_one_direction() -> None:
    for face in (ROOT / "batchq").glob("*/__init__.py"):
        package = f"batchq.{face.parent.name}"
        files = {f"{package}.{p.stem}": p for p in face.parent.glob("*.py") if p != face}
        wants = {package: set(files)}  # so that a module that imports the face is in a circle too
        for name, path in files.items():
            inside = {n for n in imported(ast.parse(path.read_text())) if f"{n}.".startswith(f"{package}.")}
            wants[name] = {next((f for f in files if f"{n}.".startswith(f"{f}.")), package) for n in inside}
        TopologicalSorter(wants).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_one_importer(package: str) -> None:
    importers = set()
    for path in (ROOT / "batchq").rglob("*.py"):
        if any(name.split(".")[0] == package for name in imported(ast.parse(path.read_text()))):
            importers.add(path.relative_to(ROOT / "batchq").with_suffix("").as_posix())
    allowed = {pattern: set(fnmatch.filter(importers, pattern)) for pattern in ONLY_IN[package]}
    assert all(allowed.values()), f"nothing imports {package} in {[p for p, found in allowed.items() if not found]}"
    assert importers == set().union(*allowed.values())


@pytest.mark.parametrize(
    "code",
    [
        "import ray.util",
        "from ray import get",
        "def late():\n import ray",
        "importlib.import_module('ray.util')",
        "import_module(f'ray.{x}')",
        "__import__('ray')",
    ],
)
def test_an_import_is_seen_however_it_is_written(code: str) -> None:
    assert {name.split(".")[0] for name in imported(ast.parse(code))} == {"ray"}


def test_nothing_heavy_at_import() -> None:
    for name, tree in modules().items():
        heavy = {i.split(".")[0] for i in imported(unguarded(tree))} & HEAVY
        assert not heavy, f"{name} imports {heavy} at its top"


def test_usage_answers_at_once_without_heavy_imports() -> None:
    code = f"import sys, batchq.cli; batchq.cli.main(['--help']); print(sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip().endswith("[]")
