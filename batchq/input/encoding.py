"""What encoding a text file has, by its first bytes."""

from __future__ import annotations

import codecs
import re

from batchq.errors import InputError
from batchq.records import InputObject

BOMS = (  # the longer ones first: that of UTF-16 begins that of UTF-32
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
MOSTLY = 0.5

# Of cp1252, what texts of Western Europe hold: letters beside other letters, and punctuation where no letters are on
# both sides. Words of Cyrillic or Chinese bytes have long runs, Polish ones digits raised in their midst.
_LETTER = rb"[\x8a\x8c\x8e\x9a\x9c\x9e\x9f\xc0-\xd6\xd8-\xf6\xf8-\xff]"
_ANY = rb"[A-Za-z\x8a\x8c\x8e\x9a\x9c\x9e\x9f\xc0-\xd6\xd8-\xf6\xf8-\xff]"
_JOINS = rb"[\x85\x91\x92\x96\x97\xad\xb4\xb7]"  # apostrophes, dashes, an ellipsis, a soft hyphen, a middle dot
_MARK = rb"[\x80\x82-\x8b\x8d-\x99\x9b\xa0-\xbf\xd7\xf7]"
_STRANGE = re.compile(
    rb"[\x81\x8d\x8f\x90\x9d]|"
    + (_LETTER + rb"{3}|")
    + (rb"(?<![A-Za-z])" + _LETTER + rb"{1,2}(?![A-Za-z])(?<![\xc0\xe0])|")  # French has a word of one such letter
    + (_ANY + rb"[\x82\x84]|")  # such quotes open, and in cp437 they are letters
    + (_ANY + rb"(?:(?!" + _JOINS + rb")" + _MARK + rb")+" + _ANY)
)


def bom_of(head: bytes) -> str | None:
    """The codec that a byte-order mark asks for."""
    return next((name for bom, name in BOMS if head.startswith(bom)), None)


def encoding_of(obj: InputObject, head: bytes, whole: bool) -> str | None:
    """The encoding, None where it is ASCII so far. `whole`: the head is all there is.

    Bytes that are no UTF-8 are a row's own fault where other lines are UTF-8 beyond ASCII, or most are fine; cp1252
    where all of them are letters and punctuation as Western Europe sets them. Raises InputError if most lines are
    neither.
    """
    if marked := bom_of(head):
        return marked.removesuffix("-sig")
    if wide := _without_mark(head):
        return wide
    lines = [line for line in head.split(b"\n") if not line.isascii()]
    if lines and not whole and not head.endswith(b"\n"):
        lines = lines[:-1] if not head.rpartition(b"\n")[2].isascii() else lines
    if not lines:
        return None
    broken = [line for line in lines if not _is_utf8(line)]
    if not broken or len(broken) < MOSTLY * len(lines):
        return "utf-8"
    if not any(_STRANGE.search(line) for line in broken):
        return "cp1252"
    if len(broken) < MOSTLY * (head.count(b"\n") + 1):
        return "utf-8"
    raise InputError(
        f"{obj.uri}: isn't UTF-8; name its encoding, as input.csv.encoding=cp1252 (Western Europe), cp1250, cp1251, "
        "shift_jis, gb18030"
    )


def _without_mark(head: bytes) -> str | None:
    """UTF-16 of mostly ASCII, by the zeros in every other byte."""
    half = len(head) // 2
    if half < 8:
        return None
    even, odd = head[::2].count(0), head[1::2].count(0)
    if odd > MOSTLY * half and even < odd / 10:
        return "utf-16-le"
    return "utf-16-be" if even > MOSTLY * half and odd < even / 10 else None


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
