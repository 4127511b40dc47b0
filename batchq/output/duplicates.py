"""Values of a user's id column that occur more than once in what is committed."""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import ExitStack
from pathlib import Path

from batchq.output import objects, parts

BUCKETS = 16  # temporary files that `count` spreads its hashes over


def count(output: str, column: str) -> int:
    """How many values of the column occur more than once in the committed rows.

    Hashes of 8 bytes go to BUCKETS temporary files by their last bits, and the files are counted one by one: 10 million
    rows take 80 MB of disk and 5 MB of memory. Different values count as one with a probability of rows**2 / 2**65.
    """
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="batchq-ids-") as scratch, ExitStack() as opened:
        buckets = [opened.enter_context(open(Path(scratch) / str(i), "w+b")) for i in range(BUCKETS)]
        for rows in objects.pieces(output):
            values = parts.read(rows, [column]).column(0).to_pylist()
            digests = (hashlib.blake2b(repr(v).encode(), digest_size=8).digest() for v in values if v is not None)
            hashes = np.frombuffer(b"".join(digests), dtype=np.uint64)
            for i, bucket in enumerate(buckets):
                hashes[hashes % BUCKETS == i].tofile(bucket)
        duplicates = 0
        for bucket in buckets:
            bucket.seek(0)
            _, counts = np.unique(np.fromfile(bucket, dtype=np.uint64), return_counts=True)
            duplicates += int((counts > 1).sum())
        return duplicates
