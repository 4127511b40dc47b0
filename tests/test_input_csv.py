"""CSV: records over several lines, and broken ones."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from batchq.errors import InputError
from tests.inputs import rows, write


def test_csv_fields_stay_strings_and_quoted_newlines_stay_inside(tmp_path: Path) -> None:
    data = '\ufeffid,text,n\r\n1,"two\r\nlines, and ""quotes""",007\r\n\r\n  \n2,é\0,\n'
    found = rows(write(tmp_path / "x.csv", data))
    assert [row.columns for row in found] == [
        {"id": "1", "text": 'two\r\nlines, and "quotes"', "n": "007"},
        {"id": "2", "text": "é\0", "n": ""},
    ]
    assert [row.id for row in found] == ["x.csv:0", "x.csv:1"]
    assert [row.columns for row in rows(tmp_path / "x.csv", columns=["n", "id"])] == [
        {"n": "007", "id": "1"},
        {"n": "", "id": "2"},
    ]
    assert rows(tmp_path / "x.csv", skip_until=1) == found[1:]
    tabs = write(tmp_path / "x.tsv.gz", gzip.compress(b"a\tb\n1,5\t2\n"))
    assert rows(tabs)[0].columns == {"a": "1,5", "b": "2"}


def test_each_broken_csv_record_is_a_row_with_a_code(tmp_path: Path) -> None:
    data = b'a,b\n1\n1,2,3\n1,\xff\n1,"x\n\xff"\n3,4\n\n5,"open\n6,7\n'
    found = rows(write(tmp_path / "x.csv", data))
    assert [row.error and row.error[0] for row in found] == [
        "csv_columns",
        "csv_columns",
        "invalid_utf8",
        "invalid_utf8",
        None,
        "invalid_csv",
        None,
    ]
    assert found[0].error == ("csv_columns", "1 fields, but the header has 2")
    assert [row.raw for row in found] == ["1", "1,2,3", "1,\ufffd", '1,"x\n\ufffd"', None, '5,"open', None]
    assert [found[4].columns, found[6].columns] == [{"a": "3", "b": "4"}, {"a": "6", "b": "7"}]


def test_a_long_document_fits_in_a_csv_field(tmp_path: Path) -> None:
    assert len(rows(write(tmp_path / "x.csv", f"a,b\n1,{'x' * 1_000_000}\n"))[0].columns["b"]) == 1_000_000


def test_a_csv_header_must_name_each_column_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names the column a more than once"):
        rows(write(tmp_path / "x.csv", "a,b,a\n1,2,3\n"))
    with pytest.raises(InputError, match=r"x\.csv: its header lacks the column c"):
        rows(write(tmp_path / "x.csv", "a,b\n1,2\n"), columns=["c"])
