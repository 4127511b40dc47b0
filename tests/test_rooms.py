"""The order of the rooms: a room, a module or a folder of some, imports only from rooms below it, and nothing heavy at
its top."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = [
    *("__main__", "cli", "doctor", "describe", "preview", "verify", "job", "outcome", "report", "budget", "estimate"),
    *("settings", "verdict", "ledger", "quantize", "plan", "forecast", "shapes", "fit", "capacity", "pool"),
    *("worker", "vllm_engine", "fake_engine", "output", "input", "task"),
    *("engine", "findings", "models", "scheme", "hardware", "account", "progress"),
    *("storage", "config", "records", "failpoint", "errors"),
]
HEAVY = {"torch", "ray", "vllm", "transformers", "llmcompressor", "datasets", "hydra", "omegaconf"}
ONLY_IN = {
    "ray": {"pool"},
    "vllm": {"vllm_engine"},
    "obstore": {"storage"},
    "llmcompressor": {"compress"},
    "hydra": {"cli"},
}


def modules() -> dict[str, ast.Module]:
    """Each room's code: a module's, or that of all modules in a folder."""
    rooms: dict[str, ast.Module] = {}
    for path in sorted((ROOT / "batchq").rglob("*.py")):
        name = path.relative_to(ROOT / "batchq").parts[0].removesuffix(".py")
        rooms.setdefault(name, ast.Module([], [])).body += ast.parse(path.read_text()).body
    del rooms["__init__"]
    return rooms


def imported(tree: ast.AST) -> set[str]:
    """Full names that a tree imports, down to the function or class."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def unguarded(tree: ast.Module) -> ast.Module:
    """The module without `if TYPE_CHECKING:` blocks and function bodies: what runs when it is imported."""
    kept = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))]
    return ast.Module([n for n in kept if not isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)], [])


def test_every_module_is_a_room_and_imports_only_lower_ones() -> None:
    found = modules()
    assert set(found) - {"compress"} == set(ROOMS)
    for name, tree in found.items():
        ours = {n.split(".")[1] for n in imported(tree) if n.startswith("batchq.")} & set(ROOMS)
        if name == "compress":
            assert not ours, "compress.py runs in interpreters without batchq"
            continue
        above = {o for o in ours if ROOMS.index(o) <= ROOMS.index(name)} - {name}
        assert not above, f"{name} imports {above}, which stand above it"


def test_modules_in_a_folder_import_each_other_in_one_direction() -> None:
    for face in (ROOT / "batchq").glob("*/__init__.py"):
        room = f"batchq.{face.parent.name}"
        files = {f"{room}.{p.stem}": p for p in face.parent.glob("*.py") if p != face}
        wants = {room: set(files)}  # so that a module that imports the face is in a circle too
        for name, path in files.items():
            inside = {n for n in imported(ast.parse(path.read_text())) if f"{n}.".startswith(f"{room}.")}
            wants[name] = {next((f for f in files if f"{n}.".startswith(f"{f}.")), room) for n in inside}
        TopologicalSorter(wants).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_one_importer(package: str) -> None:
    importers = {n for n, t in modules().items() if any(i.split(".")[0] == package for i in imported(t))}
    assert importers == ONLY_IN[package]


def test_nothing_heavy_at_import() -> None:
    for name, tree in modules().items():
        heavy = {i.split(".")[0] for i in imported(unguarded(tree))} & HEAVY
        assert not heavy, f"{name} imports {heavy} at its top"


def test_usage_answers_at_once_without_heavy_imports() -> None:
    code = f"import sys, batchq.cli; batchq.cli.main(['--help']); print(sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip().endswith("[]")
