"""Small results cached on this machine: JSON files in the cache, one for each, in a folder for each kind."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from batchq.machine.cache import cache_dir

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

KINDS = ("tune", "throughput", "gate")
OLD_KINDS = ("reached",)  # of versions before: not read any more, but cleaned


def write(kind: str, key: str, result: Any) -> None:
    """Cache what JSON can hold, in place of an older result; whoever reads meanwhile sees one of both, whole. Where
    nothing can be written a line says so: it could be made again."""
    path = path_of(kind, key)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(result, indent=1))
        temporary.rename(path)
    except OSError as error:
        logger.warning("%s can't be written (%s), so it isn't remembered", path, error.strerror)


def read(kind: str, key: str, form: Callable[[Any], Result]) -> Result | None:
    """`form` of what was cached; None if there is nothing, or nothing that can be read: a line says so then, and the
    next `write` puts it right."""
    path = path_of(kind, key)
    try:
        return form(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s can't be read (%s) and is not used", path, error.strerror)
        return None
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s is damaged and not used (%s: %s)", path, type(error).__name__, error)
        return None


def path_of(kind: str, key: str) -> Path:
    """Its file."""
    return cache_dir() / kind / f"{key}.json"
