"""docs/input.md says what the code does: its tables are the code's own."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest

from batchq.config import InputFormat
from batchq.config.csv import CHARACTERS
from batchq.errors import InputError
from batchq.input import splittable
from batchq.input.foreign import TABLES
from batchq.input.formats import COMPRESSIONS, FORMATS, LOGGED, format_of
from batchq.input.types import column_type

PAGE = (Path(__file__).parent.parent / "docs/input.md").read_text()


def table(title: str) -> list[list[str]]:
    """The cells of the first table below a title, without its head."""
    lines = PAGE.partition(f"## {title}\n")[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    end = next((i for i, row in enumerate(rows[2:], 2) if row[0].startswith("---")), len(rows) + 1)
    return rows[2 : end - 1]


def test_formats_their_names_and_how_they_are_cut() -> None:
    rows = {re.sub("`", "", row[0]): row for row in table("Formats")}
    assert set(rows) == {each.value for each in InputFormat} - {"auto"}
    units = {"bytes": "bytes", "rows": "rows", "not at all": "stream"}
    for name in {each.value for each in LOGGED}:
        assert "always said" in rows.pop(name)[1]
    for name, (_, endings, compressed, cut, _) in rows.items():
        assert set(re.findall(r"\.\w+", endings)) == {ending for ending, format in FORMATS.items() if format == name}
        assert units[cut] == splittable(f"x{endings.split()[0].strip('`')}", name)
        for ending in COMPRESSIONS:
            if ending in compressed:
                assert format_of(f"x{endings.split()[0].strip('`')}{ending}", InputFormat.auto) == name
            else:
                with pytest.raises(InputError, match="compressed as a whole"):
                    format_of(f"x{endings.split()[0].strip('`')}{ending}", InputFormat.auto)


TYPES = {
    str(type): type
    for type in [
        *(
            pa.null(),
            pa.bool_(),
            pa.int8(),
            pa.uint8(),
            pa.int16(),
            pa.int32(),
            pa.int64(),
            pa.uint64(),
            pa.float32(),
            pa.float64(),
        ),
        *(pa.decimal128(9, 2), pa.decimal128(12, 4), pa.decimal128(20, 0), pa.string(), pa.large_string(), pa.date32()),
        *(
            pa.timestamp("ms"),
            pa.timestamp("us"),
            pa.timestamp("us", "UTC"),
            pa.timestamp("us", "Asia/Tokyo"),
            pa.uuid(),
        ),
        *(pa.list_(pa.field("element", each)) for each in (pa.int32(), pa.float64(), pa.string())),
        *(pa.struct([("x", pa.int64())]), pa.struct([("x", pa.string())])),
        pa.struct([("x", pa.int64()), ("y", pa.string())]),
    ]
}


@pytest.mark.parametrize(("one", "other", "whole"), table("Types"))
def test_the_type_of_a_column(one: str, other: str, whole: str) -> None:
    types = [TYPES[each.strip("`")] for each in (one, other)]
    assert column_type(types) == TYPES[whole.strip("`")] == column_type(types[::-1])


def test_the_fields_and_words_of_csv() -> None:
    said = " ".join(" ".join(row) for row in table("CSV"))
    assert {f"`{word}`" for word in CHARACTERS if word.isalpha()} <= set(re.findall(r"`\w+`", said))


def test_tables_with_logs() -> None:
    for name in TABLES:
        assert name.removesuffix(" table") in PAGE
