"""The group `input.csv`: how CSV files are written."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field

from batchq.config.fields import NOT_NEGATIVE
from batchq.errors import ConfigError

# Words for characters that a shell, Hydra or a reader's eye might lose.
CHARACTERS = {
    "comma": ",",
    "semicolon": ";",
    "tab": "\t",
    r"\t": "\t",
    "pipe": "|",
    "space": " ",
    "none": "",
    "double": '"',
    "single": "'",
    "backslash": "\\",
}


@dataclass
class CsvConfig:
    """How CSV files are written. What is null is found out from each file, and `plan` says what was found.

    delimiter: between fields: one character, or comma, semicolon, tab, pipe, space.
    quote: around fields that hold delimiters or line ends: one character, or double, single; none where fields are
        never quoted, as in what databases export.
    escape: backslash where a quote inside quotes has one before it, as Spark writes it, and where databases write tabs,
        line ends and null as a backslash and a letter; none where such a quote is doubled.
    encoding: utf-8, cp1252, utf-16 or another that Python knows; a file's own byte-order mark goes before it.
    header: whether the first line names the columns; false calls them c0, c1, ...
    skip: lines before the header, or before the first row.
    """

    delimiter: str | None = None
    quote: str | None = None
    escape: str | None = None
    encoding: str | None = None
    header: bool | None = None
    skip: int | None = field(default=None, metadata=NOT_NEGATIVE)


def character(name: str, value: str | None) -> str | None:
    """The character that a field of input.csv means; empty for none. Raises ConfigError for more than one."""
    if value is None:
        return None
    meant = CHARACTERS.get(value, value)
    if len(meant) > 1 or meant in ("\n", "\r"):
        raise ConfigError(f"input.csv.{name}={value}: one character, or one of {', '.join(CHARACTERS)}")
    return meant


def check_csv(csv: CsvConfig) -> None:
    """Raises ConfigError naming the field that can't be."""
    delimiter = character("delimiter", csv.delimiter)
    quote, escape = character("quote", csv.quote), character("escape", csv.escape)
    if delimiter == "":
        raise ConfigError("input.csv.delimiter=none: fields need one; for lines of text say input.format=text")
    for name, value in (("quote", quote), ("escape", escape)):
        if value and value == delimiter:
            raise ConfigError(f"input.csv.{name}: can't be the delimiter too")
    if csv.encoding is not None:
        try:
            is_text = codecs.lookup(csv.encoding)._is_text_encoding
        except LookupError:
            is_text = False
        if not is_text:
            raise ConfigError(
                f"input.csv.encoding={csv.encoding}: no such encoding; as utf-8, cp1252, latin-1, utf-16, shift_jis"
            )
