"""Files that are there and are no rows of an input: a run's own output and caches, what other runs of batchq wrote, and
tables that have a log of their own, which says which of their files count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, compress

from batchq import storage
from batchq.errors import AccessDenied, InputError, NotFound
from batchq.records import COMPACT, COMPACTED, PLAN, RUNS, unsealed

OWN = "output.path"
OUTPUT = "output of batchq"
ASKED_AT_ONCE = 16

_UUID = "[0-9a-f]{8}-[0-9a-f-]{27}"
# kind -> the folder right below it that it is known by, what is in there, and how its rows are had
TABLES = {
    "Delta table": ("_delta_log", "[^/]+", "spark.read.format('delta'), or deltalake's to_pyarrow_dataset"),
    "Hudi table": (".hoodie", ".+", "spark.read.format('hudi')"),
    "Iceberg table": (
        "metadata",
        rf"(?:v\d+|\d{{5,}}-{_UUID})(?:\.gz)?\.metadata\.json(?:\.gz)?|snap-\d+-\d+-{_UUID}\.avro|{_UUID}-m\d+\.avro",
        "spark.read.format('iceberg'), or pyiceberg's to_arrow",
    ),
    "Paimon table": ("snapshot", r"snapshot-\d+", "spark.read.format('paimon')"),
    "streaming sink of Spark": ("_spark_metadata", r"\d+(?:\.compact)?", "spark.read.parquet or spark.read.json"),
}
LOGGED = {"Delta table": "delta", "Iceberg table": "iceberg"}  # kind -> the input.format that reads it
_OUTPUT = rf"{re.escape(PLAN)}|{re.escape(RUNS)}/\d{{8}}T\d{{6}}-[0-9a-f]{{8}}\.json"
_ROWS = re.compile(rf"data|{COMPACTED}[0-9a-f]+")  # folders of an output, right below it
_PRODUCT = re.compile(rf"(?:{_ROWS.pattern}|meta)/")
_KINDS = {OUTPUT: _OUTPUT, **{kind: f"{folder}/(?:{names})" for kind, (folder, names, _) in TABLES.items()}}
MARK = re.compile("/(?:" + "|".join(f"({mark})" for mark in _KINDS.values()) + r")\Z", re.DOTALL)  # at a URI's end


class Never:
    """Folders and prefixes that a run reads no input from, whatever leads there: links, another spelling or case.

    `prefixes`: what each is called -> where it is.
    """

    def __init__(self, prefixes: Mapping[str, str]) -> None:
        self._prefixes = {name: storage.normalize(uri) for name, uri in prefixes.items()}
        local = {name: uri for name, uri in self._prefixes.items() if not storage.is_remote(uri)}
        self._identities = {found[0]: name for name, uri in local.items() if (found := storage.identities(uri))}
        self._known: dict[str, str] = {}  # folder -> the name of what it lies in

    def holds(self, uri: str) -> str:
        """The name of the prefix that an object lies in, empty if in none."""
        for name, prefix in self._prefixes.items():
            if uri.startswith(f"{prefix}/"):
                return name
        if storage.is_remote(uri) or not self._identities:
            return ""
        folder = storage.folder_of(uri)
        if folder not in self._known:
            above = storage.identities(folder)
            self._known[folder] = next((self._identities[each] for each in above if each in self._identities), "")
        return self._known[folder]


class Kinds:
    """Of the folders that hold what a listing found, those that are tables or outputs of batchq."""

    def __init__(self, listing: storage.Listing) -> None:
        self._by_folder: dict[str, str] = {}
        self._known: dict[str, tuple[str, str]] = {}
        self._by_folder.update(filter(None, map(_marked, listing.marks or ())))
        folders = set(chain.from_iterable(map(_above, {each.uri.rpartition("/")[0] for each in listing.found})))
        if listing.marks is not None:  # all below its root was looked at
            folders = {each for each in folders if not f"{each}/".startswith(f"{listing.root}/")}
        with_products = {above for above, _, name in (f.rpartition("/") for f in folders) if _PRODUCT.match(f"{name}/")}
        places = [(folder, kind) for folder in folders for kind in _KINDS if kind != OUTPUT or folder in with_products]
        if storage.is_remote(listing.root):
            with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
                found = list(threads.map(_is, places))
        else:
            found = list(map(_is, places))
        self._by_folder.update(compress(places, found))
        outputs = [*filter(None, map(_marked, listing.marks or ())), *compress(places, found)]
        self._by_folder.update(place for place in outputs if place[1] == OUTPUT)  # an output may be a table too

    def of(self, uri: str) -> tuple[str, str]:
        """The innermost such folder that an object lies in, and its kind; both empty if there is none.

        What is beside data/ and meta/ in an output is a user's own.
        """
        own = uri.rpartition("/")[0]
        if own not in self._known:
            near = ((folder, self._by_folder[folder]) for folder in _above(own) if folder in self._by_folder)
            products = ((folder, kind) for folder, kind in near if kind != OUTPUT or _is_product(own, folder))
            self._known[own] = next(products, ("", ""))
        return self._known[own]


def refuse_table(uri: str, folder: str, kind: str) -> None:
    """Raises InputError, which says how the rows of a table are had."""
    if kind in LOGGED:
        format = LOGGED[kind]
        raise InputError(
            f"{uri}: lies in the {kind} {folder}; its own log says which of its files count, so they are no list of "
            f"rows. Read the table: input.path={folder} input.format={format} (pip install 'batchq[{format}]')"
        )
    raise InputError(
        f"{uri}: lies in the {kind} {folder}; its own log says which of its files count, so they are no list of rows. "
        f"Write the rows to a folder by way of {TABLES[kind][2]}, and name that folder"
    )


def names_rows(entry: str, output: str) -> str:
    """The folder of an output of batchq that an entry of input.path points into, if the output's rows are read there;
    empty if it points to none of its folders of rows.

    Raises InputError for one that isn't read any more, or yet: parts that were compacted, a compaction under way.
    """
    parts, depth = storage.normalize(entry).split("/"), output.count("/") + 2
    named = "".join(parts[depth - 1 : depth])
    if "**" in parts[:depth] or not _ROWS.fullmatch(named):
        return ""
    if named != (read := _read_from(output)):
        raise InputError(f"input.path={entry}: the rows of {output} are read from {output}/{read}; name that")
    return f"{output}/{named}"


def _read_from(output: str) -> str:
    """The name of the folder that an output's rows are read from; the rule is that of output/objects.py."""
    with suppress(NotFound):
        return str(storage.read_json(storage.join(output, COMPACT), unsealed)["folder"])
    return "data"


def _is_product(folder: str, output: str) -> bool:
    return folder.startswith(f"{output}/") and _PRODUCT.match(f"{folder[len(output) + 1 :]}/") is not None


def _above(folder: str) -> Iterator[str]:
    """A folder and those above it, the innermost first; a bucket, but not what is above it."""
    least = folder.find("://") + 3 if "://" in folder else 1
    while len(folder) > least:
        yield folder
        folder = folder.rpartition("/")[0]


def _marked(uri: str) -> tuple[str, str] | None:
    """The folder that a URI marks, and its kind."""
    mark = MARK.search(uri)
    return (uri[: mark.start()], list(_KINDS)[(mark.lastindex or 0) - 1]) if mark else None


def _is(place: tuple[str, str]) -> bool:
    """Whether a folder is of a kind."""
    folder, kind = place
    if kind == OUTPUT:
        with suppress(AccessDenied):  # of a store that tells nobody who may not list what isn't there
            if storage.exists(storage.join(folder, PLAN)):
                return True
    inside = storage.join(folder, RUNS if kind == OUTPUT else TABLES[kind][0])
    return any(_marked(f"{inside}/{name}") == place for name in storage.peek(inside))
