"""verify compares the user's columns with the input: whole outputs pass, and each kind of change is found and named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchq.cli import main
from batchq.cli import verify as verb
from batchq.cli.verify import verify
from batchq.config import Config
from tests.helpers import LABELS
from tests.inputs import compressed, write
from tests.jobs import completed

TEXTS = ["plain", "two\nlines", 'a "quote", a comma', "é ﷺ 🙂", "", "null"]
ROWS: list[dict[str, Any]] = [
    {
        "text": text,
        "n": n - 2,
        "share": n / 7,
        "gold": LABELS[n % 3],
        "tags": [text, None],
        "who": {"name": text, "age": n},
    }
    for n, text in enumerate(TEXTS)
]
TABLE = pa.Table.from_pylist(ROWS)


def _csv(rows: list[dict[str, Any]]) -> bytes:
    quoted = (['"' + str(value).replace('"', '""') + '"' for value in row.values()] for row in rows)
    return ("\n".join([",".join(rows[0]), *map(",".join, quoted)]) + "\n").encode()


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=4)
    return bytes(sink.getvalue())


def _arrow(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return bytes(sink.getvalue())


INPUTS = {
    "rows.jsonl": _jsonl(ROWS),
    "rows.jsonl.gz": compressed(_jsonl(ROWS), ".gz"),
    "rows.csv": _csv(ROWS),
    "rows.csv.zst": compressed(_csv(ROWS), ".zst"),
    "rows.tsv": _csv(ROWS).replace(b'","', b'"\t"').replace(b",", b"\t", 5),
    "rows.parquet": _parquet(TABLE),
    "rows.arrow": _arrow(TABLE),
    "rows.txt": b"one\n\ntwo \r\nthree\n",
    "odd.jsonl": _jsonl([ROWS[0]] * 1100) + _jsonl([{**ROWS[1], "late": 1, "n": 0.5}]) + b'{"half": \n',
    "bad.jsonl": _jsonl(ROWS) + b'{"half": \n\xff\xfe\n[1]\n' + _jsonl(ROWS),
    "bad.csv": _csv(ROWS) + b'"too","few"\n\n\xff,2,3,4,5,6\n' + _csv(ROWS),
}


@pytest.fixture
def labelled(compose: Callable[..., Config], project: Path) -> Callable[[str], Config]:
    """A job whose input is one of INPUTS, planned, labelled and finished."""

    def labelled(name: str, *overrides: str) -> Config:
        write(project / "in" / name, INPUTS[name.rpartition("/")[2]])
        gold = ["task.gold=null"] if name.endswith(".txt") else []
        size = 1200 if name == "odd.jsonl" else 4
        config: Config = compose(
            "input.path=in", f"output.rows_per_shard={size}", "output.max_error_rate=1", *gold, *overrides
        )
        completed(config)
        return config

    return labelled


def tamper(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Rewrite a data object, as a hand would that is careful about everything else."""
    receipt = pq.read_metadata(path).metadata[b"batchq.receipt"]
    changed = change(pq.ParquetFile(path).read())
    with pq.ParquetWriter(path, changed.schema, write_page_checksum=True) as writer:
        writer.write_table(changed)
        writer.add_key_value_metadata({b"batchq.receipt": receipt})


@pytest.mark.parametrize("name", INPUTS)
def test_an_output_as_it_was_written_passes(labelled: Callable[..., Config], name: str) -> None:
    good, words = verify(labelled(name))
    assert good, words
    assert "value by value: all" in words


def of(column: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    """The table with other values in one column, or in each that is the user's."""

    def changed(table: pa.Table) -> pa.Table:
        for name in USERS if column == "each" else [column]:
            if (place := table.schema.get_field_index(name)) >= 0:
                field = table.schema.field(place)
                table = table.set_column(place, field, pa.array(change(table[name].to_pylist()), field.type))
        return table

    return changed


USERS = ["text", "n", "share", "gold", "tags", "who"]
CHANGES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "a value": of("text", lambda values: [values[0], "another", *values[2:]]),
    "null in its place": of("text", lambda values: [values[0], None, *values[2:]]),
    "an empty text in its place": of("text", lambda values: [values[0], "", *values[2:]]),
    "its blanks taken off": of("text", lambda values: [values[0], values[1].replace("\n", ""), *values[2:]]),
    "two rows' values swapped": of("text", lambda values: [values[0], values[2], values[1], *values[3:]]),
    "two rows' columns swapped": of("each", lambda values: [values[0], values[2], values[1], *values[3:]]),
    "two rows' ids swapped": of("batchq_id", lambda values: [values[0], values[2], values[1], *values[3:]]),
    "a column shifted": of("text", lambda values: [*values[1:], values[0]]),
    "a column dropped": lambda table: table.drop_columns(["text"]),
    "a column renamed": lambda table: table.rename_columns(
        [{"text": "texts"}.get(name, name) for name in table.column_names]
    ),
    "a column of another type": lambda table: table.set_column(
        table.schema.get_field_index("text"), "text", table["text"].cast(pa.binary())
    ),
}


@pytest.mark.parametrize("name", [name for name in INPUTS if name not in ("rows.txt", "odd.jsonl")])
def test_a_change_is_named_by_file_row_and_column(labelled: Callable[..., Config], name: str) -> None:
    config = labelled(name)
    path = sorted(Path("out/data").iterdir())[0]
    whole = path.read_bytes()
    for kind, change in CHANGES.items():
        tamper(path, change)
        good, words = verify(config)
        assert not good and "NOT as promised" in words, kind
        assert f"{path.name}: " in words and "column text" in words, (kind, words)
        assert "another" not in words.replace("of another type", "") and "lines" not in words, "no value is told"
        if kind in ("a value", "null in its place"):
            assert words.count(f"row {name}") == 1 and "1 values are not the input's" in words
        path.write_bytes(whole)
    assert verify(config)[0]


DEEP: dict[str, Callable[[pa.Table], pa.Table]] = {
    "n": of("n", lambda values: [*values[:-1], values[-1] + 1]),
    "share": of("share", lambda values: [*values[:-1], math.nextafter(values[-1], 9)]),
    "tags": of("tags", lambda values: [*values[:-1], [*values[-1], None]]),
    "who": of("who", lambda values: [*values[:-1], {**values[-1], "age": None}]),
}


@pytest.mark.parametrize("column", DEEP)
@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_change_inside_a_value_is_found(labelled: Callable[..., Config], name: str, column: str) -> None:
    config = labelled(name)
    tamper(sorted(Path("out/data").iterdir())[0], DEEP[column])
    good, words = verify(config)
    assert not good and f"column {column}: isn't what the input has" in words and "1 values" in words


def test_what_no_column_holds_is_compared_too(labelled: Callable[..., Config]) -> None:
    """A broken row's text, and what of a later row has another type or no column."""
    config = labelled("odd.jsonl")
    assert verify(config)[0]
    path = sorted(Path("out/data").iterdir())[-1]
    whole = path.read_bytes()
    for column, change in {
        "batchq_raw": of("batchq_raw", lambda values: [text and text.replace("half", "whole") for text in values]),
        "batchq_extra": of("batchq_extra", lambda values: [text and text.replace("late", "soon") for text in values]),
        "n": of("batchq_extra", lambda values: [None for _ in values]),
    }.items():
        tamper(path, change)
        good, words = verify(config)
        assert not good and f"column {column}: isn't what the input has" in words, words
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_columns_that_folders_give_are_compared_with_their_names(labelled: Callable[..., Config], name: str) -> None:
    config = labelled(f"year=2026/kind=a%20b/{name}")
    assert verify(config)[0]
    tamper(sorted(Path("out/data").iterdir())[0], of("year", lambda values: [*values[:-1], 2025]))
    good, words = verify(config)
    assert not good and "column year: isn't what the input has" in words


def test_a_lost_row_and_a_repeated_one_hide_no_change_after_them(labelled: Callable[..., Config]) -> None:
    config = labelled("rows.jsonl")
    path = sorted(Path("out/data").iterdir())[0]
    tamper(path, lambda table: CHANGES["a value"](pa.concat_tables([table.slice(1), table.slice(2, 1)])))
    _, words = verify(config)
    assert "1 input rows are missing, 1 rows are repeated or foreign, 1 values are not the input's" in words


def test_of_many_rows_a_sample_is_compared_unless_all_are_asked_for(
    labelled: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled("rows.parquet")
    monkeypatch.setattr(verb, "COMPARED", 3)
    tamper(sorted(Path("out/data").iterdir())[1], DEEP["n"])
    job = ["verify", "job=mine", "engine=fake", "input.path=in"]
    assert main(job) == 0
    assert "4 rows of 6 columns, a sample: one shard of 2; --full takes all" in capsys.readouterr().out
    assert main([*job, "--full"]) == 1
    said = capsys.readouterr().out
    assert "all 6 rows of 6 columns" in said and "column n" in said
