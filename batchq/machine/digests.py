"""sha256 of values and of files; a file's is computed once for each state of it."""

from __future__ import annotations

import hashlib
import json
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from batchq.machine.cache import cache_dir


def digest_of(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, remembered under what would change if its bytes did (ctime can't be set back)."""
    with suppress(OSError):  # there is none, or the cache can't be read
        return _memo(path).read_text()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    remember_digest(path, digest)
    return digest


def remember_digest(path: Path, digest: str) -> None:
    """Have `file_digest` give this one, without reading the file, if the cache can be written."""
    memo = _memo(path)
    temporary = memo.with_name(f".{memo.name}.{uuid.uuid4().hex}")
    with suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(digest)
        temporary.rename(memo)


def _memo(path: Path) -> Path:
    stat = path.stat()
    identity = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return cache_dir() / "digests" / digest_of(identity)
