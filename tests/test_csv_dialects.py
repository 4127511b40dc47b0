"""CSV as spreadsheets and databases write it: how each file is written is found out, and what can't be read is noticed."""

# ruff: noqa: E501 - tables of cases, one a line

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from batchq import input
from batchq.config import Config, CsvConfig, fields
from batchq.config.check import check
from batchq.errors import ConfigError, InputError
from batchq.input.delimited import Records, csv_lines
from batchq.input.former import former_records
from batchq.plan.stored import load_plan
from batchq.records import Dialect, InputObject, Row
from tests.inputs import objects, one, rows, write
from tests.jobs import finished, planned

TEXTS = ["Call me, please", "All is fine; really", "Größe: 5 €", "plain"]


def described(obj: InputObject) -> dict[str, Any]:
    """Where a dialect differs from that of plain CSV."""
    assert obj.dialect
    plain = Dialect()
    return {
        f.name: v for f in dataclasses.fields(Dialect) if (v := getattr(obj.dialect, f.name)) != getattr(plain, f.name)
    }


@dataclass(frozen=True)
class Case:
    """`data` in a file of that name is read as `rows`, in the dialect that differs from plain CSV as `dialect` says."""

    data: bytes | str
    rows: list[dict[str, str | None]]
    dialect: dict[str, Any] = field(default_factory=dict)
    name: str = "x.csv"
    csv: dict[str, Any] = field(default_factory=dict)


TWO: list[dict[str, str | None]] = [{"id": "1", "text": "fine"}, {"id": "2", "text": "bad"}]
FOUND = {
    "comma": Case("id,text\n1,fine\n2,bad\n", TWO),
    "semicolon": Case("id;text\n1;fine\n2;bad\n", TWO, {"delimiter": ";"}),
    "semicolon, commas in the text": Case("id;text\n1;a, b\n2;c, d\n", [{"id": "1", "text": "a, b"}, {"id": "2", "text": "c, d"}], {"delimiter": ";"}),
    "semicolon, decimal commas": Case("id;text;n\n1;fine;2,5\n2;bad;3,5\n", [{"id": "1", "text": "fine", "n": "2,5"}, {"id": "2", "text": "bad", "n": "3,5"}], {"delimiter": ";"}),
    "comma, semicolons in quotes": Case('id,text\n1,"a;b"\n2,"c;d"\n', [{"id": "1", "text": "a;b"}, {"id": "2", "text": "c;d"}]),
    "tab": Case("id\ttext\n1\tfine\n2\tbad\n", TWO, {"delimiter": "\t"}),
    "pipe by its name": Case("text\na,b\nc,d\n", [{"text": "a,b"}, {"text": "c,d"}], {"delimiter": "|"}, "x.psv"),
    "pipe": Case("id|text\n1|fine\n2|bad\n", TWO, {"delimiter": "|"}),
    "Hive": Case("id\x01text\n1\x01fine\n2\x01bad\n", TWO, {"delimiter": "\x01"}),
    "sep=": Case("sep=;\r\nid;text\r\n1;fine\r\n2;bad\r\n", TWO, {"delimiter": ";", "skip": 1}),
    "sep= and a mark": Case("\ufeffsep=;\nid;text\n1;fine\n2;bad\n", TWO, {"delimiter": ";", "skip": 1}),
    "a title and a blank line": Case("Report of 2026\n\nid,text\n1,fine\n2,bad\n", TWO, {"skip": 2}),
    "a title with a comma in quotes": Case('"Report, of 2026"\n\nid;text\n1;fine\n2;bad\n', TWO, {"delimiter": ";", "skip": 2}),
    "a spreadsheet's title": Case("Report of 2026;;\nid;text;n\n1;fine;\n2;bad;\n", [{**row, "n": ""} for row in TWO], {"delimiter": ";", "skip": 1}),
    "a title over numbers": Case("Report of 2026\nid,text\n1,fine\n2,bad\n", TWO, {"skip": 1}),
    "remarks": Case("# made by export, version 2\n# all of it\nid,text\n1,fine\n2,bad\n", TWO, {"skip": 2}),
    "cp1252": Case("id,text\n1,Größe: 5 €\n2,“café”\n".encode("cp1252"), [{"id": "1", "text": "Größe: 5 €"}, {"id": "2", "text": "“café”"}], {"encoding": "cp1252"}),
    "UTF-8 with a mark": Case("\ufeffid,text\n1,fine\n2,bad\n", TWO),
    "UTF-16 with a mark": Case("id\ttext\n1\tfine\n2\tbad\n".encode("utf-16"), TWO, {"delimiter": "\t", "encoding": "utf-16"}),
    "UTF-16 without": Case("id,text\n1,fine\n2,bad\n".encode("utf-16-be"), TWO, {"encoding": "utf-16-be"}),
    "UTF-32": Case("id,text\n1,fine\n2,bad\n".encode("utf-32"), TWO, {"encoding": "utf-32"}),
    "UTF-16 in gzip": Case(gzip.compress("id,text\n1,fine\n2,bad\n".encode("utf-16")), TWO, {"encoding": "utf-16"}, "x.csv.gz"),
    "padded header": Case("id ; text \n1;fine\n2;bad\n", TWO, {"delimiter": ";"}),
    "padded quotes": Case('"id", "text"\n1, "fine"\n2, "bad"\n', TWO),
    "a quote in the middle": Case('id,text\n1,5" wide\n2,say "x" to\n', [{"id": "1", "text": '5" wide'}, {"id": "2", "text": 'say "x" to'}]),
    "a padded quote in the middle": Case('id,text\n1, "x" said he\n2,bad\n', [{"id": "1", "text": ' "x" said he'}, {"id": "2", "text": "bad"}]),
    "doubled quotes": Case('id,text\n1,"He said ""fine"""\n2,bad\n', [{"id": "1", "text": 'He said "fine"'}, {"id": "2", "text": "bad"}]),
    "Spark": Case('id,text\n1,"He said \\"fine\\""\n2,"C:\\new \\\\ x"\n', [{"id": "1", "text": 'He said "fine"'}, {"id": "2", "text": "C:\\new \\ x"}], {"escape": "\\"}),
    "a backslash before a closing quote": Case('id,text\n1,"C:\\"\n2,"D:\\"\n', [{"id": "1", "text": "C:\\"}, {"id": "2", "text": "D:\\"}]),
    "single quotes": Case("'id','text'\n'1','a, b'\n'2','it''s'\n", [{"id": "1", "text": "a, b"}, {"id": "2", "text": "it's"}], {"quote": "'"}),
    "quotes of the text's own in TSV": Case('id\ttext\n1\t"start\n2\tplain\n3\tend"\n4\tok\n', [{"id": "1", "text": '"start'}, {"id": "2", "text": "plain"}, {"id": "3", "text": 'end"'}, {"id": "4", "text": "ok"}], {"delimiter": "\t", "quote": ""}, "x.tsv"),
    "titles in quotes in TSV": Case('id\ttext\n1\t"Emma"\n2\tPersuasion by Austen\n', [{"id": "1", "text": '"Emma"'}, {"id": "2", "text": "Persuasion by Austen"}], {"delimiter": "\t", "quote": ""}, "x.tsv"),
    "quoted TSV": Case('id\ttext\n1\t"a\tb"\n2\t"c ""d""\ne"\n', [{"id": "1", "text": "a\tb"}, {"id": "2", "text": 'c "d"\ne'}], {"delimiter": "\t"}, "x.tsv"),
    "Excel's tab-separated text": Case('id\ttext\n1\t"a, b"\n2\tplain words\n', [{"id": "1", "text": "a, b"}, {"id": "2", "text": "plain words"}], {"delimiter": "\t"}, "x.tsv"),
    "PostgreSQL": Case("id\ttext\n1\ta\\tb\\nc\\\\d\n2\t\\N\n", [{"id": "1", "text": "a\tb\nc\\d"}, {"id": "2", "text": None}], {"delimiter": "\t", "quote": "", "escape": "\\"}, "x.tsv"),
    "MySQL": Case("id\ttext\n1\ta\\\tb\\\nc\n2\t\\N\n", [{"id": "1", "text": "a\tb\nc"}, {"id": "2", "text": None}], {"delimiter": "\t", "quote": "", "escape": "\\"}, "x.tsv"),
    "MySQL, quoted": Case('"id","text"\n"1","a \\"b\\" c"\n"2",\\N\n', [{"id": "1", "text": 'a "b" c'}, {"id": "2", "text": None}], {"escape": "\\"}),
    "CR": Case("id,text\r1,fine\r2,bad\r", TWO),
    "mixed line ends": Case("id,text\r\n1,fine\r2,bad\n", TWO),
    "CR CR LF": Case("id,text\r\r\n1,fine\r\r\n2,bad\r\r\n", TWO),
    "no end": Case("id,text\n1,fine\n2,bad", TWO),
    "NUL": Case("id,text\n1,a\0b\n2,bad\n", [{"id": "1", "text": "a\0b"}, {"id": "2", "text": "bad"}]),
    "trailing delimiters": Case("id;text;\n1;fine;\n2;bad;\n", TWO, {"delimiter": ";"}),
    "trailing delimiters of rows": Case("id,text\n1,fine,\n2,bad,\n", TWO),
    "trailing blank lines": Case("id;text\n1;fine\n2;bad\n\n  \n;\n;\n", TWO, {"delimiter": ";"}),
    "a name that is empty": Case(",text,n\n1,fine,x\n2,bad,y\n", [{"c0": "1", "text": "fine", "n": "x"}, {"c0": "2", "text": "bad", "n": "y"}]),
    "no header": Case("1,fine\n2,bad\n", [{"c0": "1", "c1": "fine"}, {"c0": "2", "c1": "bad"}], {"header": False}, csv={"header": False}),
    "one column": Case("text\nfine\nbad\n", [{"text": "fine"}, {"text": "bad"}]),
    "one column of a TSV": Case("text\nfine, well\nbad, or\n", [{"text": "fine, well"}, {"text": "bad, or"}], {"delimiter": "\t"}, "x.tsv"),
    "all said": Case("x\nx\na~b\n'1~2'~fine\n", [{"a": "1~2", "b": "fine"}], {"delimiter": "~", "quote": "'", "skip": 2}, csv={"delimiter": "~", "quote": "single", "skip": 2}),
    "said by words": Case("a|b\n\"1\"|2\n", [{"a": '"1"', "b": "2"}], {"delimiter": "|", "quote": ""}, csv={"delimiter": "pipe", "quote": "none"}),
    "an encoding that is said": Case("id,text\n1,привет\n2,мир\n".encode("cp1251"), [{"id": "1", "text": "привет"}, {"id": "2", "text": "мир"}], {"encoding": "cp1251"}, csv={"encoding": "cp1251"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_a_dialect_is_found_out_and_read(name: str, tmp_path: Path) -> None:
    case = FOUND[name]
    data = case.data.encode() if isinstance(case.data, str) else case.data
    path = write(tmp_path / case.name, data)
    csv = CsvConfig(**case.csv)
    obj, _ = one(path, csv=csv)
    found = rows(path, csv=csv)
    assert [(row.error, row.columns) for row in found] == [(None, columns) for columns in case.rows]
    assert [row.id for row in found] == [f"{case.name}:{number}" for number in range(len(found))]
    assert described(obj) == case.dialect
    assert rows(path, csv=csv, skip_until=1) == found[1:]


@dataclass(frozen=True)
class Broken:
    """Rows of which some can't be read: the texts of those that can, and per failure its code and its text."""

    data: bytes | str
    texts: list[str]
    failures: list[tuple[str, str]]
    name: str = "x.csv"
    csv: dict[str, Any] = field(default_factory=dict)


BROKEN = {
    "too few and too many fields": Broken("id,text\n1\n2,fine\n3,a,b\n4,bad\n5,plain\n6,x\n", ["fine", "bad", "plain", "x"], [("csv_columns", "1"), ("csv_columns", "3,a,b")]),
    "text after a quote": Broken('id,text\n1,"a "b" c"\n2,fine\n3,bad\n', ["fine", "bad"], [("invalid_csv", '1,"a "b" c"')]),
    "an open quote before quoted rows": Broken('id,text\n1,"open\n2,"fine"\n3,"bad"\n', ["fine", "bad"], [("invalid_csv", '1,"open')]),
    "an open quote up to the end": Broken('id,text\n1,fine\n2,"open\n3,bad\n4,plain\n', ["fine", "bad", "plain"], [("invalid_csv", '2,"open')]),
    "an open quote that another one closes": Broken('id,text\n1,"start\n2,plain\n3,end"\n4,ok\n5,"quoted, well"\n', ["plain", 'end"', "ok", "quoted, well"], [("invalid_csv", '1,"start')]),
    "the same in a TSV that is said to be quoted": Broken('id\ttext\n1\t"start\n2\tplain\n3\tend"\n4\tok\n', ["plain", 'end"', "ok"], [("invalid_csv", '1\t"start')], "x.tsv", {"quote": "double"}),
    "Spark's rows read as doubled": Broken('id,text\n1,"He said \\"fine\\""\n2,bad\n', ["bad"], [("invalid_csv", '1,"He said \\"fine\\""')], csv={"escape": "none"}),
    "bytes that are no UTF-8 among others that are": Broken("id,text\n1,é\n2,".encode() + b"\xe9\n3,bad\n" + "4,ü\n".encode(), ["é", "bad", "ü"], [("invalid_utf8", "2,\ufffd")]),
    "bytes that the encoding hasn't": Broken(b"id,text\n1,\xe9t\xe9\n2,\x81\n", ["été"], [("invalid_encoding", "2,\ufffd")], csv={"encoding": "cp1252"}),
    "UTF-16 that is cut short": Broken("id,text\n1,fine\n2,bad\n3,x".encode("utf-16")[:-1], ["fine", "bad"], [("invalid_encoding", "3,\ufffd")]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_row_that_is_not_as_written_is_noticed_and_its_neighbours_are_read(name: str, tmp_path: Path) -> None:
    case = BROKEN[name]
    data = case.data.encode() if isinstance(case.data, str) else case.data
    found = rows(write(tmp_path / case.name, data), csv=CsvConfig(**case.csv))
    assert [row.columns["text"] for row in found if row.error is None] == case.texts
    assert [(row.error[0], row.raw) for row in found if row.error] == case.failures
    assert [row.position for row in found] == list(range(len(found)))


def test_a_quoted_text_of_several_lines_is_one_field_though_commas_are_in_it(tmp_path: Path) -> None:
    data = 'id,text,n\n1,"Hi, there\nfoo, bar",3\n2,"a\n\nb",4\n3,x,5\n'
    assert [row.columns["text"] for row in rows(write(tmp_path / "x.csv", data))] == [
        "Hi, there\nfoo, bar",
        "a\n\nb",
        "x",
    ]


def test_one_open_quote_costs_one_row_of_many(tmp_path: Path) -> None:
    lines = ["id,text", *(f"{n},text {n}" for n in range(50_000))]
    lines[10] = '9,"open'
    found = rows(write(tmp_path / "x.csv", "\n".join(lines)))
    assert len(found) == 50_000 and [row.position for row in found if row.error] == [9]


REFUSED: dict[str, tuple[bytes | str, dict[str, Any], str]] = {
    "a title that may be the header": ("Title\na,b\nc,d\ne,f\n", {}, "x.csv: its first line has 1 fields, most others have 2; say with input.csv.skip"),
    "a shorter first line": ("a,b\n1,2,x\n3,4,y\n", {}, "its first line has 2 fields, most others have 3"),
    "numbers for a header": ("1,fine\n2,bad\n", {}, "looks like a row and not like a header; say input.csv.header=false"),
    "a text for a header": (f"{'word ' * 300},x\nfine,bad\n", {}, "looks like a row and not like a header"),
    "a name twice": ("a,b,a\n1,2,3\n", {}, "names the column a more than once; rename one, or say input.csv.header=false input.csv.skip=1"),
    "another encoding": ("id,text\n1,привет\n2,мир\n".encode("cp1251"), {}, "isn't UTF-8; name its encoding, as input.csv.encoding=cp1252"),
    "Polish in cp1250": ("id,text\n1,książki\n2,główna\n".encode("cp1250"), {}, "isn't UTF-8; name its encoding"),
    "French in cp437": ("id,text\n1,été\n2,café\n".encode("cp437"), {}, "isn't UTF-8; name its encoding"),
    "the header alone": ("id,text\n", {}, "the input is empty: not one row in it"),
    "Excel": (b"PK\x03\x04\x14\0\x06\0\x08\0" + b"[Content_Types].xml", {}, "x.csv: looks like an Excel workbook or another Office file: save it as CSV"),
    "gzip": (gzip.compress(b"id,text\n1,a\n"), {}, "x.csv: looks like gzip: let its name end in .gz"),
    "a login page": ("<!DOCTYPE html>\n<html>secret</html>\n", {}, "x.csv: looks like an HTML page"),
    "JSON": ('{"id": 1, "text": "secret"}\n', {}, "x.csv: looks like JSON: let its name end in .jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused_in_a_line_with_the_remedy(name: str, tmp_path: Path) -> None:
    data, csv, expected = REFUSED[name]
    path = write(tmp_path / "x.csv", data)
    with pytest.raises(InputError) as refused:
        listed = objects(path, csv=CsvConfig(**csv))
        input.infer_schema(listed, "csv", None)
    said = str(refused.value)
    assert expected in said and "\n" not in said
    assert not any(text in said for text in ("fine", "secret", "word", "привет"))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"delimiter": "||"}, "input.csv.delimiter=||: one character, or one of comma, semicolon, tab"),
        ({"delimiter": "none"}, "input.csv.delimiter=none: fields need one"),
        ({"quote": ","}, ""),
        ({"quote": ",", "delimiter": ","}, "input.csv.quote: can't be the delimiter too"),
        ({"encoding": "utf-7000"}, "input.csv.encoding=utf-7000: no such encoding"),
        ({"encoding": "base64"}, "input.csv.encoding=base64: no such encoding"),
        ({"skip": -1}, "input.csv.skip=-1: can't be negative"),
    ],
)
def test_a_dialect_that_cannot_be_is_named(said: dict[str, Any], expected: str, compose: Callable[..., Config]) -> None:
    config = compose()
    config.input.csv = CsvConfig(**said)
    if not expected:
        assert check(config) is config
        return
    with pytest.raises(ConfigError) as refused:
        check(config)
    assert expected in str(refused.value)


def test_each_field_of_a_dialect_is_explained() -> None:
    assert list(fields.docs(CsvConfig)) == [f.name for f in dataclasses.fields(CsvConfig)]
    assert {f.name for f in dataclasses.fields(CsvConfig)} == {f.name for f in dataclasses.fields(Dialect)}


# ---- several files ----


def test_each_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "id,text\n1,fine\n")
    write(tmp_path / "b.tsv", "text\tid\nbad\t2\n")
    write(tmp_path / "c.csv", "sep=;\nid;text\n3;né\n".encode("cp1252"))
    write(tmp_path / "d.csv", "id,text\n4,é\n")
    write(tmp_path / "e.csv", "id,text\n5,é\n".encode("utf-16"))
    write(tmp_path / "f.csv", "id,text\n")
    listed = objects(tmp_path)
    assert [row.columns["text"] for obj in listed for row in whole(obj)] == ["fine", "bad", "né", "é", "é"]
    said = input.dialect_words(listed)
    assert said.startswith(
        'comma between fields · " around them, doubled inside · utf-8 in 3 files; otherwise in 3, as b.tsv: tab'
    )


def test_what_a_file_does_not_tell_is_as_in_the_others(tmp_path: Path) -> None:
    write(tmp_path / "a.tsv", 'id\ttext\n1\t"a\n2\tb\n3\t\\N\n')
    write(tmp_path / "b.tsv", "id\ttext\n3\tplain\n")
    quiet = next(obj for obj in objects(tmp_path) if obj.name == "b.tsv")
    assert described(quiet) == {"delimiter": "\t", "quote": "", "escape": "\\"}


def test_many_files_are_tried_with_what_some_tell(tmp_path: Path) -> None:
    for number in range(60):
        write(tmp_path / f"{number:02d}.csv", f"id;text\n{number};text {number}\n")
    write(tmp_path / "31.csv", "id,text\n31,text 31\n")
    listed = objects(tmp_path)
    assert [row.columns for obj in listed for row in whole(obj)] == [
        {"id": str(number), "text": f"text {number}"} for number in range(60)
    ]


@pytest.mark.parametrize("data", ["3,plain\n4,other\n", "id;text\n3;x\n", "id,text,n\n3,x,y\n"])
def test_a_file_with_other_columns_is_named_or_quarantined(
    data: str, project: Path, compose: Callable[..., Config]
) -> None:
    write(project / "in/a.csv", "id,text,gold\n1,fine,good\n2,bad,bad\n")
    write(project / "in/b.csv", data)
    with pytest.raises(InputError, match=r"b\.csv: "):
        planned(compose("input.path=in"))
    plan = planned(compose("input.path=in", "input.unreadable=quarantine", "output.path=other"))
    assert [o.name for o in plan.objects] == ["a.csv"] and list(plan.unreadable) == ["b.csv"]


def whole(obj: InputObject) -> list[Row]:
    return list(input.read_rows(obj, "csv", input.split(obj, "csv", rows_per_shard=10)[0], columns=None))


# ---- the plan ----


def test_the_plan_freezes_the_dialect_and_says_it(
    project: Path, compose: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    from batchq.cli import main

    write(project / "in/a.csv", "Report;;\nid;text;gold\n1;so weit gut;good\n2;größer;bad\n".encode("cp1252"))
    assert main(["plan", "job=mine", "engine=fake", "input.path=in"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  csv "))
    assert line == '  csv        semicolon between fields · " around them, doubled inside · cp1252 · after 1 line'
    config = compose("input.path=in")
    plan = planned(config)
    loaded = load_plan(str(project / "out"))
    assert loaded is not None and loaded.objects == plan.objects
    assert loaded.objects[0].dialect == Dialect(";", encoding="cp1252", skip=1)
    manifest, found, code = finished(config, plan)
    assert (manifest["answers"], code) == (2, 0) and found[1]["text"] == "größer"


def test_another_dialect_is_another_run(
    project: Path, capsys: pytest.CaptureFixture[str], compose: Callable[..., Config]
) -> None:
    from batchq.cli import main

    write(project / "in/a.csv", "id,text,gold\n1,fine,good\n")
    planned(compose("input.path=in"))
    assert main(["plan", "job=mine", "engine=fake", "input.path=in", "input.csv.quote=none"]) == 2
    assert "input.columns, output.columns, input.format, input.csv or task.gold" in capsys.readouterr().err


def test_a_dialect_goes_with_csv_files_alone(project: Path, compose: Callable[..., Config]) -> None:
    write(project / "rows.jsonl", json.dumps({"text": "x", "gold": "good"}) + "\n")
    with pytest.raises(ConfigError, match=r"input\.csv\.delimiter: goes with CSV files; rows\.jsonl is jsonl"):
        planned(compose("input.csv.delimiter=tab"))


def test_a_plan_from_before_reads_as_it_did(tmp_path: Path) -> None:
    """By Python's csv module: an open quote takes the rest of the file, text after a quote is added."""
    path = write(tmp_path / "x.csv", 'id,text \n1,"He said \\"fine\\""\n2,"open\n3,x\n')
    now, _ = one(path)
    former = dataclasses.replace(now, dialect=None)
    assert [row.columns for row in whole(former) if not row.error] == [{"id": "1", "text ": 'He said \\fine\\""'}]
    assert [row.raw for row in whole(former) if row.error] == ['2,"open\n3,x']
    with path.open("rb") as file:
        assert len(list(former_records(former, file))) == 3


def test_a_first_line_that_names_nothing_wanted_is_not_quoted(project: Path, compose: Callable[..., Config]) -> None:
    write(project / "in/a.tsv", "good\tGo until jurong point\nbad\tFree entry in a contest\n")
    with pytest.raises(
        InputError, match=r"a\.tsv: task\.prompt uses text, of which its first line names nothing"
    ) as refused:
        planned(compose("input.path=in", "task.gold=null"))
    assert "jurong" not in str(refused.value)
    headless = ("input.path=in", "input.csv.header=false", "task.prompt='{{ c1 }}'", "task.gold=c0")
    _, found, code = finished(compose(*headless))
    assert [row["c1"] for row in found] == ["Go until jurong point", "Free entry in a contest"] and code == 0


@pytest.mark.parametrize("seed", range(20))
def test_what_pythons_csv_module_writes_is_read_as_it_was(seed: int) -> None:
    luck = random.Random(seed)
    for delimiter in ",;\t|":
        table = [
            [str(number), *("".join(luck.choices("ab\",;\t|\n\r é'\\1.", k=luck.randint(0, 12))) for _ in range(2))]
            for number in range(20)
        ]
        text = io.StringIO(newline="")
        written = csv.writer(text, delimiter=delimiter, quoting=luck.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))
        written.writerows([["id", "one", "two"], *table])
        lines = csv_lines(io.BytesIO(text.getvalue().encode()), "utf-8")
        assert [(fields, error) for fields, _, error in Records(lines, Dialect(delimiter))][1:] == [
            (fields, None) for fields in table
        ]


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
def test_a_sample_may_end_inside_quotes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delimiter = "\t" if name.endswith("tsv") else ","
    text = "\n".join(f"line {number}, of a long text" for number in range(30))
    data = f"id{delimiter}text\n" + "".join(f'{number}{delimiter}"{text}"\n' for number in range(20))
    path = write(tmp_path / name, data)
    for size in range(2000, 2400, 17):
        monkeypatch.setattr("batchq.input.dialect.SAMPLE", size)
        assert [row.columns["text"] for row in rows(path)] == [text] * 20
