"""${...}, which OmegaConf fills in, and text that only looks like it."""

from __future__ import annotations

import re
from typing import Any


def as_text(value: Any) -> Any:
    """A container in which all has been filled in: a ${} that is left was written as \\${} and stays as it is."""
    if isinstance(value, dict):
        return {key: as_text(each) for key, each in value.items()}
    if isinstance(value, list):
        return [as_text(each) for each in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def hint(error: BaseException | None) -> str:
    """The end of a message about an error that comes of filling in; empty for any other."""
    while error is not None:
        if type(error).__name__.startswith(("Interpolation", "UnsupportedInterpolation", "Grammar")):
            return "; Hydra fills in ${...}: write \\${...} for plain text, and {{ name }} in task.prompt for a column"
        error = error.__cause__
    return ""
