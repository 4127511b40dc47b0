"""A prompt's source: what it reads, what it is refused for before a run, and what it writes for a row."""

from __future__ import annotations

import datetime
import json
import math
import uuid
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchq.cli import main
from batchq.config import Config
from batchq.errors import ConfigError, RowError
from batchq.job.run import plan_new
from batchq.job.session import open_session
from batchq.model.source import resolve
from batchq.task.prompt import Template, check_prompt, placeholders, prompt_columns
from tests.helpers import rows_of, write_jsonl
from tests.jobs import finished

RUN = ["job=mine", "engine=fake"]
COLUMNS = [
    "text",
    "labels",
    "choices",
    "row",
    "range",
    "dict",
    "items",
    "self",
    "none",
    "my col",
    "odd.name",
    "Body",
    "not",
]


def rendered(source: str, row: dict[str, Any]) -> str:
    return Template(source, list(row)).render(row, "good, bad", ["good", "bad"])


REFUSED = {
    "ours: labels": ("{{ text }} {{ labels }}", "uses labels, which is a column of the input and a word of batchq's"),
    "ours: choices": ("{{ choices }} {{ text }}", "uses choices, which .* write row\\['choices'\\] for the column"),
    "ours: row": ("{{ row | tojson }}", "uses row, which"),
    "ours: a field of row": ("{{ row.text }} {{ row }}", "uses row, which"),
    "Jinja's range": ("{% for i in range(3) %}{{ text }}{% endfor %}", "uses range, which .* a word of Jinja's"),
    "Jinja's dict": ("{{ text }} {{ dict }}", "uses dict, which"),
    "Jinja's self": ("{{ text }} {{ self }}", "uses self, which"),
    "a constant": ("{{ text }} {{ none }}", "uses none, which"),
    "a dict's method": ("{{ row.items }}", "uses items, which .* write row\\['items'\\]"),
    "a function is printed": ("{{ text }} {{ namespace }}", "uses namespace, not a column"),
    "a typo": ("{{ txet }}", r"uses txet, not a column of the input \(did you mean text\?\)"),
    "case": ("{{ Text }}", r"did you mean text\?"),
    "case the other way": ("{{ body }}", r"did you mean Body\?"),
    "a dot": ("{{ odd.name }}", r"uses odd, .*did you mean row\['odd\.name'\]"),
    "a column of row": ("{{ row['txt'] }}", r"uses txt, .*did you mean text"),
    "an attribute of row": ("{{ row.txt }}", "uses txt, not a column"),
    "a space": ("one\n{{ my col }}", r"line 2: .*a column whose name is no plain word is written row\['my col'\]"),
    "no column": ("Good or bad?", r"reads no column.*written \{\{ text \}\}; task\.constant_prompt=true"),
    "braces": ("Good? {text}", r"\{text\} is plain text to Jinja, a column is written \{\{ text \}\}"),
    "dollar": ("Good? ${Body}", r"\$\{Body\} is plain text to Jinja, a column is written \{\{ Body \}\}"),
    "percent": ("Good? %(text)s", r"%\(text\)s is plain text to Jinja, a column is written \{\{ text \}\}"),
    "a filter": ("a\n{{ text | uper }}", r"line 2: No filter named 'uper'.*did you mean upper"),
    "a filter in a branch": ("{% if text %}\n{{ text | uper }}{% endif %}", r"line 2: no filter is called uper \(did"),
    "a test in a branch": (
        "{% if text %}{{ text is nummer }}{% endif %}",
        r"no test is called nummer \(did you mean nu",
    ),
    "a filter that is random": ("{{ text.split() | random }}", "No filter named 'random'"),
    "lipsum": ("{{ text }} {{ lipsum() }}", "uses lipsum, not a column"),
    "include": ("{{ text }}\n{% include 'a.txt' %}", "line 2: include: a prompt stands alone"),
    "import": ("{% from 'a' import b %}{{ text }}", "line 1: from import: a prompt stands alone"),
    "a keyword": ("{{ not }} {{ text }}", r"line 1: .*written row\['not'\]"),
    "a tag": ("{% fro %}{{ text }}", r"line 1: Encountered unknown tag 'fro'$"),
    "syntax": ("a\nb\n{{ text", "line 3: "),
    "an open block": ("{% if text %}", "line 1: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_ask_every_row_wrongly_is_refused_in_one_line(case: str) -> None:
    source, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words) as refused:
        check_prompt(source, COLUMNS, False)
    assert str(refused.value).startswith("task.prompt") and "\n" not in str(refused.value)


TAKEN = {
    "by name": ("{{ text }}", ["text"]),
    "through row": ("{{ row['labels'] }} {{ row['row'] }} {{ row['items'] }}", ["labels", "row", "items"]),
    "no identifier": ("{{ row['my col'] }} {{ row['odd.name'] }}", ["my col", "odd.name"]),
    "an attribute": ("{{ row.text }}", ["text"]),
    "an optional one": ("{{ row['later'] | default('') }}{{ text }}", ["text"]),
    "a test for one": ("{% if row.later is defined %}x{% endif %}{{ text }}", ["text"]),
    "its own variable": ("{% set labels = 1 %}{{ labels }}{{ text }}", ["text"]),
    "its own row": ("{% for row in text.split() %}{{ row.x }}{% endfor %}", ["text"]),
    "a function": ("{% set n = namespace(i=0) %}{{ text }}", ["text"]),
    "raw": ("{% raw %}{{ nothing }} {text}{% endraw %}{{ text }}", ["text"]),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_says_which_column_it_means_is_taken_and_reads_no_other(case: str) -> None:
    source, reads = TAKEN[case]
    check_prompt(source, COLUMNS, False)
    assert prompt_columns(source, COLUMNS) == [c for c in COLUMNS if c in reads]


def test_row_as_a_whole_is_every_column() -> None:
    assert prompt_columns("{{ row | tojson }}", ["a", "b"]) == ["a", "b"]
    assert prompt_columns("{% for k, v in row.items() %}{{ k }}{% endfor %}", ["a", "b"]) == ["a", "b"]


def test_a_prompt_without_a_column_is_taken_where_that_is_said() -> None:
    check_prompt("Tell me a joke.", COLUMNS, True)


def test_a_column_called_like_a_function_of_jinja_is_the_column(tmp_path: Path) -> None:
    check_prompt("{{ row['dict'] }} {{ row['range'] }}", COLUMNS, False)
    assert rendered("{{ row['dict'] }} {{ row['labels'] }}", {"dict": "a", "labels": "b"}) == "a b"


def test_placeholders_of_other_template_languages_are_found_beside_a_column() -> None:
    assert placeholders("{{ text }} {Body} ${text} %(text)s $Body {other} {{ '{' }}", COLUMNS) == [
        *("{Body}", "${text}", "%(text)s", "$Body")
    ]


VALUES: dict[str, tuple[Any, Any]] = {
    "date": (datetime.date(2026, 1, 2), "2026-01-02"),
    "datetime": (datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC), "2026-01-02T03:04:05+00:00"),
    "time": (datetime.time(3, 4), "03:04:00"),
    "timedelta": (datetime.timedelta(hours=1), "1:00:00"),
    "decimal": (Decimal("1.10"), "1.10"),
    "bytes": (b"abc", "abc"),
    "bytes that are no text": (b"\xff\x00", "/wA="),
    "nan": (math.nan, None),
    "infinity": (-math.inf, None),
    "null": (None, None),
    "uuid": (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    "large": (10**30, 10**30),
    "nested": ({"a": [datetime.date(2026, 1, 2), math.nan]}, {"a": ["2026-01-02", None]}),
    "a map": ([("k", Decimal(1))], [["k", "1"]]),
    "text": ("<é> & '", "<é> & '"),
}


@pytest.mark.parametrize("kind", VALUES)
def test_tojson_takes_every_value(kind: str) -> None:
    value, wanted = VALUES[kind]
    assert json.loads(rendered("{{ row | tojson }}", {"id": 1, "v": value})) == {"id": 1, "v": wanted}


def test_tojson_writes_text_as_it_is_and_keys_in_order() -> None:
    assert rendered("{{ row | tojson }}", {"b": "<é> & '", "a": 1}) == '{"a": 1, "b": "<é> & \'"}'
    assert rendered("{{ row | tojson(indent=1) }}", {"a": 1}) == '{\n "a": 1\n}'


UNPRINTABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "null": ("{{ a }}", {"a": None, "b": 1}, "null_value"),
    "NaN is null": ("{{ a }}", {"a": math.nan, "b": 1}, "null_value"),
    "all NaN": ("{{ a }}", {"a": math.nan}, "empty"),
    "a method": ("{{ a.title }}", {"a": "x"}, "prompt"),
    "a field like a method": ("{{ a.items }}", {"a": {"items": 1}}, "prompt"),
    "a generator": ("{{ a | map('upper') }}", {"a": ["x"]}, "prompt"),
    "Jinja's own": ("{{ cycler('a') }}{{ a }}", {"a": "x"}, "prompt"),
    "nothing there": ("{{ a.b.c }}", {"a": {}}, "missing_value"),
    "out of range": ("{{ a[3] + 1 }}", {"a": [1]}, "missing_value"),
}


@pytest.mark.parametrize("case", UNPRINTABLE)
def test_what_would_be_printed_as_a_word_of_python_fails_the_row(case: str) -> None:
    source, row, code = UNPRINTABLE[case]
    with pytest.raises(RowError) as refused:
        Template(source + "{{ b }}" * ("b" in row), list(row)).render(row, "", [])
    assert refused.value.code == code


def test_nan_is_tested_like_a_null() -> None:
    assert rendered("{% if score %}{{ score }}{% endif %}{{ t }}", {"score": math.nan, "t": "x"}) == "x"


COMMAND_LINE = {
    "batchq_id": "task.name=batchq_id: names that begin with batchq_ are batchq's own",
    "BATCHQ_KEY": "task.name=BATCHQ_KEY: names that begin with batchq_",
    "batchq_extra": "names that begin with batchq_",
    "my.name": "task.name='my.name': letters, digits and _ only",
    "''": "task.name='': letters",
    "x" * 101: "task.name: 101 letters; 100 at most",
    "TEXT": "input column text has the name of an output column, TEXT, but for case",
}


@pytest.mark.parametrize("name", COMMAND_LINE)
def test_an_answer_takes_no_other_columns_name(name: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(3))
    assert main(["plan", "job=mine", "engine=fake", f"task.name={name}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert COMMAND_LINE[name] in line


def test_the_columns_of_the_answer_are_told_from_the_input_s_whatever_their_case(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for column in ("Label_Mass", "Batchq_Error"):
        write_jsonl(project / "rows.jsonl", rows_of(3, **{column: 1}))
        assert main(["plan", "job=mine", "engine=fake"]) == 2
        assert f"input column {column} has the name of an output column" in capsys.readouterr().err


def test_a_job_s_file_with_line_ends_of_windows(compose: Callable[..., Config]) -> None:
    path, plain = Path("conf/job/mine.yaml"), compose().task.prompt
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert compose().task.prompt == plain == "Is this {{ choices }}?\n{{ text }}\n"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(ConfigError, match=r"^conf/job/mine\.yaml: .* begins with a byte order mark"):
        compose()


def test_dollar_and_brace_are_text_where_they_are_escaped_and_hinted_at_where_not(
    compose: Callable[..., Config], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project / "conf/job/mine.yaml"
    written = path.read_text()
    for escaped, text in {r"\${amount}": "${amount}", "$5": "$5", "${job.name}": "mine"}.items():
        path.write_text(written.replace("Is this", f"Is {escaped} this"))
        assert compose().task.prompt.startswith(f"Is {text} this")
    write_jsonl(project / "rows.jsonl", rows_of(3))
    for wrong in ("${amount}", "${a:b}", "${ }", "${task.nothing}"):
        path.write_text(written.replace("Is this", f"Is {wrong} this"))
        assert main(["plan", "job=mine", "engine=fake"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("batchq: task.prompt: ") and r"write \${...} for plain text" in line


def test_plan_tells_what_looks_wrong_and_no_row_s_text(
    compose: Callable[..., Config], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(4, Text="secret"))
    asked = ["task.prompt='{{ text }} {id}'", "task.system='You are {{ id }}'"]
    assert main(["plan", *RUN, *asked]) == 0
    said = capsys.readouterr().out
    assert "warning    task.prompt has {id} as plain text; a column is written {{ name }}" in said
    assert "warning    task.system is plain text for all rows" in said
    assert "warning    columns text, Text differ in case alone" in said
    assert "secret" not in said
    config = compose(*asked)
    with open_session(config, "run") as session:
        plan_new(session, resolve(config.model), None)
    assert "task.system is plain text for all rows" in capsys.readouterr().err, "a run says so too"


def test_every_type_of_a_table_goes_through_tojson(compose: Callable[..., Config], project: Path) -> None:
    table = pa.table(
        {
            "day": pa.array([datetime.date(2026, 1, 2)] * 2),
            "when": pa.array([datetime.datetime(2026, 1, 2)] * 2, pa.timestamp("us", "UTC")),
            "price": pa.array([Decimal("1.10"), None], pa.decimal128(9, 2)),
            "raw": pa.array([b"\xff", b"a"]),
            "score": pa.array([math.nan, 1.5]),
            "took": pa.array([datetime.timedelta(seconds=1)] * 2),
            "tags": pa.array([["a"], None], pa.list_(pa.string())),
            "by": pa.array([[("k", 1)]] * 2, pa.map_(pa.string(), pa.int64())),
        }
    )
    pq.write_table(table, project / "rows.parquet")
    config = compose("input.path=rows.parquet", "task.prompt='{{ row | tojson }}'", "task.gold=null")
    manifest, _, code = finished(config)
    assert (manifest["answers"], manifest["failures"], code) == (2, 0, 0)
