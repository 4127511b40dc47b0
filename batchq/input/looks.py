"""What a file that isn't what its name says looks like by its first bytes, and what to do about it."""

from __future__ import annotations

import json
import re
from itertools import pairwise

UNPACK = "unpack it, or pack it as gzip or zstd"
CONVERT = "convert it to Parquet, JSONL or CSV"
TABLE = "save it as CSV (UTF-8)"

MAGIC: dict[bytes, str] = {
    b"\x1f\x8b": "gzip: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "zstd: let its name end in .zst",
    b"BZh": "bzip2: let its name end in .bz2",
    b"\xfd7zXZ\0": f"xz: {UNPACK}",
    b"\x04\x22\x4d\x18": f"lz4: {UNPACK}",
    b"\xff\x06\0\0sNaPpY": f"snappy: {UNPACK}",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"Rar!\x1a\x07": "a rar archive: unpack it",
    b"PAR1": "Parquet: let its name end in .parquet, or say input.format=parquet",
    b"PARE": "Parquet with an encrypted footer: decrypt it; batchq takes no keys",
    b"ARROW1": f"an Arrow file (Feather): {CONVERT}",
    b"FEA1": f"Feather: {CONVERT}",
    b"\xff\xff\xff\xff": "an Arrow stream: let its name end in .arrow, or say input.format=dataset",
    b"ORC": f"ORC: {CONVERT}",
    b"Obj\x01": f"Avro: {CONVERT}",
    b"SEQ\x06": f"a Hadoop sequence file: {CONVERT}",
    b"SQLite format 3\0": f"an SQLite database: {CONVERT}",
    b"\x89HDF\r\n": f"HDF5: {CONVERT}",
    b"\x93NUMPY": f"a NumPy array: {CONVERT}",
    b"\x80\x04\x95": f"a Python pickle: {CONVERT}",
    b"\x80\x05\x95": f"a Python pickle: {CONVERT}",
    b"%PDF-": "a PDF: extract its text",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": f"an old Office file, such as .xls: {TABLE}",
    b"version https://git-lfs.": "a pointer of Git LFS, not the file itself: git lfs pull fetches that",
}
TEXT_TOO = (b"%PDF-", b"version https://git-lfs.")  # nothing else begins so; the others' letters may begin a text
CONTROL = re.compile(rb"[\0-\x08\x0e-\x1a]")
MARKUP = re.compile(rb"\s*<(?:!doctype|\?xml|html|[a-z])", re.I)
S3_ERROR = re.compile(rb"<Error>\s*<Code>(\w+)</Code>")
TAR_MARK = slice(257, 262)
HEAD = 4096  # bytes that are enough to tell


def as_binary(head: bytes) -> str:
    """What a file of bytes rather than text begins like, with the remedy; empty for none that is known."""
    for magic, name in MAGIC.items():
        if head.startswith(magic) and (not magic.isascii() or magic in TEXT_TOO or CONTROL.search(head)):
            return name
    if head.startswith(b"PK\x03\x04"):
        return _zip(head)
    return "a tar archive: unpack it" if head[TAR_MARK] == b"ustar" else ""


def as_markup(head: bytes) -> str:
    """HTML or XML: often what a server said instead of sending the file."""
    if not MARKUP.match(head.removeprefix(b"\xef\xbb\xbf")):
        return ""
    if said := S3_ERROR.search(head):
        return f"a store's error message ({said[1].decode()}): fetch the file again"
    is_html = re.match(rb"\s*<(!doctype html|html)", head.removeprefix(b"\xef\xbb\xbf"), re.I)
    return "an HTML page, perhaps of a login: fetch the file itself" if is_html else f"XML: {CONVERT}"


def as_json(head: bytes) -> str:
    """JSON, where something else is expected."""
    is_json = re.match(rb'(\xef\xbb\xbf)?\s*(\{\s*"|\[\s*\{)', head)
    return "JSON: let its name end in .jsonl, or say input.format=jsonl" if is_json else ""


def as_array(head: bytes) -> str:
    """One JSON array of objects, where there should be an object per line."""
    is_array = re.match(rb"(\xef\xbb\xbf)?\s*\[\s*(\{|\n)", head)
    return "one JSON array: make it one object per line (jq -c '.[]')" if is_array else ""


def as_text(head: bytes) -> str:
    """What a text looks like that is no JSON Lines."""
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    first, _, _ = text.partition("\n")
    if text.startswith("["):
        return "one JSON array: make it one object per line (jq -c '.[]')"
    if text.startswith("{'") or re.match(r"\{u?'\w+':", text):
        return "Python's way of printing a dict: write it with json.dumps"
    if text.startswith("{") and not _is_json(first):
        return "JSON over several lines: make it one object per line (jq -c .)"
    if text.startswith("\x1e"):
        return "a JSON text sequence: remove the record separators (tr -d '\\036')"
    for delimiter in ("\t", ",", ";", "|"):
        counts = [line.count(delimiter) for line in text.splitlines()[:10] if line.strip()][:-1]
        if len(counts) > 1 and counts[0] and all(one == other for one, other in pairwise(counts)):
            return "CSV: let its name end in .csv, or say input.format=csv"
    return "" if text.startswith("{") else "text: say input.format=text if each line is one"


def looks_like(head: bytes) -> str:
    """All of that; empty where nothing can be told."""
    head = head[:HEAD]
    return as_binary(head) or as_markup(head) or (as_text(head) if head.strip() else "")


def is_text(head: bytes) -> bool:
    """Whether it is UTF-8 without control characters, as far as it goes."""
    try:
        head[:HEAD].rpartition(b" ")[0].decode()
    except UnicodeDecodeError:
        return False
    return not as_binary(head) and not CONTROL.search(head)


def _zip(head: bytes) -> str:
    if b"xl/" in head or b"[Content_Types].xml" in head:
        return f"an Excel workbook or another Office file: {TABLE}"
    if b"opendocument" in head:
        return f"an OpenDocument file: {TABLE}"
    return "a zip archive: unpack it"


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
