"""A store's listing where object names are no paths."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from batchq import input, storage
from batchq.config import Config, InputConfig, Scheme, Unreadable
from batchq.errors import ConfigError, InputError
from batchq.plan.draft import make_plan
from batchq.plan.inputs import check_inputs
from tests.inputs import rows
from tests.s3 import Flaky, flaky

if TYPE_CHECKING:
    from tests.s3 import S3

ROW = b'{"text": "all is well"}\n'


@pytest.fixture
def store(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flaky]:
    with flaky(s3) as proxy:
        for name, value in proxy.env.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def root(s3: S3, store: Flaky) -> str:
    """A prefix with three good objects."""
    root = f"{s3.make_bucket('listing')}/{uuid.uuid4().hex}"
    for name in ("a.jsonl", "in/b c+d%20.jsonl", "z.jsonl"):
        storage.put(f"{root}/{name}", ROW)
    return root


GOOD = ["a.jsonl", "in/b c+d%20.jsonl", "z.jsonl"]
ODD = ["/b.jsonl", "x//y.jsonl", "x.jsonl//", "./c.jsonl", "x/../d.jsonl", "new\nline.jsonl", "bell\x07.jsonl"]
MARKERS = ["", "in/", "in//", "x//", "x/"]


def key(root: str, name: str) -> str:
    return f"{root.split('/', 3)[3]}/{name}"


@pytest.mark.parametrize("name", ODD)
def test_a_key_that_is_no_path_is_named_or_quarantined_and_its_neighbours_are_read(
    root: str, store: Flaky, name: str
) -> None:
    store.listed = {key(root, name): 5}
    with pytest.raises(InputError, match="a name that can't be opened") as refused:
        input.list_input(InputConfig(path=root))
    assert storage.normalize(root) in str(refused.value) and "quarantine" in str(refused.value)
    found = input.list_input(InputConfig(path=root, unreadable=Unreadable.quarantine))
    assert [each.name for each in found.objects] == GOOD and len(found.unreadable) == 1


@pytest.mark.parametrize("path", ["*.jsonl", "in", "in/*", "[az].jsonl", "a.jsonl"])
def test_a_key_that_is_not_meant_is_in_nobodys_way(root: str, store: Flaky, path: str) -> None:
    store.listed = {key(root, f"other/{name}"): 5 for name in ODD}
    assert input.list_input(InputConfig(path=f"{root}/{path}")).objects


def test_markers_of_folders_are_no_objects(root: str, store: Flaky) -> None:
    storage.put(f"{root}/empty.jsonl", b"")
    store.listed = {key(root, name): 0 for name in MARKERS}
    found = input.list_input(InputConfig(path=root))
    assert [each.name for each in found.objects] == GOOD and not found.unreadable


def test_a_marker_that_has_its_folders_name_hides_nothing(root: str, store: Flaky) -> None:
    """Azure's data lakes list a folder as an object of no bytes."""
    store.choose = lambda head: "accept" if head.startswith(b"HEAD") and b"/in " in head else "pass"
    assert storage.stat(f"{root}/in").size == 0
    assert [each.name for each in input.list_input(InputConfig(path=f"{root}/in")).objects] == ["b c+d%20.jsonl"]


def test_a_pattern_of_buckets_is_refused() -> None:
    with pytest.raises(ConfigError, match="a bucket's name can't be a pattern"):
        input.list_input(InputConfig(path="s3://buck*/a.jsonl"))


def test_what_is_listed_by_name_is_read(root: str, store: Flaky) -> None:
    """Sizes, etags and spellings are those that obstore has."""
    without = list(storage.list_objects(root))
    store.listed = {key(root, "x//y"): 1}
    assert [each for each in storage.list_objects(root) if not each.error] == without
    for name in GOOD:
        [row] = rows(f"{root}/{name}")
        assert row.columns == {"text": "all is well"}


def test_an_object_that_may_not_be_read_is_quarantined(root: str, store: Flaky, compose: Callable[..., Config]) -> None:
    """As one in an archive's storage class is, or under a key of its own."""
    store.choose = lambda head: "deny" if head.startswith((b"GET", b"HEAD")) and b"/z.jsonl " in head else "pass"
    config = compose(f"input.path={root}", "input.unreadable=quarantine", "task.gold=null")
    made = make_plan(config, "model", Scheme.none, "model")
    assert [each.name for each in made.objects] == GOOD[:2]
    assert "access denied" in made.unreadable["z.jsonl"]
    assert check_inputs(made, config) == []
    store.choose = lambda head: "deny" if b".jsonl " in head else "pass"
    with pytest.raises(InputError, match=r"not one input file can be read.*access denied"):
        make_plan(config, "model", Scheme.none, "model")


@pytest.mark.parametrize("odd", ["many//odd", "many/0001//odd", "many/1050//odd"])
def test_pages_are_followed(root: str, store: Flaky, odd: str) -> None:
    """Also where the odd key is on the first page and where it is on the second."""
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda number: storage.put(f"{root}/many/{number:04}", b"1"), range(1100)))
    store.listed = {key(root, odd): 1}
    found = list(storage.list_objects(root))
    assert [each.uri for each in found if each.error] == [f"{root}/{odd}"]
    assert len(found) == len({each.uri for each in found}) == 1104
