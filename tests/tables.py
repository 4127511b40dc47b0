"""Random inputs: a few files of a format, their columns of types that differ, and what each row of them holds."""

from __future__ import annotations

import csv
import functools
import io
import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

FORMATS = ("parquet", "arrow", "jsonl", "csv")
NAMES = [
    "a",
    "A",
    " a",
    "a.b",
    "é",
    "e\u0301",
    "日本",
    "two\nlines",
    'q"uote',
    "0",
    "🙂",
    "a/b",
    "{x}",
    "batch",
    "None",
    "id",
]
UNITS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}

TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "null", "1", "1.0", "true", "NaN", "[]", "{}", '"', "a\nb", "a\r\nb", "\x00", "\u2028", "ﷺ", "🧑‍🚀"]
    ),
    st.text(st.characters(codec="utf-8"), max_size=6),
)
FLOATS = [
    0.0,
    -0.0,
    1.0,
    0.1,
    4.5,
    1e300,
    5e-324,
    2.0**53,
    2.0**53 + 2,
    1e16,
    float("inf"),
    float("-inf"),
    float("nan"),
]


def _integers(bits: int, signed: bool = True) -> st.SearchStrategy[int]:
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    edges = [low, low + 1, -1 if signed else 0, 0, 1, high - 1, high, (1 << 24) + 1, (1 << 53) + 1, 86_400_000]
    return st.one_of(st.sampled_from([edge for edge in edges if low <= edge <= high]), st.integers(low, high))


def _decimals(precision: int, scale: int) -> st.SearchStrategy[Decimal]:
    most = 10**precision - 1
    return st.one_of(st.sampled_from([0, 1, -1, most, -most]), st.integers(-most, most)).map(
        lambda digits: Decimal((digits < 0, tuple(map(int, str(abs(digits)))), -scale))
    )


def _timestamps(unit: str) -> st.SearchStrategy[int]:
    low, high = (
        -(2**63) // (UNITS[unit] // 10**6 or 1) + 1,
        2**63 // (UNITS[unit] // 10**6 or 1) - 1,
    )  # Parquet has no seconds
    usual = [0, -1, 1, 1_700_000_000 * 10**9 // UNITS[unit], 253_402_300_800 * 10**9 // UNITS[unit]]  # the year 10,000
    return st.one_of(
        st.sampled_from([low, high, *(each for each in usual if low <= each <= high)]), st.integers(low, high)
    )


DAYS = st.one_of(
    st.sampled_from([0, -1, 19_000, 2_932_896, 2_932_897]), st.integers(-(2**31), 2**31 - 1)
)  # to 9999-12-31, after

# Types that people's files disagree about, and raw values of each; those of time as numbers, which may be any.
FAMILIES: list[dict[pa.DataType, st.SearchStrategy[Any]]] = [
    {
        **{pa.type_for_alias(f"int{bits}"): _integers(bits) for bits in (8, 16, 32, 64)},
        **{pa.type_for_alias(f"uint{bits}"): _integers(bits, signed=False) for bits in (8, 16, 32, 64)},
        pa.float16(): st.floats(width=16),
        pa.float32(): st.one_of(st.sampled_from([0.0, 1.0, 0.5, 16777216.0]), st.floats(width=32)),
        pa.float64(): st.one_of(st.sampled_from(FLOATS), st.floats()),
        pa.decimal128(9, 2): _decimals(9, 2),
        pa.decimal128(38, 0): _decimals(38, 0),
        pa.decimal128(38, 38): _decimals(38, 38),
        pa.decimal256(76, 10): _decimals(76, 10),
        pa.bool_(): st.booleans(),
    },
    {
        pa.string(): TEXTS,
        pa.large_string(): TEXTS,
        pa.dictionary(pa.int32(), pa.string()): TEXTS,
        pa.binary(): st.binary(max_size=4),
        pa.large_binary(): st.binary(max_size=4),
        pa.binary(16): st.binary(min_size=16, max_size=16),
        pa.uuid(): st.binary(min_size=16, max_size=16),
    },
    {
        pa.date32(): DAYS,
        pa.date64(): DAYS.map(lambda days: days * 86_400_000),
        **{pa.timestamp(unit): _timestamps(unit) for unit in UNITS},
        **{pa.timestamp(unit, tz): _timestamps(unit) for unit in UNITS for tz in ("UTC", "Europe/Berlin")},
    },
    {
        **{pa.time32(unit): st.integers(0, 86_400 * 10**9 // UNITS[unit] - 1) for unit in ("s", "ms")},
        **{pa.time64(unit): st.integers(0, 86_400 * 10**9 // UNITS[unit] - 1) for unit in ("us", "ns")},
        **{pa.duration(unit): _timestamps(unit) for unit in UNITS},
    },
    {pa.null(): st.none()},
]
RAW = {type: raw for family in FAMILIES for type, raw in family.items()}
FLAT = operator.itemgetter(0)
SHAPES: list[Callable[[list[pa.DataType]], pa.DataType]] = [
    FLAT,
    FLAT,
    lambda types: pa.list_(types[0]),
    lambda types: pa.large_list(types[0]),
    lambda types: pa.list_(types[0], 2),
    lambda types: pa.struct([("x", types[0])]),
    lambda types: pa.struct([("x", types[0]), ("y", types[1])]),
    lambda types: pa.list_(pa.struct([("y", types[1]), ("role", pa.string())])),
    lambda types: pa.map_(pa.string(), types[0]),
]
JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        _integers(8),
        _integers(70),
        st.sampled_from([f for f in FLOATS if abs(f) < float("inf")]),
        st.floats(allow_nan=False, allow_infinity=False),
        TEXTS,
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["x", "y", "é"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@dataclass(frozen=True)
class File:
    """`rows`: what it holds, each value as `canonical` has it; `ids`: how each row is called below the file's name."""

    name: str
    data: bytes
    rows: list[dict[str, Any]]
    ids: list[str]
    types: str = ""

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        printer.text(f"{self.name}: {self.types or self.data!r}\n{self.rows}\n")


def files(draw: st.DrawFn, format: str) -> list[File]:
    """One to three files; each has the column `text`, which the prompt reads, and some of the same others."""
    names = draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True))
    count = draw(st.integers(1, 3))
    if format == "csv":
        names = [name for name in names if name == name.strip()]  # blanks around names are taken off
        return [_csv(draw, f"f{n}.csv", draw(st.permutations(["text", *names]))) for n in range(count)]
    if format == "jsonl":
        return [_json_lines(draw, f"f{n}.jsonl", names) for n in range(count)]
    likely = {name: _types(draw) for name in names}
    return [_table(draw, f"f{n}.{format}", likely) for n in range(count)]


def canonical(scalar: Any) -> Any:
    """An Arrow value as plain Python: one of time as a Moment, a map as a list of pairs, whatever the type."""
    type = scalar.type
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.ExtensionScalar | pa.DictionaryScalar):
        return canonical(scalar.value)
    if pa.types.is_date(type):
        return Moment("date", scalar.value * (86_400 * 10**9 if pa.types.is_date32(type) else 10**6), scalar)
    if pa.types.is_timestamp(type):
        return Moment("instant" if type.tz else "local", scalar.value * UNITS[type.unit], scalar)
    if pa.types.is_time(type) or pa.types.is_duration(type):
        return Moment("time" if pa.types.is_time(type) else "duration", scalar.value * UNITS[type.unit], scalar)
    if pa.types.is_map(type):
        return [tuple(canonical(each) for each in pair.values()) for pair in scalar.values]
    if pa.types.is_struct(type):
        return {name: canonical(each) for name, each in scalar.items()}
    if pa.types.is_nested(type):
        return [canonical(each) for each in scalar.values]
    return float(scalar.as_py()) if pa.types.is_floating(type) else scalar.as_py()


@dataclass(frozen=True)
class Moment:
    """A point or a length of time, whatever its unit."""

    kind: str  # "date", "local", "instant", "time" or "duration"
    nanoseconds: int
    scalar: pa.Scalar = field(compare=False)

    def __repr__(self) -> str:
        return f"{self.kind} {self.nanoseconds}"

    def is_written(self, text: str) -> bool:
        """Whether text says it as Python does, or as Arrow does what is beyond Python's range."""
        if counted := re.fullmatch(r"(-?\d+) (s|ms|us|ns|days)( since 1970-01-01)?", text):
            return int(counted[1]) * UNITS.get(counted[2], 86_400 * 10**9) == self.nanoseconds
        if self.scalar.type != pa.time64("ns"):  # Python's time ends with microseconds
            try:
                return text == str(self.scalar.as_py())
            except (ValueError, OverflowError):
                pass
        local = pa.timestamp(self.scalar.type.unit) if self.kind == "instant" else self.scalar.type
        zone = "Z" if self.kind == "instant" else ""
        return _short(text) == _short(self.scalar.cast(local).cast(pa.string()).as_py() + zone)


def _short(text: str) -> str:
    """Without zeros at the end of a fraction: what is seconds here may be milliseconds there."""
    return re.sub(r"\.(?!\d)", "", re.sub(r"(\.\d*?)0+(?!\d)", r"\1", text))


# ---- tables ----


def _types(draw: st.DrawFn) -> tuple[list[pa.DataType], Callable[[list[pa.DataType]], pa.DataType]]:
    """What files are likely to have a column as: types of one family, in one shape."""
    return list(draw(st.sampled_from(FAMILIES))), draw(st.sampled_from(SHAPES))


def _table(draw: st.DrawFn, name: str, likely: dict[str, Any]) -> File:
    rows = draw(st.integers(0, 4))
    columns = {"text": pa.array([f"row {n}" for n in range(rows)], pa.string())}
    for column in draw(st.permutations(list(likely))):
        if draw(st.integers(0, 5)):  # else it isn't in this file
            family, shape = likely[column] if draw(st.integers(0, 7)) else _types(draw)
            inner = [draw(st.sampled_from(family)), draw(st.sampled_from(family))]
            if shape is not FLAT:  # pyarrow makes no lists of extension types
                inner = [pa.binary(16) if type == pa.uuid() else type for type in inner]
            type = shape(inner)
            columns[column] = _array(type, draw(st.lists(_raw(type), min_size=rows, max_size=rows)))
    table = pa.table(columns)
    sink = io.BytesIO()
    if name.endswith(".parquet"):
        pq.write_table(table, sink, row_group_size=draw(st.integers(1, 4)))
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=draw(st.integers(1, 4)))
    values = [{column: canonical(table[column][n]) for column in table.column_names} for n in range(rows)]
    return File(name, sink.getvalue(), values, [f"{name}:{n}" for n in range(rows)], str(table.schema))


def _array(type: pa.DataType, raw: list[Any]) -> pa.Array:
    if isinstance(type, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(type, pa.array(raw, type.storage_type))
    if pa.types.is_dictionary(type):
        return pa.array(raw, type.value_type).dictionary_encode()
    return pa.array(raw, type)


@functools.cache
def _raw(type: pa.DataType) -> st.SearchStrategy[Any]:
    """What `pa.array` makes values of the type of, null among them."""
    if type in RAW:
        return st.none() | RAW[type]
    if pa.types.is_struct(type):
        return st.none() | st.fixed_dictionaries({field.name: _raw(field.type) for field in type})
    if pa.types.is_map(type):
        return st.none() | st.lists(st.tuples(TEXTS, _raw(type.item_type)), max_size=2)
    size = type.list_size if pa.types.is_fixed_size_list(type) else None
    return st.none() | st.lists(_raw(type.value_type), min_size=size or 0, max_size=size or 2)


# ---- text ----


def _json_lines(draw: st.DrawFn, name: str, names: list[str]) -> File:
    rows, ids, data = [], [], b""
    for number in range(draw(st.integers(0, 4))):
        row = {"text": f"row {number}"} | {column: draw(JSON) for column in names if draw(st.integers(0, 5))}
        ids.append(f"{name}@{len(data)}")
        rows.append(row)
        data += json.dumps(row, ensure_ascii=draw(st.booleans())).encode() + draw(
            st.sampled_from([b"\n", b"\r\n", b"\n\n"])
        )
    return File(name, data, rows, ids)


def _csv(draw: st.DrawFn, name: str, names: list[str]) -> File:
    rows = [
        {column: f"row {number}" if column == "text" else draw(TEXTS) for column in names}
        for number in range(draw(st.integers(0, 4)))
    ]
    text = io.StringIO()
    ends = draw(st.sampled_from(["\n", "\r\n"]))  # with the first Python leaves \r unquoted, which ends a line too
    writer = csv.writer(text, lineterminator=ends, quoting=csv.QUOTE_ALL if ends == "\n" else csv.QUOTE_MINIMAL)
    writer.writerows([names, *([row[column] for column in names] for row in rows)])
    return File(name, text.getvalue().encode(), rows, [f"{name}:{number}" for number in range(len(rows))])
