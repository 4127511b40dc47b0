"""Columns that the folders of an object's name give: year=2026/month=01/part.parquet has a year and a month.

As pyarrow and DuckDB read them: whole numbers where every folder of that key has one, text otherwise; percent-encoding
is undone. Only folders below input.path count, and a file's own column of that name comes first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

_NULL = "__HIVE_DEFAULT_PARTITION__"
_WHOLE = re.compile(r"-?\d{1,18}", re.ASCII)


def partition_types(names: Iterable[str]) -> dict[str, str]:
    """The columns that objects of these names have by their folders, each with its type: "int64" or "string"."""
    whole: dict[str, bool] = {}
    for folder in {folder for name in names for folder in name.split("/")[:-1]}:
        for key, value in _texts(folder + "/").items():
            whole[key] = whole.get(key, True) and (value is None or bool(_WHOLE.fullmatch(value)))
    return {key: "int64" if whole[key] else "string" for key in sorted(whole)}


def partition_values(name: str, types: Mapping[str, str]) -> dict[str, Any]:
    """What this object's folders say of each of these columns; None where they say nothing."""
    texts = _texts(name) if types else {}
    return {
        key: int(text) if type == "int64" and (text := texts.get(key)) is not None else texts.get(key)
        for key, type in types.items()
    }


def _texts(name: str) -> dict[str, str | None]:
    folders = (folder.partition("=") for folder in name.split("/")[:-1])
    return {unquote(key): None if value == _NULL else unquote(value) for key, mark, value in folders if mark and key}
