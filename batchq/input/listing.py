"""Which objects an input consists of."""

from __future__ import annotations

import json
import os

from batchq import storage
from batchq.config import InputConfig, InputFormat
from batchq.errors import InputError, NotFound
from batchq.input.formats import format_of
from batchq.records import InputObject

DATASET_FILES = {"state.json", "dataset_info.json", "dataset_dict.json"}  # what save_to_disk writes beside the rows


def list_input(config: InputConfig) -> list[InputObject]:
    """The input's objects, sorted by name: a file, a folder, a pattern, or several separated by commas.

    Names are relative to what was asked for. Of a dataset on disk only its current data files count; files of no bytes
    don't. Raises InputError if nothing is there, if a format can't be told, or if there are several.
    """
    by_uri: dict[str, storage.Stat] = {}
    roots = []
    for entry in filter(None, (part.strip() for part in config.path.split(","))):
        try:
            matched = _data_files(storage.glob(entry), config.format)
        except NotFound:
            raise InputError(f"input.path={entry}: no file, folder or object of that name") from None
        if not matched:
            raise InputError(f"input.path={entry}: nothing there matches")
        roots.append(storage.root_of(entry, matched))
        by_uri.update((each.uri, each) for each in matched)
    root = _common_root(roots)
    objects = [InputObject(each.uri, each.uri[len(root) :], each.size, each.etag) for each in by_uri.values()]
    formats = {format_of(each.name, config.format): each.name for each in objects}
    if len(formats) > 1:
        examples = ", ".join(f"{format} ({name})" for format, name in sorted(formats.items()))
        raise InputError(f"input.path={config.path}: one format at a time, but there are {examples}; narrow the path")
    objects = [each for each in objects if each.size or not formats.keys().isdisjoint({"parquet", "dataset"})]
    if not objects:
        raise InputError(f"input.path={config.path}: the input is empty")
    return sorted(objects, key=lambda each: each.name)


def _data_files(matched: list[storage.Stat], format: InputFormat) -> list[storage.Stat]:
    """Leave out what lies beside the rows of a dataset on disk: its description, caches, and files of older saves."""
    folders = {each.uri.rpartition("/")[0] for each in matched if each.uri.endswith(".arrow")}
    if format is not InputFormat.dataset and (format is not InputFormat.auto or not folders):
        return matched
    saved = {}  # folder -> the data files of its last save
    for each in matched:
        folder, _, name = each.uri.rpartition("/")
        if name == "state.json" and folder in folders:
            state = json.loads(storage.read(each.uri, etag=each.etag))
            saved[folder] = {file["filename"] for file in state["_data_files"]}

    def is_data(each: storage.Stat) -> bool:
        folder, _, name = each.uri.rpartition("/")
        if name.endswith(".arrow"):
            return name in saved[folder] if folder in saved else not name.startswith("cache-")
        return format is InputFormat.auto and name not in DATASET_FILES

    return [each for each in matched if is_data(each)]


def _common_root(roots: list[str]) -> str:
    """What all names leave off: the folder that the roots share, with its slash; nothing if they share no store."""
    shared = os.path.commonprefix([root.split("/") for root in roots])  # noqa: RUF071 - of lists, so by component
    is_bucket = len(shared) > 2 or (shared and "://" not in roots[0])
    return "/".join(shared) + "/" if is_bucket else ""
