"""docs/runbook.md has every error that a run can end in, under its exit code, in words that the error has; and every
failure's code."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from batchq import errors
from batchq.cli import EXIT_CODES
from batchq.errors import BatchqError, ExitCode

ROOT = Path(__file__).parent.parent
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
KINDS = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, BatchqError)}
# Each names its field, file or model and what it may be, which is all that there is to say.
SAY_IT_ALL = {"UserError", "ConfigError", "InputError", "ModelError"}
ON_ORDER = {"engine/fake.py", "storage/failpoint.py"}  # of tests
ELSEWHERE = {  # words that no error of batchq's has, and the module that says them
    "of the rows failed": "report/outcome.py",
    "were cut off": "report/outcome.py",
    "can't be read, or not to their ends": "report/outcome.py",
    "a defect of batchq's": "errors.py",
    "not done within cluster.grace_seconds": "cli/__init__.py",
    "Ray's head at": "pool/connection.py",
    "No space left on device": "errors.py",  # the system's own words
}


def constants(node: ast.AST) -> str:
    """The fixed words of an expression, \\0 between them."""
    return "\0".join(n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))


@cache
def trees() -> dict[str, ast.Module]:
    return {
        path.relative_to(ROOT / "batchq").as_posix(): ast.parse(path.read_text())
        for path in sorted((ROOT / "batchq").rglob("*.py"))
    }


@cache
def helpers(name: str) -> str:
    """The fixed words of what is called `name` and makes a message: a function, or a constant of a module."""
    found = []
    for tree in trees().values():
        for node in ast.walk(tree):
            if (isinstance(node, ast.FunctionDef) and node.name == name) or (
                isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
            ):
                found.append(constants(node))
    return "\0".join(found)


def raised() -> Iterator[tuple[str, int, str, str]]:
    """(file, line, kind, fixed words) of every error of batchq's that is made in the sources."""
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS and node.args:
                words = constants(node.args[0])
                for part in ast.walk(node.args[0]):
                    if (
                        isinstance(part, ast.Call)
                        and isinstance(part.func, ast.Attribute)
                        and part.func.attr == "words"
                    ):
                        words += "\0" + helpers("words")
                    elif isinstance(part, ast.Name) and part.id.isupper():
                        words += "\0" + helpers(part.id)
                yield file, node.lineno, node.func.id, words


ALL = [each for each in raised() if each[0] not in ON_ORDER]


def phrases(code: int) -> list[str]:
    """Of the tables below an exit code's heading, the words in the first column."""
    section = RUNBOOK.split(f"### Exit code {code}\n")[1].split("\n### ")[0].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, re.M)


def test_every_exit_code_has_its_section() -> None:
    assert set(map(int, re.findall(r"^### Exit code (\d+)$", RUNBOOK, re.M))) == set(ExitCode) == set(EXIT_CODES)


def test_every_error_is_found_by_its_words_under_its_exit_code() -> None:
    assert len(ALL) > 200, "the sources aren't read any more"
    missing = [
        f"batchq/{file}:{line} {kind}: {words!r}"
        for file, line, kind, words in ALL
        if kind not in SAY_IT_ALL
        and words.strip("\0:; ")
        and not any(p in words for p in phrases(KINDS[kind].exit_code))
    ]
    assert not missing, "docs/runbook.md has no words of\n" + "\n".join(missing)


@pytest.mark.parametrize("code", list(ExitCode))
def test_what_the_page_quotes_is_said_somewhere(code: ExitCode) -> None:
    said = [words for _, _, kind, words in ALL if KINDS[kind].exit_code == code]
    for phrase in phrases(code):
        if phrase in ELSEWHERE:
            assert phrase == "No space left on device" or phrase in constants(trees()[ELSEWHERE[phrase]]), phrase
        else:
            assert any(phrase in words for words in said), f"nothing that ends in exit code {code} says: {phrase}"


def test_every_code_of_a_failure_is_there() -> None:
    codes = set()
    for tree in trees().values():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("Failure", "RowError")
            ):
                codes |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
            elif isinstance(node, ast.Tuple) and len(node.elts) == 2 and isinstance(node.elts[0], ast.Constant):
                codes |= {node.elts[0].value} & CODED
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "row":
                codes |= {a.value for a in node.args[2:3] if isinstance(a, ast.Constant)}
    section = RUNBOOK.split("## Failures by code")[1]
    listed = {code for line in re.findall(r"^\| (`.*?`) \|", section, re.M) for code in re.findall(r"`(\w+)`", line)}
    assert codes - {"not_asked"} <= listed, f"docs/runbook.md lacks {codes - listed}"
    assert listed <= codes | CODED


CODED = {"line_too_long", "invalid_utf8", "csv_columns", "invalid_csv", "invalid_encoding", "killed_engine"}
