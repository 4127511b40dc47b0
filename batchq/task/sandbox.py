"""Jinja as prompts may use it: sandboxed, the same text for a row each time, JSON of any value."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.sandbox

from batchq.errors import RowError

# Without format and format_map, through which a format string reaches attributes.
STRING_METHODS = frozenset(name for name in dir(str) if name[0] != "_" and not name.startswith("format"))


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a short cut for the methods of plain strings, which is nearly all that a prompt calls.

    The sandbox looks at each attribute and each call anew, and was 40% of a worker's Python time on the shipped job.
    """

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is str and attribute in STRING_METHODS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if type(obj) is BuiltinMethodType and type(obj.__self__) is str and obj.__name__ in STRING_METHODS:
            return obj(*args, **kwargs)
        return super().call(context, obj, *args, **kwargs)


def environment() -> Sandbox:
    """Without what writes another text each time that a row is rendered: it would be asked anew on every resume."""
    made = Sandbox(undefined=jinja2.StrictUndefined, autoescape=False, finalize=printed, keep_trailing_newline=False)
    made.filters["tojson"] = as_json
    del made.filters["random"], made.globals["lipsum"]
    return made


def printed(value: Any) -> Any:
    """What {{ }} prints. Raises RowError for what would be a word of Python's and none of the row's."""
    if type(value) is str or isinstance(value, jinja2.Undefined):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise RowError("null_value", "the prompt prints a column that is null in this row")
    if callable(value) or isinstance(value, Iterator) or type(value).__module__.startswith("jinja2."):
        raise RowError(
            "prompt",
            "the prompt prints a function or an iterator: a field that has a method's name is written x['items'], "
            "and the values of a filter such as map want | join(', ')",
        )
    return value


def as_json(value: Any, indent: int | None = None) -> str:
    """The filter tojson. Jinja's own knows no dates, decimals and bytes, and writes < and what isn't ASCII as codes.
    NaN and infinities are null; bytes are their text, or base64 where they are none."""
    return json.dumps(_plain(value), indent=indent, sort_keys=True, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    if isinstance(value, list | tuple | set | frozenset | Iterator):
        return [_plain(each) for each in value]
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
