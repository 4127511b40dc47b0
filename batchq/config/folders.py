"""Where Hydra's groups are: ours, shipped with the package, and a user's own."""

from __future__ import annotations

import os
from pathlib import Path

from batchq.errors import ConfigError

PACKAGE = Path(__file__).parent.parent


def conf_dir() -> Path:
    """The shipped Hydra groups: in the package in a wheel, beside the package in a checkout."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


def user_conf_dir() -> Path | None:
    """A user's own groups: $BATCHQ_CONF, or ./conf if it holds job/ (an unrelated conf/ is left alone).

    Raises ConfigError if BATCHQ_CONF names no folder.
    """
    if named := os.environ.get("BATCHQ_CONF"):
        if not Path(named).is_dir():
            raise ConfigError(f"BATCHQ_CONF={named}: no such folder")
        return Path(named).resolve()
    local = Path.cwd() / "conf"
    return local.resolve() if (local / "job").is_dir() else None


def choices(group: str) -> list[str]:
    """The names in a configuration group, the user's own and ours."""
    folders = [f for f in (user_conf_dir(), conf_dir()) if f is not None]
    return sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})
