"""What was found out on this machine and needn't be again: small JSON files in the cache, one for each finding."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from batchq import models

Found = TypeVar("Found")


def keep(kind: str, key: str, found: Any) -> None:
    """Keep what JSON can hold, in place of what was found before; whoever reads meanwhile sees one of both, whole."""
    path = place(kind, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(found, indent=1))
    temporary.rename(path)


def recall(kind: str, key: str, form: Callable[[Any], Found]) -> Found | None:
    """`form` of what was kept; None if there is nothing, or nothing that can be read: a line says so then, and the next
    `keep` puts it right."""
    path = place(kind, key)
    try:
        return form(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        print(f"batchq: {path} is damaged and not used ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
        return None


def place(kind: str, key: str) -> Path:
    """Its file."""
    return models.cache_dir() / kind / f"{key}.json"
