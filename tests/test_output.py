"""Records in an output: marks and receipts that are damaged, or of the version before."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from batchq.config import Config
from batchq.errors import StorageError
from batchq.output import marks, receipts
from batchq.output.marks import Mark, Search
from batchq.records import Range, Shard
from tests.helpers import rows_of, write_jsonl
from tests.jobs import labelled, planned


def test_a_damaged_object_is_named(compose: Callable[..., Config], project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    config = compose()
    asyncio.run(labelled(config, planned(config)))
    part = next((project / "out/data").iterdir())
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(StorageError, match="not a whole Parquet file"):
        receipts.read(str(part))


def test_a_mark_in_which_a_byte_flipped_accuses_nobody(tmp_path: Path) -> None:
    shard = Shard(0, 0, Range("rows"))
    marks.add(str(tmp_path), shard, Mark("a", Search(culprits=(17,))), 1)
    assert [m.search.culprits for m in marks.read(str(tmp_path), shard)] == [(17,)]
    (mark,) = (tmp_path / "meta/attempts/00000").iterdir()
    mark.write_bytes(mark.read_bytes().replace(b"[17]", b"[19]"))
    with pytest.raises(StorageError, match=r"0001\.json: is damaged"):
        marks.read(str(tmp_path), shard)


def test_marks_and_receipts_of_the_version_before_are_read() -> None:
    search = {"strikes": 3, "suspects": [4, 9], "alone": [9], "convicted": [2], "kept": 40, "barren": 1, "lost": 3}
    mark = marks.from_json({"attempt": "a", "search": search | {"witnessed": True}, "over": True, "in_flight": [9]})
    assert mark == Mark("a", Search(3, (4, 9), (9,), (2,), 40, 1, 3, True), True, (9,))
    body = json.dumps(
        {"shard": 5, "part": 0, "last": True, "attempt": "a", "fingerprint": "f", "labels": {"good": 9}, "failures": {}}
        | {"usage": {"rows": 9, "answers": 9}, "next_position": 0, "reused": 4, "copied": 3, "copied_tokens": 77}
        | {"quarantined": ""}
    )
    stored = {"digest": hashlib.sha256(body.encode()).hexdigest(), "receipt": body}
    receipt = receipts.from_json(json.dumps(stored).encode())
    assert (receipt.from_spill, receipt.from_reuse, receipt.from_reuse_tokens) == (4, 3, 77)
