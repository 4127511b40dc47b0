"""The user's columns in the output: no value is another one, whatever types the input's files and rows have."""

from __future__ import annotations

import base64
import datetime as dt
import gzip
import itertools
import json
import uuid
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from batchq.cli.verify import verify
from batchq.config import Config
from batchq.errors import InputError
from batchq.input.types import column_type
from batchq.output.schema import schema_from_text
from tests.helpers import rows_of, write_jsonl
from tests.inputs import write
from tests.jobs import completed, planned
from tests.jobs import finished as unverified

UTC = dt.UTC


def finished(config: Config) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Plan, label, finish; `verify` says the same by readers of its own."""
    done = unverified(config)
    whole, words = verify(config)
    assert whole, words
    return done


NOON = dt.datetime(2026, 1, 31, 12, 0, 0, 123456)
CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
TOOLS = pa.list_(pa.struct([("role", pa.string()), ("tool_calls", pa.list_(pa.string())), ("content", pa.string())]))

# A column's type in a file, and a value that another type is likely to change.
COLUMNS: list[tuple[pa.DataType, Any]] = [
    (pa.null(), None),
    (pa.bool_(), True),
    (pa.int8(), -7),
    (pa.uint8(), 200),
    (pa.int32(), 2**31 - 1),
    (pa.int64(), 2**53 + 1),
    (pa.uint64(), 2**64 - 1),
    (pa.float16(), 0.5),
    (pa.float32(), 1.5),
    (pa.float64(), 0.1),
    (pa.decimal128(9, 2), Decimal("1234567.89")),
    (pa.decimal128(38, 0), Decimal(10**37)),
    (pa.decimal128(38, 38), Decimal("0." + "1" * 38)),
    (pa.decimal256(76, 4), Decimal("1" * 72 + ".1234")),
    (pa.string(), "urgent"),
    (pa.large_string(), "a large one"),
    (pa.dictionary(pa.int32(), pa.string()), "of a dictionary"),
    (pa.binary(), b"\xff\x00"),
    (pa.large_binary(), b"\xff"),
    (pa.binary(3), b"abc"),
    (pa.date32(), dt.date(2026, 1, 31)),
    (pa.date64(), dt.date(2026, 2, 1)),
    (pa.timestamp("s"), NOON.replace(microsecond=0)),
    (pa.timestamp("ms"), NOON.replace(microsecond=123000)),
    (pa.timestamp("us"), NOON),
    (pa.timestamp("ns"), NOON),
    (pa.timestamp("us", "UTC"), NOON.replace(tzinfo=UTC)),
    (pa.timestamp("ms", "Europe/Berlin"), NOON.replace(microsecond=0, tzinfo=ZoneInfo("Europe/Berlin"))),
    (pa.time32("s"), dt.time(12, 30)),
    (pa.time64("us"), dt.time(12, 30, 0, 1)),
    (pa.duration("s"), dt.timedelta(seconds=5)),
    (pa.duration("us"), dt.timedelta(microseconds=5)),
    (pa.list_(pa.int32()), [1, None]),
    (pa.list_(pa.float64()), [0.25]),
    (pa.list_(pa.string()), ["a", "b"]),
    (pa.large_list(pa.int64()), [2**60]),
    (pa.list_(pa.int64(), 2), [1, 2]),
    (pa.list_(pa.dictionary(pa.int8(), pa.string())), ["in a list"]),
    (pa.struct([("x", pa.int64())]), {"x": 1}),
    (pa.struct([("y", pa.string()), ("x", pa.float64())]), {"y": "z", "x": 0.5}),
    (pa.struct([("x", pa.string())]), {"x": "one"}),
    (CHAT, [{"role": "user", "content": "hi"}]),
    (TOOLS, [{"role": "user", "tool_calls": ["f"], "content": None}]),
    (pa.map_(pa.string(), pa.int32()), [("a", 1)]),
    (pa.map_(pa.string(), pa.float64()), [("b", 0.5)]),
    (pa.uuid(), uuid.UUID(int=2**100)),
    (pa.month_day_nano_interval(), pa.MonthDayNano([1, 2, 3])),
    (pa.run_end_encoded(pa.int32(), pa.int64()), 5),
    (pa.string_view(), "in view"),
]
IN_PARQUET = [each for each in COLUMNS if not (pa.types.is_interval(each[0]) or pa.types.is_run_end_encoded(each[0]))]


def unchanged(before: Any, after: Any) -> bool:
    """Whether the output's value is the input's: in another type, but the same number, moment, text or bytes."""
    if isinstance(before, dict):
        return isinstance(after, dict) and all(
            unchanged(before.get(key), after.get(key)) for key in before.keys() | after.keys()
        )
    if isinstance(before, list):
        return isinstance(after, list) and len(before) == len(after) and all(map(unchanged, before, after))
    if isinstance(before, bool) or isinstance(after, bool):
        return before is after
    if isinstance(before, dt.datetime) and hasattr(after, "to_pydatetime"):
        after = after.to_pydatetime()
    if isinstance(before, int | float | Decimal):
        return isinstance(after, int | float | Decimal) and bool(before == after)
    if isinstance(before, tuple) and not isinstance(before, pa.MonthDayNano):
        return isinstance(after, tuple) and all(map(unchanged, before, after))
    return bool(type(before) is type(after) and before == after)


def as_text(value: Any) -> str:
    """How a text column or batchq_extra holds a value."""
    if isinstance(value, bytes):
        return value.decode() if value.isascii() else base64.b64encode(value).decode()
    if isinstance(value, bool | int | float | list | dict | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def write_table(path: Path, columns: dict[str, tuple[pa.DataType, Any]], rows: list[dict[str, Any]]) -> None:
    """Rows of a file with more columns, all of them with the same value in each row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    for name, (type, value) in columns.items():
        plain = type.value_type if pa.types.is_run_end_encoded(type) else type
        array = pa.array([value] * len(rows), plain)
        table = table.append_column(name, pc.run_end_encode(array) if plain != type else array)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize(("ending", "columns"), [("parquet", IN_PARQUET), ("arrow", COLUMNS)])
def test_no_pair_of_types_changes_a_value(
    compose: Callable[..., Config], project: Path, ending: str, columns: list[tuple[pa.DataType, Any]]
) -> None:
    pairs = {f"{i}": pair for i, pair in enumerate(itertools.combinations_with_replacement(columns, 2))}
    for side, file in enumerate("ab"):
        write_table(project / f"in/{file}.{ending}", {n: pair[side] for n, pair in pairs.items()}, rows_of(1))
    _, found, code = finished(compose("input.path=in"))
    assert code == 0 and len(found) == 2 and not any(row["batchq_error"] for row in found)
    changed = []
    for row in found:
        side = row["batchq_id"].startswith("b")
        extra = json.loads(row["batchq_extra"] or "{}")
        for name, pair in pairs.items():
            before, after = pair[side][1], row[name]
            if not unchanged(before, after) and as_text(before) not in (after, as_text(extra.get(name))):
                changed.append((*(str(type) for type, _ in pair), before, after, extra.get(name)))
    assert not changed, f"{len(changed)} changed, the first: {changed[:5]}"


STRUCT_X = pa.struct([("x", pa.int64())])


@pytest.mark.parametrize(
    ("types", "whole"),
    [
        ([pa.null(), pa.int32()], pa.int32()),
        ([pa.null(), pa.null()], pa.null()),
        ([pa.null(), STRUCT_X], STRUCT_X),
        ([pa.int32(), pa.int64()], pa.int64()),
        ([pa.int8(), pa.uint8()], pa.int16()),
        ([pa.uint32(), pa.int32()], pa.int64()),
        ([pa.int64(), pa.uint64()], pa.decimal128(20, 0)),
        ([pa.int64(), pa.float64()], pa.float64()),
        ([pa.int16(), pa.float32()], pa.float32()),
        ([pa.int32(), pa.float32()], pa.float64()),
        ([pa.float32(), pa.float64()], pa.float64()),
        ([pa.bool_(), pa.int64()], pa.string()),
        ([pa.decimal128(9, 2), pa.decimal128(12, 4)], pa.decimal128(12, 4)),
        ([pa.decimal128(38, 0), pa.decimal128(10, 2)], pa.decimal256(40, 2)),
        ([pa.decimal128(9, 2), pa.int32()], pa.decimal128(12, 2)),
        ([pa.decimal128(9, 2), pa.float64()], pa.string()),
        ([pa.string(), pa.large_string()], pa.large_string()),
        ([pa.string(), pa.dictionary(pa.int8(), pa.string())], pa.string()),
        ([pa.string(), pa.int64()], pa.string()),
        ([pa.string(), pa.binary()], pa.string()),
        ([pa.string(), pa.list_(pa.string())], pa.string()),
        ([pa.binary(16), pa.binary()], pa.binary()),
        ([pa.timestamp("ms"), pa.timestamp("us")], pa.timestamp("us")),
        ([pa.timestamp("ms", "UTC"), pa.timestamp("us", "Asia/Tokyo")], pa.timestamp("us", "UTC")),
        ([pa.timestamp("us"), pa.timestamp("us", "UTC")], pa.string()),
        ([pa.date32(), pa.timestamp("us")], pa.string()),
        ([pa.date32(), pa.date64()], pa.date32()),
        ([pa.time32("ms"), pa.time64("us")], pa.time64("us")),
        ([pa.list_(pa.int32()), pa.list_(pa.float64())], pa.list_(pa.float64())),
        ([pa.list_(pa.int32(), 3), pa.list_(pa.int32(), 4)], pa.list_(pa.int32())),
        ([pa.list_(pa.int32()), pa.list_(pa.string())], pa.string()),
        ([STRUCT_X, pa.struct([("y", pa.string())])], pa.struct([("x", pa.int64()), ("y", pa.string())])),
        ([STRUCT_X, pa.struct([("x", pa.float64())])], pa.struct([("x", pa.float64())])),
        ([STRUCT_X, pa.struct([("x", pa.string())])], pa.string()),
        ([pa.map_(pa.string(), pa.int32()), pa.map_(pa.string(), pa.int64())], pa.map_(pa.string(), pa.int64())),
        ([pa.uuid(), pa.uuid()], pa.uuid()),
        ([pa.uuid(), pa.binary(16)], pa.string()),
        ([pa.month_day_nano_interval()], pa.string()),
        ([pa.struct([])], pa.string()),
    ],
    ids=lambda each: "+".join(map(str, each)) if isinstance(each, list) else "",
)
def test_the_type_of_a_column_holds_the_values_of_all_files(types: list[pa.DataType], whole: pa.DataType) -> None:
    assert column_type(types) == whole
    assert column_type(types[::-1]) == whole or pa.types.is_struct(whole)  # whose fields come in the files' order


def test_whole_numbers_beyond_floats_stay_what_they_are(compose: Callable[..., Config], project: Path) -> None:
    """Ids that pandas made floats of in the file that has a null: small ones are floats, large ones text."""
    for file, (small, large) in {"a": (7, 2**53 + 1), "b": (0.5, 1.0)}.items():
        columns = {"small": (pa.scalar(small).type, small), "large": (pa.scalar(large).type, large)}
        write_table(project / f"in/{file}.parquet", columns, rows_of(1))
    _, found, _ = finished(compose("input.path=in"))
    assert [(row["small"], row["large"]) for row in found] == [(7.0, str(2**53 + 1)), (0.5, "1.0")]
    assert type(found[0]["small"]) is float


def test_a_value_that_does_not_fit_the_finest_unit_is_kept_beside_it(
    compose: Callable[..., Config], project: Path
) -> None:
    for file, type, value in [
        ("a", pa.timestamp("us"), dt.datetime(9999, 12, 31)),
        ("b", pa.timestamp("ns"), NOON),
    ]:
        write_table(project / f"in/{file}.parquet", {"until": (type, value)}, rows_of(1))
    _, (first, second), code = finished(compose("input.path=in"))
    assert code == 0 and first["label"] and first["until"] is None
    assert json.loads(first["batchq_extra"]) == {"until": "9999-12-31 00:00:00"}
    assert (second["until"].to_pydatetime(), second["batchq_extra"]) == (NOON, None)


# What is usual in a JSONL column, what a late row has there, and what batchq_extra holds of that.
DRIFTS: list[tuple[Any, Any, str | None]] = [
    (3, 4.5, "4.5"),
    (3, 4.0, None),
    (3, -0.0, "-0.0"),
    (3, 2**70, str(2**70)),
    (3, True, "true"),
    (3, "N/A", '"N/A"'),
    (3, {"now": "an object"}, '{"now": "an object"}'),
    (0.5, 4, None),
    (0.5, 2**53 + 1, str(2**53 + 1)),
    (0.5, False, "false"),
    (True, 1, "1"),
    (["a"], "urgent", '"urgent"'),
    (["a"], ["b", 1], '["b", 1]'),
    ([1], [2.5], "[2.5]"),
    ([1], [True], "[true]"),
    ([1], [2.0, None], None),
    ([0.5], [1, None], None),
    ([0.5], [[1]], "[[1]]"),
]


def test_a_late_row_of_another_type_keeps_its_values_and_its_answer(
    compose: Callable[..., Config], project: Path
) -> None:
    rows = rows_of(1100, **{f"{i}": usual for i, (usual, _, _) in enumerate(DRIFTS)})  # 1,000 are sampled
    rows[-1].update({f"{i}": drifted for i, (_, drifted, _) in enumerate(DRIFTS)}, late="a new key")
    write_jsonl(project / "rows.jsonl", rows)
    _, found, code = finished(compose("output.rows_per_shard=2000"))
    (row,) = (row for row in found if row["id"] == 1099)
    assert code == 0 and row["label"] and not row["batchq_error"]
    kept = {f"{i}": json.loads(text) for i, (_, _, text) in enumerate(DRIFTS) if text}
    assert row["batchq_extra"] == json.dumps({**kept, "late": "a new key"})
    for i, (_, drifted, text) in enumerate(DRIFTS):
        assert row[f"{i}"] == (None if text else drifted)
    assert all(row["batchq_extra"] is None for row in found if row["id"] != 1099)


def test_rows_all_over_a_large_file_are_sampled(compose: Callable[..., Config], project: Path) -> None:
    rows = rows_of(3000, score=3, pad="x" * 4096)
    for row in rows[2000:]:
        row["score"] = 4.5
    write_jsonl(project / "rows.jsonl", rows)
    assert input_schema(compose())["score"] == pa.float64()


def input_schema(config: Config) -> dict[str, pa.DataType]:
    schema = schema_from_text(planned(config).schema)
    return {field.name: field.type for field in schema}


@pytest.mark.parametrize(
    ("values", "type", "kept"),
    [
        ([3, 4.5], pa.float64(), [3.0, 4.5]),
        ([2**53 + 1, 4.5], pa.string(), [str(2**53 + 1), "4.5"]),
        ([None, 1], pa.int64(), [None, 1]),
        ([1, "a"], pa.string(), ["1", "a"]),
        ([True, 1], pa.string(), ["true", "1"]),
        ([[1], [0.5]], pa.list_(pa.float64()), [[1.0], [0.5]]),
        ([[1], ["a"]], pa.string(), ["[1]", '["a"]']),
        ([[], [1]], pa.list_(pa.int64()), [[], [1]]),
        ([{"a": 1}, {"a": 1.5}], pa.string(), ['{"a": 1}', '{"a": 1.5}']),
    ],
    ids=repr,
)
def test_json_files_of_other_types(
    compose: Callable[..., Config], project: Path, values: list[Any], type: pa.DataType, kept: list[Any]
) -> None:
    for i, value in enumerate(values):
        write_jsonl(project / f"in/{i}.jsonl", rows_of(1, value=value))
    config = compose("input.path=in")
    assert input_schema(config)["value"] == type
    _, found, _ = finished(config)
    assert [row["value"] for row in found] == kept and not any(row["batchq_extra"] for row in found)


def test_a_column_that_other_files_have_is_null_where_it_is_not(compose: Callable[..., Config], project: Path) -> None:
    write_table(project / "in/a.parquet", {}, rows_of(1))
    write_table(project / "in/b.parquet", {"region": (pa.string(), "north")}, rows_of(1))
    _, found, code = finished(compose("input.path=in"))
    assert code == 0 and [row["region"] for row in found] == [None, "north"]


OUT_OF_RANGE = pa.array([0, 10**15], pa.int64()).cast(pa.timestamp("ms"))  # the year 33658
BROKEN_TEXT = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xff\xfe")]
)


@pytest.mark.parametrize(
    ("column", "reads", "error", "extra"),
    [
        (OUT_OF_RANGE, False, None, None),
        (OUT_OF_RANGE, True, "invalid_value", None),
        (BROKEN_TEXT, False, None, '{"odd": "//4="}'),
        (BROKEN_TEXT, True, "invalid_utf8", '{"odd": "//4="}'),
    ],
    ids=["a date", "a date that is read", "text", "text that is read"],
)
def test_a_value_that_python_cannot_hold_costs_an_answer_only_where_the_prompt_reads_it(
    compose: Callable[..., Config], project: Path, column: pa.Array, reads: bool, error: str | None, extra: str | None
) -> None:
    table = pa.Table.from_pylist(rows_of(2)).append_column("odd", column)
    pq.write_table(table, project / "rows.parquet")
    prompt = "task.prompt='{{ text }} {{ odd }}'" if reads else "task.prompt='{{ text }} {{ row.id }}'"
    config = compose("input.path=rows.parquet", "task.gold=null", prompt)
    completed(config)
    whole, words = verify(config)
    assert whole, words
    (part,) = (project / "out/data").iterdir()
    found = pq.read_table(part)
    assert found["batchq_error"].to_pylist() == [None, error]
    assert found["batchq_extra"].to_pylist() == [None, extra]
    assert found["odd"].combine_chunks().equals(column if extra is None else pa.array(["a", None]))


def test_gold_that_python_cannot_hold_is_no_gold(compose: Callable[..., Config], project: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows_of(2)).append_column("at", OUT_OF_RANGE), project / "rows.parquet")
    _, found, _ = finished(compose("input.path=rows.parquet", "task.gold=at", "output.columns=[id]"))
    assert all(row["label"] for row in found)


def test_timestamps_as_spark_wrote_them_reach_the_year_9999(compose: Callable[..., Config], project: Path) -> None:
    until = [NOON, dt.datetime(9999, 12, 31)]
    table = pa.Table.from_pylist(rows_of(2)).append_column("until", pa.array(until, pa.timestamp("us")))
    pq.write_table(table, project / "rows.parquet", use_deprecated_int96_timestamps=True)
    _, found, _ = finished(compose("input.path=rows.parquet"))
    assert [row["until"] for row in found] == until


def test_two_columns_of_one_name_end_the_plan_in_one_line(compose: Callable[..., Config], project: Path) -> None:
    table = pa.Table.from_pylist(rows_of(1))
    pq.write_table(table.append_column("id", pa.array([2])), project / "rows.parquet")
    with pytest.raises(InputError, match=r"rows\.parquet: has more than one column id$"):
        planned(compose("input.path=rows.parquet"))


def test_folders_named_key_value_are_columns(compose: Callable[..., Config], project: Path) -> None:
    for folder in ("year=2026/month=01/zone=eu", "year=2026/month=12/zone=__HIVE_DEFAULT_PARTITION__"):
        write_table(project / f"in/{folder}/a.parquet", {}, rows_of(1))
    write_table(project / "in/year=1999/zone=a%20b/own.parquet", {"month": (pa.int32(), 3)}, rows_of(1))
    config = compose("input.path=in", "task.prompt='{{ text }} in {{ year }}'")
    _, found, _ = finished(config)
    assert [(row["year"], row["month"], row["zone"]) for row in found] == [
        (1999, 3, "a b"),
        (2026, 1, "eu"),
        (2026, 12, None),
    ]
    assert input_schema(config)["year"] == pa.int64()


@pytest.mark.parametrize("ending", ["jsonl", "csv", "jsonl.gz"])
def test_folders_of_text_files_are_columns_too(compose: Callable[..., Config], project: Path, ending: str) -> None:
    for day in ("1", "x"):
        text = 'id,text,gold\n1,"all, well",good\n' if ending == "csv" else json.dumps(rows_of(1)[0]) + "\n"
        data = gzip.compress(text.encode()) if ending.endswith("gz") else text.encode()
        write(project / f"in/day={day}/rows.{ending}", data)
    _, found, _ = finished(compose("input.path=in"))
    assert [(row["day"], row["batchq_extra"]) for row in found] == [("1", None), ("x", None)]


def test_an_extension_that_is_not_known_here_keeps_its_name(compose: Callable[..., Config], project: Path) -> None:
    point = pa.field("point", pa.binary(), metadata={b"ARROW:extension:name": b"geoarrow.wkb", b"other": b"x"})
    table = pa.Table.from_pylist(rows_of(1)).append_column(point, pa.array([b"\1\2"]))
    pq.write_table(table, project / "rows.parquet")
    finished(compose("input.path=rows.parquet"))
    (part,) = (project / "out/data").iterdir()
    found = pq.read_table(part)
    assert found["point"].to_pylist() == [b"\1\2"]
    assert found.schema.field("point").metadata[b"ARROW:extension:name"] == b"geoarrow.wkb"


@pytest.mark.parametrize(
    ("type", "value", "text"),
    [
        (pa.time64("ns"), 1, "00:00:00.000000001"),
        (pa.list_(pa.time64("ns")), [1], '["00:00:00.000000001"]'),
        (pa.struct([("at", pa.timestamp("s"))]), {"at": 10**11}, '{"at": "5138-11-16 09:46:40"}'),
        (pa.list_(pa.timestamp("s")), [3 * 10**11], '["11476-08-15 05:20:00"]'),
        (pa.timestamp("s", "Europe/Berlin"), 10**13, "10000000000000 s since 1970-01-01"),
        (pa.date32(), 2**31 - 1, "2147483647 days since 1970-01-01"),
        (pa.list_(pa.date64()), [86_400_000 * 10**8], '["8640000000000000 ms since 1970-01-01"]'),
        (pa.duration("s"), 10**15, "1000000000000000 s"),
    ],
    ids=str,
)
def test_text_says_all_of_a_moment_that_python_cannot_hold(
    compose: Callable[..., Config], project: Path, type: pa.DataType, value: Any, text: str
) -> None:
    write_table(project / "in/a.arrow", {"at": (type, value)}, rows_of(1))
    write_table(project / "in/b.arrow", {"at": (pa.binary(), b"")}, rows_of(1))
    _, found, _ = finished(compose("input.path=in"))
    assert found[0]["at"] == text
