"""Lines of bytes -> rows: JSONL and text, by the offset of a line or by its ordinal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from batchq.errors import InputError
from batchq.input import broken, looks
from batchq.input.formats import BLOCK, FORMATS, base
from batchq.records import InputObject, Row
from batchq.storage import failpoint

TAIL = 64 * 1024  # bytes read at a time beyond a range's end, to finish its last line

_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Lines = Iterator[tuple[int, bytes | None]]  # a line's position, and its bytes without the newline; None if too long


def lines_of(obj: InputObject, file: BinaryIO, start: int, stop: int) -> Lines:
    """The lines whose first byte lies in [start, stop), by the offset of that byte."""
    if start >= stop:
        return
    at = max(0, start - 1)  # a line begins at start only if the byte before it ends one
    if at:
        file.seek(at)
    another_ranges = start > 0  # the first line belongs to the range before
    reached, held = at, 0  # the end of what was read, and the bytes of an unfinished line before it
    pieces: list[bytes] = []  # of that line, as long as it isn't too long
    while block := file.read(min(BLOCK, max(stop - reached, TAIL))):
        failpoint.reach("read.lines.block")
        reached += len(block)
        if start == 0 and reached == len(block):
            _refuse_other_files(obj, block)
            if block.startswith(_BOM):
                block, held = block[len(_BOM) :], len(_BOM)
        *lines, last = block.split(b"\n")
        line: bytes | None
        for line in lines:
            length = len(line)
            if held:
                length += held
                line = b"".join((*pieces, line)) if length <= broken.MAX_LINE else None
                pieces.clear()
                held = 0
            if another_ranges:
                another_ranges = False
            else:
                yield at, line
            at += length + 1
            if at >= stop:
                return
        held += len(last)
        pieces.append(last)
        if held > broken.MAX_LINE:
            pieces.clear()
    if held and not another_ranges:
        yield at, b"".join(pieces) if held <= broken.MAX_LINE else None


def numbered(lines: Lines, skip_until: int) -> Lines:
    """Lines by ordinal, blank ones not counted, from `skip_until` on."""
    ordinal = 0
    for _, line in lines:
        if line is None or line.strip():
            if ordinal >= skip_until:
                yield ordinal, line
            ordinal += 1


def json_rows(lines: Lines, prefix: str, columns: list[str] | None) -> Iterator[Row]:
    """A row for each line that isn't blank."""
    for position, line in lines:
        row = _json_row(line, prefix, position, columns)
        if row is not None:
            yield row
        del row  # it may have megabytes, and so may the next one


def _json_row(line: bytes | None, prefix: str, position: int, columns: list[str] | None) -> Row | None:
    if line is None:
        return broken.too_long(prefix, position)
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return broken.not_utf8(prefix, position, line)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return broken.row(prefix, position, "invalid_json", _json_message(error), text) if line.strip() else None
    if not isinstance(value, dict):
        return broken.row(prefix, position, "not_an_object", "a row must be a JSON object", text)
    if "\\u" in text and _SURROGATE.search(text) and not _encodable(value):
        return broken.row(prefix, position, "invalid_unicode", "a string holds half of a surrogate pair", text)
    wanted = value if columns is None else {name: value.get(name) for name in columns}
    return Row(f"{prefix}{position}", position, wanted, size=len(line))


def text_rows(lines: Lines, prefix: str) -> Iterator[Row]:
    for position, line in lines:
        if line is None:
            yield broken.too_long(prefix, position)
        elif line.strip():
            try:
                yield Row(f"{prefix}{position}", position, {"text": line.removesuffix(b"\r").decode()}, size=len(line))
            except UnicodeDecodeError:
                yield broken.not_utf8(prefix, position, line)


def _json_message(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    return "nested too deep" if isinstance(error, RecursionError) else "a number with too many digits"


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_other_files(obj: InputObject, head: bytes) -> None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{obj.uri}: is in UTF-16; convert it to UTF-8")
    suffix = base(obj.name)[0].suffix.lower()
    if suffix == ".json" and head.lstrip(_BOM + b" \t\r\n").startswith(b"["):
        raise InputError(f"{obj.uri}: is one JSON array; make it one object per line (jq -c '.[]')")
    other = looks.as_binary(head)
    if not other and FORMATS.get(suffix) == "jsonl":
        other = looks.as_markup(head) or looks.as_array(head)
    if other:
        raise InputError(f"{obj.uri}: looks like {other}")
