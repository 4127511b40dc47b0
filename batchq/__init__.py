"""batchq: label millions of documents with a language model, offline, and lose none.

    import batchq
    result = batchq.run(batchq.compose(["job=sentiment_transcripts"]))

Nothing heavy is imported until it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from batchq.config import Config

__version__ = "0.1.0"
__all__ = ["Config", "compose", "run"]

if TYPE_CHECKING:
    from batchq.run import run


def compose(overrides: Sequence[str]) -> Config:
    """The checked configuration that these Hydra overrides make, as `python -m batchq` would.

    Raises ConfigError naming the field, group or choice.
    """
    from batchq.config import compose as hydra

    return hydra.compose(overrides)


def __getattr__(name: str) -> Any:
    if name == "run":
        import importlib

        return importlib.import_module("batchq.run")  # a module that can be called: see its end
    raise AttributeError(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
