"""An input object's bytes -> rows: JSONL, CSV, Parquet, text lines, a dataset on disk; gz, zst and bz2 of the first two
and of text.

A row that can't be parsed is a Row with an error, and its neighbours are read as ever. An object that can't be read on
raises InputError after the rows before the damage. Memory stays flat: a block, a batch or a line, whatever the size.
"""

from __future__ import annotations

import json
import os
from itertools import pairwise

from batchq import storage
from batchq.config import InputConfig, InputFormat
from batchq.errors import InputError, NotFound
from batchq.read.formats import format_of, readable, splittable
from batchq.read.lines import TAIL
from batchq.read.rows import read_rows, rows_a_byte, rows_of
from batchq.read.schema import OPENED_AT_ONCE, as_text, infer_schema, unreadable
from batchq.read.tables import arrow_batches, row_groups
from batchq.records import InputObject, Range

__all__ = [
    "OPENED_AT_ONCE",
    "as_text",
    "format_of",
    "infer_schema",
    "list_input",
    "read_rows",
    "rows_a_byte",
    "rows_of",
    "split",
    "splittable",
    "taper",
    "unreadable",
]

DATASET_FILES = {"state.json", "dataset_info.json", "dataset_dict.json"}  # what save_to_disk writes beside the rows


# ---- what there is ----


def list_input(config: InputConfig) -> list[InputObject]:
    """The input's objects, sorted by name: a file, a folder, a pattern, or several separated by commas.

    Names are relative to what was asked for. Of a dataset on disk only its current data files count; files of no bytes
    don't. Raises InputError if nothing is there, if a format can't be told, or if there are several.
    """
    found: dict[str, storage.Stat] = {}
    roots = []
    for entry in filter(None, (part.strip() for part in config.path.split(","))):
        try:
            matched = _data_files(storage.glob(entry), config.format)
        except NotFound:
            raise InputError(f"input.path={entry}: no file, folder or object of that name") from None
        if not matched:
            raise InputError(f"input.path={entry}: nothing there matches")
        roots.append(storage.root_of(entry, matched))
        found.update((each.uri, each) for each in matched)
    root = _common_root(roots)
    objects = [InputObject(each.uri, each.uri[len(root) :], each.size, each.etag) for each in found.values()]
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


# ---- cutting it up ----


def split(obj: InputObject, format: str, *, rows_per_shard: int) -> list[Range]:
    """Cut one object into ranges of about `rows_per_shard` rows, reading no more of it than a footer or a sample.

    Bytes are cut evenly, by the length of the first rows. Row groups stay whole, unless one is twice too large. A
    dataset in an object store is one stream: its rows can't be found without reading it.
    """
    unit = splittable(obj.name, format)
    if unit == "stream" or (format == "dataset" and storage.is_remote(obj.uri)):
        return [Range("stream")]
    if unit == "bytes":
        sample = storage.read(obj.uri, 0, TAIL * 4, etag=obj.etag)
        row_bytes = len(sample) / max(1, sample.count(b"\n"))
        return _even(Range("bytes", 0, obj.size), obj.size / row_bytes / rows_per_shard)
    with readable(obj, format):
        groups = row_groups(obj) if format == "parquet" else [end - begin for begin, end, _ in arrow_batches(obj)]
    ranges: list[Range] = []
    start = stop = 0
    for rows in groups:
        if start < stop and stop - start + rows > rows_per_shard * 1.5:
            ranges.append(Range("rows", start, stop))
            start = stop
        stop += rows
        if rows > 2 * rows_per_shard:
            ranges += _even(Range("rows", start, stop), rows / rows_per_shard)
            start = stop
        elif stop - start >= rows_per_shard:
            ranges.append(Range("rows", start, stop))
            start = stop
    return [*ranges, Range("rows", start, stop)] if start < stop else ranges


def taper(ranges: list[tuple[int, Range]], tail: int) -> list[tuple[int, Range]]:
    """Cut the last `tail` ranges, each with its object's number, in halves, and the last `tail` of those again, so that
    no worker waits long for another at the end. Streams stay whole."""
    for _ in range(2):
        halves = [(number, half) for number, whole in ranges[-tail:] for half in _halves(whole)]
        ranges = [*ranges[:-tail], *halves]
    return ranges


def _halves(whole: Range) -> list[Range]:
    return [whole] if whole.unit == "stream" or whole.stop - whole.start < 2 else _even(whole, 2)


def _even(whole: Range, pieces: float) -> list[Range]:
    count = max(1, round(pieces))
    cuts = [whole.start + (whole.stop - whole.start) * cut // count for cut in range(count + 1)]
    return [Range(whole.unit, begin, end) for begin, end in pairwise(cuts) if begin < end]
