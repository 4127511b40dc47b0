"""What a value is, apart from the type that holds it: a value of the input and one of the output can be compared."""

from __future__ import annotations

import base64
import datetime
import json
import math
import re
import uuid
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

DAY = 86_400 * 10**9  # nanoseconds
NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


class Moment(NamedTuple):
    """A point or a length of time: what Python's own types can't hold (nanoseconds, the year 10,000) too."""

    kind: str  # "date", "local" (no time zone), "instant", "time" (of day) or "duration"
    nanoseconds: int


def plain(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """An array's values: None, bool, int, float, Decimal, str, bytes, Moment, a list of these, a dict by field's name,
    or for a map the list of its (key, value) pairs. Dictionaries, run lengths and extensions are seen through; text
    that is no UTF-8 is bytes."""
    if isinstance(array, pa.ChunkedArray):
        return [value for chunk in array.chunks for value in plain(chunk)]
    type = array.type
    if isinstance(type, pa.BaseExtensionType):
        return plain(array.storage)
    if pa.types.is_dictionary(type):
        return plain(array.dictionary_decode())
    if pa.types.is_run_end_encoded(type):
        return plain(pc.run_end_decode(array))
    if pa.types.is_temporal(type) and not pa.types.is_interval(type):
        return _moments(array)
    if pa.types.is_struct(type):
        children = array.flatten()  # below a null there may be anything; these are null there too
        fields = [(field.name, plain(child)) for field, child in zip(type, children, strict=True)]
        return [
            {name: values[row] for name, values in fields} if there else None
            for row, there in enumerate(array.is_valid().to_pylist())
        ]
    if pa.types.is_map(type):
        return [None if each is None else [tuple(pair.values()) for pair in each] for each in _lists(array)]
    if pa.types.is_nested(type) and not pa.types.is_union(type):
        return list(_lists(array))
    if pa.types.is_float16(type):
        return array.cast(pa.float32()).to_pylist()  # type: ignore[no-any-return]
    try:
        return array.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_text(data) for data in array.cast(pa.large_binary()).to_pylist()]


def _text(data: bytes | None) -> str | bytes | None:
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError:
        return data


def _moments(array: pa.Array) -> list[Moment | None]:
    type = array.type
    if pa.types.is_date(type):
        kind, unit = "date", DAY if pa.types.is_date32(type) else 10**6
    else:
        kind = "duration" if pa.types.is_duration(type) else "time" if pa.types.is_time(type) else "local"
        kind = "instant" if pa.types.is_timestamp(type) and type.tz is not None else kind
        unit = NANOSECONDS[type.unit]
    counts = array.view(pa.int32() if type.bit_width == 32 else pa.int64()).to_pylist()
    return [None if count is None else Moment(kind, count * unit) for count in counts]


def _lists(array: pa.Array) -> Iterator[list[Any] | None]:
    """The values of lists of any kind, taken out of one flat array: null lists have no values there."""
    if pa.types.is_map(array.type):
        array = array.cast(pa.list_(pa.struct([array.type.key_field, array.type.item_field])))
    values = iter(plain(array.flatten()))
    for length in pc.list_value_length(array).to_pylist():
        yield None if length is None else [next(values) for _ in range(length)]


def same(one: Any, other: Any) -> bool:
    """Whether two values are one, whatever types held them. Numbers are compared exactly; NaN is NaN; a field that a
    struct doesn't have is null; a map is equal to an object of its pairs."""
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return all(same(one.get(name), other.get(name)) for name in one.keys() | other.keys())
    if isinstance(one, Moment) or isinstance(other, Moment):
        return type(one) is type(other) and one == other
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if _is_number(one) and _is_number(other):
        return bool(one == other)
    return type(one) is type(other) and one == other


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def same_as_text(value: Any, kept: Any) -> bool:
    """Whether what was read of JSON is that value: what JSON hasn't is text there."""
    if isinstance(value, dict) and isinstance(kept, dict):
        return all(same_as_text(value.get(name), kept.get(name)) for name in value.keys() | kept.keys())
    if isinstance(value, list | tuple) and isinstance(kept, list) and not isinstance(value, Moment):
        return len(value) == len(kept) and all(map(same_as_text, value, kept))
    return same(value, kept) or (isinstance(kept, str) and value is not None and _read(kept, value) == value)


def in_text_column(value: Any, text: str) -> bool:
    """Whether a column of strings says this of a value that is none: JSON, or the value's usual form."""
    if not isinstance(value, bool | int | float | list | tuple | dict) or isinstance(value, Moment):
        return same_as_text(value, text)
    try:
        return same_as_text(value, json.loads(text))
    except (ValueError, RecursionError):
        return False


def _read(text: str, like: Any) -> Any:
    """What text means that stands for such a value; None if it can't."""
    try:
        if isinstance(like, bytes):
            if text.encode() == like:
                return like
            return uuid.UUID(text).bytes if len(text) == 36 else base64.b64decode(text, validate=True)
        if isinstance(like, Decimal):
            return Decimal(text)
        return _moment(text, like.kind) if isinstance(like, Moment) else None
    except (ArithmeticError, ValueError):
        return None


_CLOCK = r"(\d+):(\d\d):(\d\d)(?:\.(\d{1,9}))?"
_DAY = re.compile(rf"(-?\d+)-(\d\d)-(\d\d)(?:[ T]{_CLOCK})?(Z|[+-]\d\d:?\d\d(?::?\d\d)?)?")
_LENGTH = re.compile(rf"(?:(-?\d+) days?,? )?(?:\+?{_CLOCK})?")


def _moment(text: str, kind: str) -> Moment | None:
    """A day and its clock, with the year as it is, or a length of time in days and hours."""
    if counted := re.fullmatch(r"(-?\d+) (s|ms|us|ns|days)( since 1970-01-01)?", text):
        return Moment(kind, int(counted[1]) * NANOSECONDS.get(counted[2], DAY))
    found = (_LENGTH if kind in ("time", "duration") else _DAY).fullmatch(text.strip())
    if found is None:
        return None
    if kind in ("time", "duration"):
        days, *clock = found.groups()
        return Moment(kind, int(days or 0) * DAY + _clock(*clock))
    year, month, day, *clock, zone = found.groups()
    at = _days(int(year), int(month), int(day)) * DAY + _clock(*clock)
    if zone and zone != "Z":
        digits = zone[1:].replace(":", "").ljust(6, "0")  # with seconds before there were time zones
        ahead = _clock(digits[:2], digits[2:4], digits[4:], None)
        at += ahead if zone[0] == "-" else -ahead
    return Moment(kind, at) if bool(zone) == (kind == "instant") else None


def _clock(hours: str | None, minutes: str | None, seconds: str | None, fraction: str | None) -> int:
    whole = int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0)
    return whole * 10**9 + int((fraction or "0").ljust(9, "0"))


def _days(year: int, month: int, day: int) -> int:
    """From 1970-01-01, in any year: Python's dates end with 9999. 400 years are 146,097 days."""
    eras, year = divmod(year - 2000, 400)
    return eras * 146_097 + datetime.date(2000 + year, month, day).toordinal() - datetime.date(1970, 1, 1).toordinal()
