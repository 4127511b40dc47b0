"""What the server that attempts are forked from opens once: everything that is slow and holds no thread or socket."""

from __future__ import annotations

import functools
import os

import obstore.exceptions
import obstore.store  # noqa: F401 - remote inputs and outputs take it
import pandas  # noqa: F401 - pyarrow imports it for to_pylist
import pyarrow.parquet  # noqa: F401
import smart_open.compression  # noqa: F401 - reading a compressed input takes it

from batchq.model import tokenizer

tokenizer.open_tokenizer = functools.cache(tokenizer.open_tokenizer)
if model := os.environ.get("CHAOS_MODEL"):
    tokenizer.open_tokenizer(model, False)  # as a worker calls it
