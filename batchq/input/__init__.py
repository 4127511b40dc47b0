"""An input object's bytes -> rows: JSONL, CSV, Parquet, text lines, a dataset on disk; gz, zst and bz2 of the first two
and of text.

A row that can't be parsed is a Row with an error, and its neighbours are read as ever. An object that can't be read on
raises InputError after the rows before the damage. Memory stays flat: a block, a batch or a line, whatever the size.
"""

from __future__ import annotations

from batchq.input.dialect import with_dialects
from batchq.input.dialect import words as dialect_words
from batchq.input.footers import OPENED_AT_ONCE
from batchq.input.foreign import OWN
from batchq.input.formats import format_of, splittable
from batchq.input.joining import join_small
from batchq.input.listing import Inputs, find_input, list_input
from batchq.input.partitions import partition_types
from batchq.input.ranges import split, taper
from batchq.input.rows import read_rows, rows_of, rows_per_byte
from batchq.input.schema import as_text, infer_schema, to_json, unreadable
from batchq.input.sizes import take
from batchq.input.tables import TableRow

__all__ = [
    "OPENED_AT_ONCE",
    "OWN",
    "Inputs",
    "TableRow",
    "as_text",
    "dialect_words",
    "find_input",
    "format_of",
    "infer_schema",
    "join_small",
    "list_input",
    "partition_types",
    "read_rows",
    "rows_of",
    "rows_per_byte",
    "split",
    "splittable",
    "take",
    "taper",
    "to_json",
    "unreadable",
    "with_dialects",
]
