"""The columns of every output object, fixed before a worker starts."""

from __future__ import annotations

import base64

import pyarrow as pa

from batchq.config import TaskConfig
from batchq.errors import ConfigError
from batchq.task import answers

IDENTITY = [pa.field("batchq_id", pa.string(), nullable=False), pa.field("batchq_key", pa.string())]
COUNTS = [pa.field(f"batchq_{kind}_tokens", pa.int32()) for kind in ("prompt", "cached", "output")]
FAILURE = [
    pa.field("batchq_error", pa.string()),
    pa.field("batchq_message", pa.string()),
    pa.field("batchq_raw", pa.string()),
]
EXTRA = pa.field(
    "batchq_extra", pa.string()
)  # JSON of what the columns can't hold: unknown keys, values that don't fit


def output_schema(columns: pa.Schema, task: TaskConfig) -> pa.Schema:
    """Identity, the input columns that come along, the answer, counts, failure: in this order.

    Raises ConfigError if an input column has the name of one of ours, but for case: DuckDB and Spark take them for one.
    """
    ours = [*IDENTITY, *answers.of(task).fields(), *COUNTS, *FAILURE, EXTRA]
    own = {f.name.casefold(): f.name for f in ours}
    if taken := sorted(name for name in columns.names if name.casefold() in own):
        same = own[taken[0].casefold()]
        alike = "" if same == taken[0] else f", {same}, but for case, which many readers don't tell apart"
        raise ConfigError(
            f"input column {taken[0]} has the name of an output column{alike}: "
            f"leave it out with output.columns, or rename the answer with task.name"
        )
    return pa.schema([*IDENTITY, *columns, *(f for f in ours if f not in IDENTITY)])


def schema_to_text(schema: pa.Schema) -> str:
    return base64.b64encode(schema.serialize()).decode()


def schema_from_text(text: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def input_columns(schema: pa.Schema, task: TaskConfig) -> pa.Schema:
    """The input columns of an output schema."""
    ours = {f.name for f in [*IDENTITY, *answers.of(task).fields(), *COUNTS, *FAILURE, EXTRA]}
    return pa.schema([f for f in schema if f.name not in ours])
