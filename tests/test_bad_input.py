"""Bad input: each case ends in failure rows with a code, in a quarantined file that the manifest names, or in one line."""

# ruff: noqa: E501 - a table of cases, one a line

from __future__ import annotations

import bz2
import gzip
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchq import input
from batchq.config import Config, Scheme
from batchq.errors import InputError
from batchq.plan.draft import make_plan
from batchq.plan.inputs import check_inputs
from tests.helpers import rows_of
from tests.jobs import finished, planned

GOOD = rows_of(4)
CANARY = "canary-in-a-row"  # the text of bad rows; it may stand in rows only


def jsonl(*rows: Any) -> bytes:
    """Rows as lines; bytes go in as they are."""
    return b"".join(row + b"\n" if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def csv(*lines: bytes) -> bytes:
    return b"\n".join((b"id,text,gold", *lines)) + b"\n"


def parquet(rows: list[dict[str, Any]], schema: pa.Schema | None = None, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, write_page_checksum=True, **options)
    return sink.getvalue()


def flipped_page(rows: int) -> bytes:
    """A Parquet file of two row groups, with one bit of a page in the second changed."""
    data = bytearray(parquet(rows_of(rows), row_group_size=rows // 2, compression="none"))
    column = pq.read_metadata(io.BytesIO(data)).row_group(1).column(1)
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    return bytes(data)


def cut(data: bytes, share: float = 0.5) -> bytes:
    return data[: int(len(data) * share)]


def spoiled(data: bytes, share: float) -> bytes:
    at = int(len(data) * share)
    return data[:at] + bytes(100) + data[at + 100 :]


@dataclass(frozen=True)
class Case:
    """`files` make the input; what comes of it: answers, failures by code, and files that are quarantined. `stop` is in
    the one line that ends the run when `input.unreadable=stop`; such a case is run both ways."""

    name: str
    files: dict[str, bytes]
    answers: int
    failures: dict[str, int] = field(default_factory=dict)
    quarantined: tuple[str, ...] = ()
    stop: str = ""
    overrides: tuple[str, ...] = ()


# More than one block of the reader's, and hard to compress: what comes before the damage is more than nothing.
LUCK = random.Random(0)
MANY = [{**row, "pad": LUCK.randbytes(1250).hex()} for row in rows_of(3000)]
SURE = {"good.jsonl": jsonl(*GOOD)}  # beside a bad file: a neighbour that must not be lost

CASES = [
    Case("over-long", {"a.jsonl": jsonl(*GOOD, {**GOOD[0], "text": "word " * 900})}, 4, {"too_long": 1}),
    Case("empty text", {"a.jsonl": jsonl(*GOOD, {**GOOD[0], "text": ""})}, 4, {"empty": 1}),
    Case("null text", {"a.jsonl": jsonl(*GOOD, {**GOOD[0], "text": None})}, 4, {"empty": 1}),
    Case("text column absent", {"a.jsonl": jsonl(*GOOD, {"id": 9, "gold": "bad"})}, 4, {"empty": 1}),
    Case("invalid UTF-8", {"a.jsonl": jsonl(*GOOD, b'{"text": "\xff\xfe ' + CANARY.encode() + b'"}')}, 4, {"invalid_utf8": 1}),
    Case("lone surrogate", {"a.jsonl": jsonl(*GOOD, b'{"text": "\\ud800 half"}')}, 4, {"invalid_unicode": 1}),
    Case("NUL in a value", {"a.jsonl": jsonl(*GOOD, {**GOOD[0], "text": "with \0 inside"})}, 5),
    Case("NULs between lines", {"a.jsonl": jsonl(*GOOD, b"\0\0\0\0", GOOD[0])}, 5, {"invalid_json": 1}),
    Case("a broken line", {"a.jsonl": jsonl(*GOOD, b'{"text": "' + CANARY.encode(), GOOD[0])}, 5, {"invalid_json": 1}),
    Case("no newline at the end", {"a.jsonl": jsonl(*GOOD)[:-1]}, 4),
    Case("a line that is no object", {"a.jsonl": jsonl(*GOOD, [1, 2], b'"text"', b"17")}, 4, {"not_an_object": 3}),
    Case("nested too deep", {"a.jsonl": jsonl(*GOOD, b"[" * 100_000)}, 4, {"invalid_json": 1}),
    Case("NaN and Infinity scores", {"a.jsonl": jsonl({**GOOD[0], "score": 1.5}, b'{"text": "x", "score": NaN}', b'{"text": "y", "score": -Infinity}')}, 3),
    Case("an integer too large", {"a.jsonl": jsonl(*GOOD, {**GOOD[0], "id": 10**30})}, 5),
    Case("a drifting type", {"a.jsonl": jsonl(*rows_of(1500)), "b.jsonl": jsonl(*GOOD), "c.jsonl": jsonl(*rows_of(1200), {"id": {"now": "an object"}, "text": "t", "gold": "bad"})}, 2705),
    Case("duplicate ids", {"a.jsonl": jsonl(*GOOD, *GOOD)}, 8, overrides=("input.id=id",)),
    Case("CSV that is not UTF-8", {"a.csv": csv(b"1,na\xc3\xafve,good", b"2,caf\xe9,bad", b"3,f\xc3\xaate,bad")}, 2, {"invalid_utf8": 1}),
    Case("CSV with too many fields", {"a.csv": csv(b"1,fine,good", b"2,a,b,c,d", b"3,fine too,bad")}, 2, {"csv_columns": 1}),
    Case("CSV with an open quote", {"a.csv": csv(b"1,fine,good", b'2,"never closed,bad')}, 1, {"invalid_csv": 1}),
    Case("binary column of invalid UTF-8", {"a.parquet": parquet([{"id": 1, "text": b"fine", "gold": "bad"}, {"id": 2, "text": b"\xff\xfe", "gold": "bad"}])}, 2),
    Case("truncated gzip", {"a.jsonl.gz": cut(gzip.compress(jsonl(*MANY), 1), 0.8), **SURE}, -1, quarantined=("a.jsonl.gz",), stop="a.jsonl.gz: is cut short"),
    Case("no gzip at all", {"a.jsonl.gz": b"plain text", **SURE}, 4, quarantined=("a.jsonl.gz",), stop="a.jsonl.gz: is damaged"),
    Case("damaged bz2", {"a.jsonl.bz2": spoiled(bz2.compress(jsonl(*MANY)), 0.8), **SURE}, -1, quarantined=("a.jsonl.bz2",), stop="a.jsonl.bz2: is damaged"),
    Case("flipped Parquet byte", {"a.parquet": flipped_page(8), "b.parquet": parquet(GOOD)}, 8, quarantined=("a.parquet",), stop="a.parquet: is damaged"),
    Case("truncated Parquet", {"a.parquet": cut(parquet(GOOD)), "b.parquet": parquet(GOOD)}, 4, quarantined=("a.parquet",), stop="a.parquet: is damaged"),
    Case("a Parquet file without the column", {"a.parquet": parquet(GOOD), "b.parquet": parquet([{"id": 5, "gold": "bad"}])}, 4, quarantined=("b.parquet",), stop="b.parquet: no column text"),
    Case("UTF-16", {"a.jsonl": jsonl(*GOOD), "b.jsonl": jsonl(*GOOD).decode().encode("utf-16")}, 4, quarantined=("b.jsonl",), stop="b.jsonl: is in UTF-16"),
    Case("one JSON array", {"a.jsonl": jsonl(*GOOD), "b.json": json.dumps(GOOD).encode()}, 4, quarantined=("b.json",), stop="b.json: is one JSON array"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(
    case: Case, compose: Callable[..., Config], project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (project / "in").mkdir()
    for name, data in case.files.items():
        (project / "in" / name).write_bytes(data)
    overrides = ("input.path=in", "output.rows_per_shard=500", "output.max_error_rate=1", *case.overrides)
    if case.stop:
        with pytest.raises(InputError, match=case.stop) as stopped:
            finished(compose(*overrides, "output.path=stopped"))
        assert "\n" not in str(stopped.value) and "row " not in str(stopped.value)
        overrides = (*overrides, "input.unreadable=quarantine")
    manifest, rows, code = finished(compose(*overrides))

    ids = Counter(row["batchq_id"] for row in rows)
    assert set(ids.values()) == {1}, "each row once"
    assert Counter(row["batchq_error"] for row in rows if row["batchq_error"]) == case.failures
    answered = [row for row in rows if row["label"] is not None]
    assert all((row["label"] is None) != (row["batchq_error"] is None) for row in rows)
    assert [bad["name"] for bad in manifest["quarantined"]] == list(case.quarantined)
    if case.answers >= 0:
        assert len(answered) == case.answers
    else:  # some rows stood before the damage; what is kept is whole, and the neighbour too
        assert 4 < len(answered) < 3004
        texts = {row["text"] for row in MANY} | {row["text"] for row in GOOD}
        assert {row["text"] for row in answered} <= texts
    assert (manifest["rows"], manifest["answers"]) == (len(rows), len(answered))
    for bad in manifest["quarantined"]:
        assert bad["rows"] == sum(row["batchq_id"].startswith(bad["name"]) for row in rows)
    assert code == (4 if case.quarantined else 0)
    assert "Traceback" not in (said := "".join(capfd.readouterr())) and CANARY not in said
    meta = "".join(p.read_text() for p in (project / "out/meta").rglob("*.json"))
    assert CANARY not in meta


def test_duplicate_ids_of_the_users_are_counted(compose: Callable[..., Config], project: Path) -> None:
    (project / "rows.jsonl").write_bytes(jsonl(*GOOD, *GOOD[:2]))
    finished(compose("input.id=id"))
    assert json.loads((project / "out/meta/report.json").read_text())["duplicate_ids"] == 2


def test_a_file_that_was_only_damaged_on_its_way_is_read_again(
    compose: Callable[..., Config], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "rows.jsonl").write_bytes(jsonl(*rows_of(30)))
    real = input.rows_of
    failed: list[str] = []

    def once(*where: Any, **how: Any) -> Any:
        for number, row in enumerate(real(*where, **how)):
            if number == 5 and not failed:
                failed.append(row.id)
                raise InputError("rows.jsonl: is damaged")
            yield row

    config = compose()
    fixed = planned(config)
    monkeypatch.setattr(input, "rows_of", once)
    manifest, rows, code = finished(config, fixed)
    assert failed and len(rows) == 30 and not manifest["quarantined"] and code == 0


def test_a_plan_leaves_unreadable_files_out_and_a_resume_agrees(compose: Callable[..., Config], project: Path) -> None:
    (project / "in").mkdir()
    (project / "in/a.jsonl.gz").write_bytes(b"none")
    (project / "in/b.jsonl").write_bytes(jsonl(*GOOD))
    config = compose("input.path=in", "input.unreadable=quarantine")
    made = make_plan(config, "m", Scheme.none, "m")
    assert [o.name for o in made.objects] == ["b.jsonl"] and list(made.unreadable) == ["a.jsonl.gz"]
    assert check_inputs(made, config) == []
    (project / "in/b.jsonl").unlink()
    with pytest.raises(InputError, match="not one input file can be read"):
        make_plan(config, "m", Scheme.none, "m")
