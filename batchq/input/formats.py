"""What an input object is by its name, its bytes as the decoders want them, and what is wrong with one that can't be
read."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import BinaryIO, cast

from batchq import storage
from batchq.config import InputFormat, suggest
from batchq.errors import BatchqError, InputError
from batchq.input import looks
from batchq.records import InputObject

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".psv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
    ".arrow": "dataset",
}
UNITS = {"jsonl": "bytes", "csv": "stream", "parquet": "rows", "text": "bytes", "dataset": "rows"}  # see `splittable`
TABLES = frozenset(format for format, unit in UNITS.items() if unit == "rows")  # formats whose files have a schema
LOGGED = frozenset({InputFormat.delta, InputFormat.iceberg})  # tables of Parquet files with a log of their own
COMPRESSIONS = (".gz", ".zst", ".bz2")
BLOCK = 4 * 1024 * 1024  # bytes read at a time: one request to a store


def format_of(name: str, configured: InputFormat) -> str:
    """The base format of an object: as configured, or by its name. Raises InputError naming the choices."""
    format, compressed = known_format(name, configured), base(name)[1]
    if not format:
        choices = ", ".join(each.value for each in InputFormat if each is not InputFormat.auto)
        raise InputError(
            f"{name}: can't tell its format by its name; set input.format to one of {choices}, "
            "or leave it out with a pattern such as folder/*.jsonl"
        )
    if compressed and format in TABLES:
        raise InputError(f"{name}: a {format} file compressed as a whole can't be read; decompress it")
    return format


def known_format(name: str, configured: InputFormat) -> str:
    """The base format of an object, empty if its name tells none."""
    path = base(name)[0]
    if configured is InputFormat.auto:
        return FORMATS.get(path.suffix.lower(), "")
    return "parquet" if configured in LOGGED else str(configured.value)


def splittable(name: str, format: str) -> str:
    """The unit that shards of an object are counted in: "rows", "bytes", or "stream" (one worker takes the whole)."""
    unit = UNITS[format]
    return "stream" if unit == "bytes" and base(name)[1] else unit


def base(name: str) -> tuple[PurePosixPath, str]:
    """The name without its compression's ending, and that ending."""
    path = PurePosixPath(name)
    compression = path.suffix.lower()
    return (path.with_suffix(""), compression) if compression in COMPRESSIONS else (path, "")


@contextmanager
def opened(obj: InputObject) -> Iterator[BinaryIO]:
    """The object's bytes, decompressed as its name says."""
    with storage.open_read(obj.uri, etag=obj.etag) as file, unpacked(obj, file) as plain:
        yield plain


@contextmanager
def unpacked(obj: InputObject, file: BinaryIO) -> Iterator[BinaryIO]:
    """The object's open file, decompressed as its name says."""
    compression = base(obj.name)[1]
    if not compression:
        yield file
        return
    from smart_open.compression import compression_wrapper

    with compression_wrapper(file, "rb", compression) as decompressed:
        yield cast(BinaryIO, decompressed)


@contextmanager
def readable(obj: InputObject, format: str) -> Iterator[None]:
    """Name the object in what decoders raise; their own words may quote it."""
    try:
        yield
    except EOFError as error:
        raise InputError(f"{obj.uri}: is cut short") from error
    except (OSError, zlib.error, ValueError, NotImplementedError) as error:
        raise InputError(f"{obj.uri}: {_damage(obj, format, str(error))}") from error
    except Exception as error:
        if type(error).__name__ == "ZstdError":  # its module is another in each version of Python
            raise InputError(f"{obj.uri}: {_damage(obj, format)}") from error
        raise


def _damage(obj: InputObject, format: str, said: str = "") -> str:
    """What is wrong with an object that can't be decoded, as far as its ends tell."""
    if format == "parquet" and "decrypt" in said:
        return "is encrypted Parquet; decrypt it, batchq takes no keys"
    text = f"is damaged, or not {format}{base(obj.name)[1]}"
    try:
        head, tail = storage.read(obj.uri, 0, looks.HEAD, etag=obj.etag), storage.read(obj.uri, suffix=4, etag=obj.etag)
    except BatchqError:
        return text
    if format == "parquet" and head.startswith(b"PAR1"):
        return text if tail == head[:4] else f"{text}: its end is missing, it was cut short"
    if not head:
        return f"{text}: it is empty"
    packed = base(obj.name)[1]
    if packed and looks.is_text(head):
        return f"{text}: it isn't packed; take {packed} off its name"
    other = looks.looks_like(head)
    itself = (packed and other.endswith(packed)) or (format == "dataset" and ".arrow" in other)
    return f"{text}: it looks like {other}" if other and not itself else text


def appearance(obj: InputObject) -> str:
    """What an object's text looks like, with the remedy if it has another format; empty if nothing tells."""
    with opened(obj) as file:
        return looks.looks_like(file.read(looks.HEAD))


def require(wanted: Iterable[str], columns: list[str], where: str) -> None:
    if missing := [name for name in wanted if name not in columns]:
        known = ", ".join(columns[:30]) + (", ..." if len(columns) > 30 else "")
        near = suggest.did_you_mean(missing[0], columns)
        raise InputError(f"{where}: no column {missing[0]} in the input; there are {known}{near}")
