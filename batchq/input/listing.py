"""Which objects an input consists of."""

from __future__ import annotations

import functools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from batchq import storage
from batchq.config import InputConfig, InputFormat, Unreadable, suggest
from batchq.errors import InputError, NotFound
from batchq.input import snapshots
from batchq.input.foreign import MARK, OUTPUT, OWN, Kinds, Never, names_rows, refuse_table
from batchq.input.formats import LOGGED, TABLES, format_of, known_format
from batchq.input.iceberg import iceberg
from batchq.input.snapshots import Snapshot
from batchq.machine.progress import visible
from batchq.records import InputObject

DATASET_FILES = {"state.json", "dataset_info.json", "dataset_dict.json"}  # what save_to_disk writes beside the rows


HIDDEN, SPECIAL = "hidden or of other tools", "pipes, sockets, devices or markers of folders"
OUTPUTS, EMPTY = "in outputs of batchq", "empty"
HINTS = {HIDDEN: "name one in full to read it", SPECIAL: "no files", OUTPUTS: "name an output's data/ to read its rows"}


@dataclass(frozen=True, slots=True)
class Inputs:
    """An input's objects, sorted by name; what else is there, by why it is none of them: how many; and what can't be
    read, by name: why."""

    objects: list[InputObject]
    left_out: dict[str, int]
    unreadable: dict[str, str]
    snapshot: Snapshot | None = None  # of a table with a log of its own


def list_input(config: InputConfig, never: Mapping[str, str] | None = None) -> Inputs:
    """The input's objects, as `find_input` has them, all of one format; files of no bytes are left out.

    Raises InputError also if a format can't be told, or there are several, and for what can't be read, unless
    input.unreadable=quarantine.
    """
    if config.format in LOGGED:
        if config.format is InputFormat.delta:
            snapshot = snapshots.delta(config.path, config.version)
        else:
            snapshot = iceberg(config.path, config.version, config.columns)
        if not snapshot.objects:
            raise InputError(f"input.path={config.path}: the input is empty")
        return Inputs(snapshot.objects, {}, {}, snapshot)
    if config.version is not None:
        raise InputError(
            f"input.version={config.version}: goes with input.format={' or '.join(sorted(e.value for e in LOGGED))}"
        )
    found = find_input(config, never or {})
    left_out, unreadable = Counter(found.left_out), dict(found.unreadable)
    if unreadable and config.unreadable is Unreadable.stop:
        raise InputError(f"{_first(unreadable)}; mend it, or go on without it by input.unreadable=quarantine")
    formats: dict[str, str] = {}  # and a name of each
    objects = []
    for each in found.objects:
        if not each.size and not _must_have_bytes(each, config.format):
            left_out[EMPTY] += 1
            continue
        try:
            formats[format_of(each.name, config.format)] = each.name
            objects.append(each)
        except InputError as error:
            if config.unreadable is Unreadable.stop:
                raise
            unreadable[each.name] = str(error)
    if len(formats) > 1:
        examples = ", ".join(f"{format} ({name})" for format, name in sorted(formats.items()))
        raise InputError(f"input.path={config.path}: one format at a time, but there are {examples}; narrow the path")
    if not objects:
        why = f"not one input file can be read: {_first(unreadable)}" if unreadable else "the input is empty"
        raise InputError(f"input.path={config.path}: {why}")
    return Inputs(objects, dict(left_out), unreadable)


def find_input(config: InputConfig, never: Mapping[str, str]) -> Inputs:
    """What input.path means, not looked into: a file, a folder, a pattern, or several separated by commas.

    Names are relative to what was asked for, with input.date to what is above its folder. Of a dataset on disk only
    its current data files count. Hidden files are left out, and what is below a prefix of `never` (by what it is
    called), or in an output of batchq, unless an entry points into its data/. Raises InputError if nothing is left of
    an entry, or for files of a table with its own log.
    """
    excluded, by_uri, roots = Never(never), dict[str, storage.Stat](), []
    left_out: dict[str, set[str]] = defaultdict(set)
    for entry in filter(None, (part.strip() for part in config.path.split(","))):
        try:
            listing = storage.glob(entry, MARK)
        except NotFound as error:
            why = (
                "no such bucket" if str(error).endswith("no such bucket") else "no file, folder or object of that name"
            )
            raise InputError(f"input.path={entry}: {why}{_near(entry)}") from None
        matched = _data_files(_own(entry, listing, excluded, left_out), config.format)
        if not matched:
            raise InputError(f"input.path={entry}: nothing there matches{_but(left_out)}")
        roots.append(_above_dates(listing.root) if config.date else listing.root)
        by_uri.update((each.uri, each) for each in matched)
    root = _common_root(roots)
    found = sorted(by_uri.values(), key=lambda each: each.uri)
    return Inputs(
        [InputObject(each.uri, each.uri[len(root) :], each.size, each.etag) for each in found if not each.error],
        {why: len(uris) for why, uris in left_out.items() if uris},
        {visible(each.uri[len(root) :]): f"{visible(each.uri)}: {each.error}" for each in found if each.error},
    )


def _near(entry: str) -> str:
    """A local file or folder of nearly that name."""
    path = storage.normalize(entry)
    folder, name = os.path.split(path)
    if storage.is_remote(path) or not os.path.isdir(folder) or not os.access(folder, os.R_OK):
        return ""
    return suggest.did_you_mean(name, [each for each in os.listdir(folder) if each[0] not in "._"])


def _own(entry: str, listing: storage.Listing, never: Never, left_out: dict[str, set[str]]) -> list[storage.Stat]:
    """What an entry's listing found but products of runs; `left_out` gets what is passed over. Raises InputError for a
    table's files."""
    kinds, kept, inside = Kinds(listing), [], never.holds(f"{listing.root}/")
    rows_folder = functools.cache(functools.partial(names_rows, entry))
    left_out[HIDDEN] |= {each for each in listing.hidden if not (never.holds(each) or kinds.of(each)[0])}
    left_out[SPECIAL] |= listing.special
    for each in listing.found:
        folder, kind = kinds.of(each.uri)
        name = never.holds(each.uri)
        if name and (name == OWN or name != inside):  # a folder of caches may be one of corpora that somebody names
            left_out[f"in {name}"].add(each.uri)
        elif kind == OUTPUT and not ((rows := rows_folder(folder)) and each.uri.startswith(f"{rows}/")):
            left_out[OUTPUTS].add(each.uri)
        elif kind and kind != OUTPUT:
            refuse_table(each.uri, folder, kind)
        else:
            kept.append(each)
    return kept


def _first(unreadable: dict[str, str]) -> str:
    return next(iter(unreadable.values())) + (f" (and {len(unreadable) - 1:,} more)" if len(unreadable) > 1 else "")


def _but(left_out: dict[str, set[str]]) -> str:
    """What there is instead of input, and what to do."""
    words = [
        f"{len(uris):,} {why}, such as {visible(min(uris))} ({HINTS.get(why, 'a run reads none of its own products')})"
        for why, uris in left_out.items()
        if uris
    ]
    return f"; left out: {'; '.join(words)}" if words else ""


def _must_have_bytes(obj: InputObject, format: InputFormat) -> bool:
    """Whether an object of no bytes is damaged, as a table is, rather than empty. In a store it may be the marker of a
    folder whose name ends like a file's, and then no object has its name."""
    return known_format(obj.name, format) in TABLES and (not storage.is_remote(obj.uri) or storage.exists(obj.uri))


def _data_files(matched: list[storage.Stat], format: InputFormat) -> list[storage.Stat]:
    """Leave out what lies beside the rows of a dataset on disk: its description, caches, and files of older saves."""
    folders = {each.uri.rpartition("/")[0] for each in matched if each.uri.endswith(".arrow")}
    if format is not InputFormat.dataset and (format is not InputFormat.auto or not folders):
        return matched
    saved = {}  # folder -> the data files of its last save
    for each in matched:
        folder, _, name = each.uri.rpartition("/")
        if name == "state.json" and folder in folders:
            try:
                state = json.loads(storage.read(each.uri, etag=each.etag))
                saved[folder] = {file["filename"] for file in state["_data_files"]}
            except (ValueError, TypeError, KeyError):
                raise InputError(f"{each.uri}: doesn't say which files the dataset has; name them instead") from None

    def is_data(each: storage.Stat) -> bool:
        folder, _, name = each.uri.rpartition("/")
        if name.endswith(".arrow"):
            return name in saved[folder] if folder in saved else not name.startswith("cache-")
        return format is InputFormat.auto and name not in DATASET_FILES

    return [each for each in matched if is_data(each)]


def _above_dates(root: str) -> str:
    """What is above the first folder that is called as ds=2026-11-21 is; the root itself where none is."""
    folders = root.split("/")
    dated = (place for place, name in enumerate(folders) if re.fullmatch(r"[^=]+=\d{4}-\d\d-\d\d", name, re.ASCII))
    return "/".join(folders[: next(dated, len(folders))])


def _common_root(roots: list[str]) -> str:
    """What all names leave off: the folder that the roots share, with its slash; nothing if they share no store."""
    shared = os.path.commonprefix([root.split("/") for root in roots])  # noqa: RUF071 - of lists, so by component
    is_bucket = len(shared) > 2 or (shared and "://" not in roots[0])
    return "/".join(shared) + "/" if is_bucket else ""
