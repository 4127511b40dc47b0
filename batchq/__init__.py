"""batchq: label millions of documents with a language model, offline, and lose none.

    import batchq
    result = batchq.run(batchq.compose(["job=sentiment_transcripts"]))

Nothing heavy is imported until it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Config", "compose", "run"]

if TYPE_CHECKING:
    from batchq.cli import compose
    from batchq.config import Config
    from batchq.run import run


def __getattr__(name: str) -> Any:
    if name == "compose":
        from batchq.cli import compose

        return compose
    if name == "Config":
        from batchq.config import Config

        return Config
    if name == "run":
        import importlib

        return importlib.import_module("batchq.run")  # a module that can be called: see its end
    raise AttributeError(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
