"""Reports: what finance and people read of a run, and that nothing in them is obeyed, whatever others named what."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import pytest

from batchq import storage
from batchq.account import ledger
from batchq.cli import main
from batchq.config import Config, PricingConfig
from batchq.errors import NotFound
from batchq.machine.progress import Progress, visible
from batchq.report import facts, pages, spreadsheet, survey
from chaos.inert import PAYLOADS, summary, surveyed
from tests.helpers import rows_of, write_jsonl
from tests.jobs import finished
from tests.s3 import S3

WHERE = "s3://corpus/labelled"


class Page(HTMLParser):
    """What a browser would make of a page: its elements, how many of each, their attributes, and its texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.attributes: set[tuple[str, str, str | None]] = set()
        self.odd: list[str] = []
        self._pieces = [""]
        self._styles = False
        self.feed(text)
        self.close()

    @property
    def texts(self) -> list[str]:
        return [piece for piece in self._pieces if piece.strip(" \n")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes |= {(tag, name, value) for name, value in attrs}
        self._styles = tag == "style"
        self._pieces.append("")

    def handle_endtag(self, tag: str) -> None:
        self._styles = False
        self._pieces.append("")

    def handle_data(self, data: str) -> None:
        if not self._styles:
            self._pieces[-1] += data

    def handle_comment(self, data: str) -> None:
        self.odd.append(data)

    unknown_decl = handle_pi = handle_comment


ELEMENTS = {
    *"html head meta title style body header footer section div h1 h2 p small span dl dt dd".split(),
    *"table tr th td svg rect line circle".split(),
}
PLACES = {"class", "x", "y", "width", "height", "x1", "y1", "x2", "y2", "cx", "cy", "r", "aria-hidden"}
PLAIN = Page(pages.output_page(summary("plain")))
PLAIN_MANY = Page(pages.survey_page(surveyed("plain"), WHERE))


def seen(payload: str) -> str:
    """How a payload is written where it is shown."""
    assert "\n" not in visible(payload)
    return visible(payload)


def test_a_plain_page_has_no_script_and_no_link_and_forbids_them() -> None:
    for page in (PLAIN, PLAIN_MANY):
        assert set(page.elements) <= ELEMENTS
        named = {(tag, name) for tag, name, _ in page.attributes if tag != "meta"}
        assert named <= {("html", "lang"), *((tag, name) for tag in ELEMENTS for name in PLACES)}
        (policy,) = (v for _, name, v in page.attributes if name == "content" and v and "default-src" in v)
        assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy


def test_the_policy_knows_the_style_by_its_digest() -> None:
    for text in (pages.output_page(summary("plain")), pages.survey_page(surveyed("plain"), WHERE)):
        (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        assert f"style-src 'sha256-{digest}';" in text


def test_a_template_can_forget_neither_to_escape_nor_to_make_visible() -> None:
    written = pages.environment().from_string("{{ text }}{% for t in [text] %}{{ t }}{% endfor %}")
    assert written.render(text="<b>\x1b") == "&lt;b&gt;\\x1b" * 2
    with pytest.raises(jinja2.UndefinedError, match="text"):
        written.render()
    for name in pages.environment().list_templates():
        source = (Path(pages.__file__).parent / "templates" / name).read_text()
        assert not re.search(r"\||~|autoescape", source), f"{name}: a filter or ~ may go past both"


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_html_is_inert_and_keeps_the_text(payload: str) -> None:
    for text, plain in (
        (pages.output_page(summary(payload)), PLAIN),
        (pages.survey_page(surveyed(payload), WHERE), PLAIN_MANY),
    ):
        page = Page(text)
        assert (page.elements, page.attributes, page.odd) == (plain.elements, plain.attributes, plain.odd)
        assert [c.replace("plain", seen(payload)) for c in plain.texts] == page.texts
        text.encode()


READERS: dict[str, Callable[[str], list[list[str]]]] = {
    "as it is": lambda text: list(csv.reader(io.StringIO(text))),
    "semicolons": lambda text: list(csv.reader(io.StringIO(text), delimiter=";")),
    "tabs": lambda text: list(csv.reader(io.StringIO(text), delimiter="\t")),
    "bars": lambda text: list(csv.reader(io.StringIO(text), delimiter="|")),
    "no quotes": lambda text: [re.split("[,;\t|]", line) for line in text.splitlines()],
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_no_csv_reader_finds_a_formula(payload: str, reader: str) -> None:
    for text in (spreadsheet.output_csv(summary(payload)), spreadsheet.survey_csv(surveyed(payload))):
        for line in READERS[reader](text):
            for cell in line:
                begins = unicodedata.normalize("NFKC", cell.strip().lstrip('"').strip())[:1]
                assert begins not in tuple("=+-@\t\r\n"), cell
                assert cell.isascii() or not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in cell)


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_csv_keeps_the_text_and_its_lines(payload: str) -> None:
    lines = list(csv.DictReader(io.StringIO(spreadsheet.output_csv(summary(payload)))))
    assert [line["record"] for line in lines] == ["invocation", "total"]
    for line in lines:
        assert line["job"].replace("'", "") == seen(payload).replace("'", "")
        assert None not in line, "as many cells as columns"
    if payload.isalnum():
        assert lines[0]["job"] == payload


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_a_terminal_finds_nothing_to_obey(payload: str) -> None:
    stream = io.StringIO()
    show = Progress(stream)
    show.step(f"shard 3 ({payload}): lost")
    texts = [facts.terminal_text(summary(payload)), survey.table(surveyed(payload), WHERE), stream.getvalue()]
    plain = [facts.terminal_text(summary("x")), survey.table(surveyed("x"), WHERE), "one\n"]
    for text, same in zip(texts, plain, strict=True):
        assert text.count("\n") == same.count("\n"), "no line of its own"
        assert not [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
        assert seen(payload) in text or seen(payload).strip("/ ") in text


def test_letters_of_any_script_and_emoji_stay_as_they_are() -> None:
    for text in ("می‌خواهم", "👩‍👩‍👧", "naïve ¡señor!", "不満", "<b> & 'c'"):
        assert visible(text) == text


def test_a_run_with_hostile_names_ends_in_inert_reports(compose: Callable[..., Config], project: Path) -> None:
    """Through the worker and the store: labels, a file that can't be read, one that appeared since."""
    (project / "in").mkdir()
    write_jsonl(project / "in/a.jsonl", rows_of(9))
    bad = "=b<img src=x onerror=alert(1)>\x1b[2J.jsonl.gz"
    (project / "in" / bad).write_bytes(b"no gzip")
    labels = ["=1+1", "<script>alert(1)<｜script>", "\x1b[31mred"]
    config = compose("input.path=in", "input.unreadable=quarantine", "task.gold=null")
    config.task.labels = labels
    finished(config)
    meta = project / "out/meta"
    page = Page((meta / "report.html").read_text())
    assert set(page.elements) <= ELEMENTS and not page.odd
    assert {visible(label) for label in json.loads((meta / "report.json").read_text())["labels"]} <= set(page.texts)
    assert visible(bad) in page.texts
    frame = pd.read_csv(meta / "report.csv")
    assert list(frame["record"]) == ["total"] and frame["rows"].iloc[-1] == 9


def test_csv_and_html_have_a_line_per_invocation_and_their_sum(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And `report` leaves them as they are; over a folder, by output and job, to a file if asked."""
    write_jsonl(project / "rows.jsonl", rows_of(40))
    assert main(["job=mine", "engine=fake", "output.path=out/monday"]) == 0
    assert main(["job=mine", "engine=fake", "output.path=out/tuesday", "input.limit=10", "job.name=other"]) == 0
    frame = pd.read_csv(project / "out/monday/meta/report.csv")
    assert list(frame["record"]) == ["invocation", "total"]
    assert frame["cost"][0] == frame["cost"][1] > 0
    total = frame.iloc[1]
    assert total["cost_per_million_tokens"] == pytest.approx(total["cost"] * 1e6 / total["billed_tokens"])
    assert total["rows"] == 40 and frame["tokens_answered"][0] == total["billed_tokens"]
    (record,) = (json.loads(p.read_text()) for p in (project / "out/monday/meta/runs").glob("*.json"))
    computed = sum(r["counters"]["computed_tokens"] for r in record["replicas"])
    assert computed == total["prompt_tokens"] - total["cached_tokens"], "a label is one prefill"
    assert record["flop_per_token"] is None, "the fake engine multiplies nothing"
    assert sum(r["counters"]["output_tokens"] for r in record["replicas"]) == total["output_tokens"]
    assert sum(r["counters"]["kv_tokens_read"] for r in record["replicas"]) == 0, "nothing is decoded for a label"

    dear = "pricing.per_hour.cpu_core=45"
    assert main(["report", "job=mine", "engine=fake", "output.path=out/monday", dear]) == 0
    assert pd.read_csv(project / "out/monday/meta/report.csv").equals(frame), "what was booked"

    capsys.readouterr()
    assert main(["report", "out", "costs.csv"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^mine +monday +complete +40 ", said, re.M) and re.search(
        r"^all jobs +2 outputs +50 ", said, re.M
    )
    costs = pd.read_csv(project / "costs.csv")
    assert list(costs["record"]) == ["output", "output", "job", "job", "total"]
    assert costs["cost"][4] == pytest.approx(costs["cost"][:2].sum())
    assert costs["cost"][0] == pytest.approx(frame["cost"][1]), "what was booked"
    assert main(["report", "./out", "costs.html", "~pricing.per_hour.cpu_core"]) == 0
    assert "no price for" not in capsys.readouterr().out
    assert "tuesday" in Page((project / "costs.html").read_text()).texts


def test_what_decoding_reads_is_counted_row_by_row(project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(40))
    text = ["task.kind=generate", "task.labels=[]", "task.gold=null", "task.prompt='{{ text }}'"]
    assert main(["job=mine", "engine=fake", *text]) == 0
    (record,) = (json.loads(p.read_text()) for p in (project / "out/meta/runs").glob("*.json"))
    table = pd.read_parquet(project / "out/data")
    prompt, output = table["batchq_prompt_tokens"], table["batchq_output_tokens"]
    assert output.min() > 1
    before = sum(p + written for p, o in zip(prompt, output, strict=True) for written in range(1, o))
    assert sum(r["counters"]["kv_tokens_read"] for r in record["replicas"]) == before
    assert sum(r["counters"]["output_tokens"] for r in record["replicas"]) == output.sum()


def test_one_output_that_cannot_be_read_is_named_and_the_others_counted(
    project: Path, s3: S3, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    bucket = s3.make_bucket("reports")
    write_jsonl(project / "rows.jsonl", rows_of(5))
    assert main(["job=mine", "engine=fake", f"output.path={bucket}/labelled/good"]) == 0
    storage.put(f"{bucket}/labelled/bad/meta/plan.json", b"{}")
    capsys.readouterr()
    assert main(["report", f"{bucket}/labelled", f"{bucket}/costs.json"]) == 1
    said = capsys.readouterr().out
    assert (
        re.search(r"^\? +bad +can't be read", said, re.M) and f"{bucket}/labelled/bad/meta/plan.json: damaged" in said
    )
    (total,) = [t for t in storage.read_json(f"{bucket}/costs.json")["totals"] if t["job"] == "all jobs"]
    assert total["rows"] == 5


def test_below_a_folder_without_runs_there_is_nothing_to_say(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no run has been planned there or below yet"):
        ledger.survey(str(tmp_path), PricingConfig())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["out", "costs.xls"], "costs.xls: say report FOLDER, or report FOLDER FILE; a file ends in .csv"),
        (["out", "engine=fake"], "engine=fake: a report over many outputs takes pricing=NAME"),
        (["out", "pricing=nope"], "pricing=nope: no such pricing; choices are example"),
        (["out", "pricing.per_hour.H100=-1"], "pricing.per_hour.H100=-1: a price can't be negative"),
        (["nowhere"], "nowhere: no run has been planned there or below yet"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *arguments]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def summary_on(**figures: Any) -> dict[str, Any]:
    return {**summary("x"), **figures}


def test_efficiency_is_said_where_it_is_known() -> None:
    assert "efficiency" not in facts.terminal_text(summary("x"))
    both = facts.terminal_text(summary_on(mfu=0.4449, joules_per_thousand_tokens=10.43))
    assert "  efficiency MFU 44% · 10.4 J per 1,000 tokens\n" in both
    generated = facts.terminal_text(summary_on(mfu=0.0712, mbu=0.594, joules_per_thousand_tokens=10.43))
    assert "  efficiency MFU 7% · MBU 59% · 10.4 J per 1,000 tokens\n" in generated
    assert "  efficiency MFU 44%\n" in facts.terminal_text(summary_on(mfu=0.4449))
