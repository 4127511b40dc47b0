"""What a check of infra/ comes to: one line of the table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".infra"  # what checks install: environments and binaries, kept from one run to the next


class How(Enum):
    """What a check proves."""

    RAN = "ran"  # the thing itself did what it is for
    SCHEMA = "schema"  # its files are what their reader accepts, by the reader's own schema or parser


@dataclass(frozen=True, slots=True)
class Check:
    """One claim of infra/, tried.

    `act` gets an empty folder of its own, returns a few words for the table, and raises AssertionError, or whatever
    goes wrong, when the claim doesn't hold. `quick` ones take seconds, install nothing, and are in `make test`.
    """

    area: str  # as a folder of infra/ is called
    what: str  # a few words
    how: How
    act: Callable[[Path], str]
    quick: bool = False


class Missing(Exception):
    """Something that a check needs can't be had on this machine; it counts as failed, in one line."""


def said(command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, timeout: float = 300) -> str:
    """What a command prints, both streams. Raises AssertionError with its last lines when it doesn't end in 0."""
    done = subprocess.run(
        list(map(str, command)), env=env, timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    last = "\n".join(done.stdout.splitlines()[-15:])
    assert done.returncode == 0, f"{Path(command[0]).name} ended in exit code {done.returncode}:\n{last}"
    return done.stdout


def installed(area: str, program: str, *packages: str) -> Path:
    """A program of Python packages', in an environment of the area's own that stays. Raises Missing without them."""
    folder = TOOLS / area
    if not (folder / "bin" / program).exists():
        try:
            said([sys.executable, "-m", "venv", folder])
            said([folder / "bin/python", "-m", "pip", "install", "-q", *packages], timeout=900)
        except AssertionError as error:
            raise Missing(f"{' '.join(packages)}: {str(error).splitlines()[-1]}") from error
    return folder / "bin" / program
