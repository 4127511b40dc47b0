"""One Arrow type for a column that has several: the narrowest that holds every value of each, unchanged.

Whole numbers widen; whole and floating ones become floating; decimals get the digits that both need. Timestamps, times
and durations take the finest unit, and moments in several time zones are moments in UTC. Structs get the fields of
both; lists, maps and structs are united inside. Where no type holds both, a day and a moment say, the column is text:
strings as they are, anything else as JSON. A single value that doesn't fit all the same (2**53 + 1 among floats, the
year 9999 among nanoseconds) isn't the type's business: its row keeps it in batchq_extra.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types as kinds

_UNITS = ("s", "ms", "us", "ns")
_MOST_DIGITS = {8: 3, 16: 5, 32: 10, 64: 20}  # of a whole number, by its bits


def column_type(types: Iterable[pa.DataType]) -> pa.DataType:
    """The type of a column whose files have these: text if no other holds all of their values, or none in Parquet."""
    whole: pa.DataType | None = pa.null()
    for each in types:
        whole = None if whole is None else united(whole, stored(each))
    return whole if whole is not None and _in_parquet(whole) else pa.string()


def stored(type: pa.DataType) -> pa.DataType:
    """The type that Parquet gives these values back in: dictionaries, run lengths and views are only ways to store
    them, a day is a day, and seconds are counted in milliseconds."""
    if kinds.is_dictionary(type) or kinds.is_run_end_encoded(type):
        return stored(type.value_type)
    if kinds.is_large_list(type) or kinds.is_large_list_view(type):
        return pa.large_list(stored(type.value_type))
    if kinds.is_list(type) or kinds.is_list_view(type):
        return pa.list_(stored(type.value_type))
    if kinds.is_fixed_size_list(type):
        return pa.list_(stored(type.value_type), type.list_size)
    if kinds.is_struct(type):
        return pa.struct([(field.name, stored(field.type)) for field in type])
    if kinds.is_map(type):
        return pa.map_(stored(type.key_type), stored(type.item_type))
    if kinds.is_string_view(type):
        return pa.string()
    if kinds.is_binary_view(type):
        return pa.binary()
    if kinds.is_date64(type):
        return pa.date32()
    if kinds.is_timestamp(type) and type.unit == "s":
        return pa.timestamp("ms", type.tz)
    if kinds.is_time32(type):
        return pa.time32("ms")
    if kinds.is_decimal32(type) or kinds.is_decimal64(type):
        return pa.decimal128(type.precision, type.scale)
    return type


def united(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both, each as `stored` gives it; None where only text does."""
    if one == other or kinds.is_null(other):
        return one
    if kinds.is_null(one):
        return other
    if isinstance(one, pa.BaseExtensionType) or isinstance(other, pa.BaseExtensionType):
        return None
    for rule in (_number, _bytes, _time, _nested):
        if (found := rule(one, other)) is not None:
            return found
    return None


def _number(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if kinds.is_integer(one) and kinds.is_integer(other):
        return _integer(one, other)
    if kinds.is_floating(one) and kinds.is_floating(other):
        return max(one, other, key=lambda each: each.bit_width)
    if kinds.is_integer(one) and kinds.is_floating(other):
        # 24 bits of a float32 are digits
        return pa.float32() if one.bit_width <= 16 and other.bit_width <= 32 else pa.float64()
    if kinds.is_floating(one) and kinds.is_integer(other):
        return _number(other, one)
    ones, others = _digits(one), _digits(other)
    if ones is None or others is None:
        return None
    before, after = map(max, ones, others)
    if before + after > 76:
        return None
    return (pa.decimal128 if before + after <= 38 else pa.decimal256)(before + after, after)


def _integer(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if kinds.is_signed_integer(one) == kinds.is_signed_integer(other):
        return max(one, other, key=lambda each: each.bit_width)
    signed, unsigned = (one, other) if kinds.is_signed_integer(one) else (other, one)
    bits = max(signed.bit_width, 2 * unsigned.bit_width)
    return {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}.get(bits, pa.decimal128(_MOST_DIGITS[64], 0))


def _digits(type: pa.DataType) -> tuple[int, int] | None:
    """Digits before and after the point."""
    if kinds.is_integer(type):
        return _MOST_DIGITS[type.bit_width], 0
    return (type.precision - type.scale, type.scale) if kinds.is_decimal(type) else None


def _bytes(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if is_text(one) and is_text(other):
        return pa.large_string()
    if is_binary(one) and is_binary(other):
        return pa.large_binary() if pa.large_binary() in (one, other) else pa.binary()
    return None


def is_text(type: pa.DataType) -> bool:
    return bool(kinds.is_string(type) or kinds.is_large_string(type) or kinds.is_string_view(type))


def is_binary(type: pa.DataType) -> bool:
    return bool(kinds.is_binary(type) or kinds.is_large_binary(type) or kinds.is_fixed_size_binary(type))


def _time(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if kinds.is_timestamp(one) and kinds.is_timestamp(other):
        if (one.tz is None) != (other.tz is None):
            return None
        return pa.timestamp(_finest(one, other), one.tz if one.tz == other.tz else "UTC")
    if kinds.is_time(one) and kinds.is_time(other):
        unit = _finest(one, other)
        return pa.time32(unit) if unit == "ms" else pa.time64(unit)
    if kinds.is_duration(one) and kinds.is_duration(other):
        return pa.duration(_finest(one, other))
    return None


def _finest(one: pa.DataType, other: pa.DataType) -> str:
    return _UNITS[max(_UNITS.index(one.unit), _UNITS.index(other.unit))]


def _nested(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if is_list(one) and is_list(other):
        item = united(one.value_type, other.value_type)
        large = kinds.is_large_list(one) or kinds.is_large_list(other)
        return None if item is None else pa.large_list(item) if large else pa.list_(item)
    if kinds.is_map(one) and kinds.is_map(other):
        key, item = united(one.key_type, other.key_type), united(one.item_type, other.item_type)
        return None if key is None or item is None else pa.map_(key, item)
    if kinds.is_struct(one) and kinds.is_struct(other):
        fields: dict[str, pa.DataType] = {}
        for field in (*one, *other):
            type = united(fields.get(field.name, pa.null()), field.type)
            if type is None:
                return None
            fields[field.name] = type
        repeated = any(len({field.name for field in each}) < each.num_fields for each in (one, other))
        return None if repeated else pa.struct(list(fields.items()))
    return None


def is_list(type: pa.DataType) -> bool:
    return bool(kinds.is_list(type) or kinds.is_large_list(type) or kinds.is_fixed_size_list(type))


@functools.lru_cache(maxsize=1024)
def _in_parquet(type: pa.DataType) -> bool:
    """Whether Parquet has a form for it: it has none for an interval, a union or a struct without fields."""
    try:
        pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([("column", type)])).close()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError):
        return False
    return True
