"""A checkpoint's card, batchq.json: what it was made from and how, and its files with sizes and digests."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batchq.machine.digests import file_digest
from batchq.model.source import Model
from batchq.model.tensors import read_tensors, stored_bytes

CARD = "batchq.json"


def write_card(folder: Path, base: Model, facts: dict[str, Any]) -> None:
    """List a finished checkpoint's files in its card, the last file to be written."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    card = {
        **facts,
        "base": {"name": base.name, "digest": base.digest, "bytes": stored_bytes(read_tensors(base.path))},
        "bytes": stored_bytes(read_tensors(folder)),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
    }
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card of a checkpoint that was made here; see write_card. Raises FileNotFoundError for a model as it came."""
    card: dict[str, Any] = json.loads((Path(folder) / CARD).read_text())
    return card


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint is there as its card describes it, each file in size and content."""
    try:
        files = json.loads((folder / CARD).read_text())["files"]
        return bool(files) and all(
            (folder / name).stat().st_size == told["size"] and file_digest(folder / name) == told["sha256"]
            for name, told in files.items()
        )
    except (OSError, ValueError, LookupError, TypeError):  # a file or the card is missing, cut short or altered
        return False
