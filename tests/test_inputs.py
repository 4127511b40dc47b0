"""Whether input objects still are those that were planned."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from batchq.cli.verify import verify
from batchq.config import Config
from batchq.errors import Changed
from batchq.plan.inputs import check_inputs, obeyed
from batchq.records import Plan
from tests.helpers import rows_of, write_jsonl
from tests.jobs import finished, planned


@pytest.fixture
def rows(project: Path) -> Path:
    return write_jsonl(project / "rows.jsonl", rows_of(9))


def replaced(rows: Path) -> None:
    """Another file under the name, of the same size and time."""
    before = rows.stat()
    rows.unlink()
    write_jsonl(rows, rows_of(9)[::-1])
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (rows.stat().st_size, rows.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def rewritten(rows: Path) -> None:
    """The same file with other bytes, as many, and its old time."""
    before = rows.stat()
    rows.write_bytes(rows.read_bytes().replace(b"well", b"evil"))
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))


def longer(rows: Path) -> None:
    write_jsonl(rows, rows_of(10))


def gone(rows: Path) -> None:
    rows.unlink()


def touched(rows: Path) -> None:
    rows.chmod(0o600)


def restored(rows: Path) -> None:
    """A copy put back, as rsync -t does."""
    copy, before = rows.read_bytes(), rows.stat()
    rows.unlink()
    rows.write_bytes(copy)
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (replaced, "was touched .* its size and time are the same.*input.trust_times=true"),
        (rewritten, "was touched .* its size and time are the same"),
        (touched, "was touched"),
        (restored, "was touched"),
        (longer, "is not the file that was planned"),
        (gone, "was planned and is gone"),
    ],
)
def test_a_file_that_is_another_one_now_is_noticed(
    change: Callable[[Path], None], why: str, rows: Path, compose: Callable[..., Config]
) -> None:
    config = compose()
    fixed = planned(config)
    assert check_inputs(fixed, config) == []
    change(rows)
    with pytest.raises(Changed, match=rf"rows\.jsonl: {why}") as refused:
        check_inputs(fixed, config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("change", [touched, restored])
def test_a_file_that_was_only_touched_is_read_on_with_trust_times(
    change: Callable[[Path], None], rows: Path, compose: Callable[..., Config]
) -> None:
    config = compose("input.trust_times=true")
    for first in (compose(), config):  # whether or not it was planned so
        fixed = planned(dataclasses.replace(first, output=dataclasses.replace(first.output, path=f"out-{id(first)}")))
        change(rows)
        assert check_inputs(fixed, config) == []
        asked = dataclasses.replace(config, output=dataclasses.replace(config.output, path=f"out-{id(first)}"))
        _, found, code = finished(asked, obeyed(fixed, config))
        assert (len(found), code) == (9, 0)
        assert verify(asked)[0]
    longer(rows)
    with pytest.raises(Changed, match="is not the file that was planned"):
        check_inputs(fixed, config)


def test_a_plan_whose_etags_are_size_and_time_alone_goes_on(rows: Path, compose: Callable[..., Config]) -> None:
    """As version 0.1.0 wrote them."""
    config = compose()
    fixed = planned(config)
    [obj] = fixed.objects
    former = f"{rows.stat().st_mtime_ns:x}-{rows.stat().st_size:x}"
    assert obj.etag.startswith(f"{former}-")
    old: Plan = dataclasses.replace(fixed, objects=(dataclasses.replace(obj, etag=former),))
    touched(rows)
    assert check_inputs(old, config) == []
    _, found, code = finished(config, old)
    assert (len(found), code) == (9, 0)
    longer(rows)
    with pytest.raises(Changed):
        check_inputs(old, config)


def test_what_appears_beside_planned_files_is_named_and_in_nobodys_way(
    rows: Path, project: Path, compose: Callable[..., Config]
) -> None:
    write_jsonl(project / "in/a.jsonl", rows_of(3))
    config = compose("input.path=in")
    fixed = planned(config)
    (project / "in/dangling.jsonl").symlink_to("nowhere")
    (project / "in/notes.md").write_text("-")
    write_jsonl(project / "in/b.jsonl", rows_of(3))
    write_jsonl(project / "in/_hidden.jsonl", rows_of(3))
    assert check_inputs(fixed, config) == ["b.jsonl", "notes.md"]
    (project / "in/_delta_log").mkdir()
    (project / "in/_delta_log/00000000000000000000.json").write_text("{}")
    assert check_inputs(fixed, config) == [], "what became a table is no reason to lose a run"
    _, found, code = finished(config, fixed)
    assert (len(found), code) == (3, 0)
