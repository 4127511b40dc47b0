"""What a committed part says of itself, in its Parquet footer; of an empty shard, in a small object of its own.

A compacted object's footer has the receipts of all parts whose rows are in it, as these had them, in their order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from batchq import storage
from batchq.errors import StorageError
from batchq.output import layout, objects
from batchq.records import Receipt, Shard, restored

KEY = b"batchq.receipt"  # of the footer's metadata
KEY_OF_ALL = b"batchq.receipts"  # of a compacted object's
AT_ONCE = 64  # receipts on their way
TAIL = 4096  # bytes read first for a footer; most fit

RENAMED = {"reused": "from_spill", "copied": "from_reuse", "copied_tokens": "from_reuse_tokens"}  # before -> now


def to_json(receipt: Receipt) -> bytes:
    """The receipt with a digest of its own: a Parquet footer has no checksum."""
    body = json.dumps(dataclasses.asdict(receipt), sort_keys=True, allow_nan=False)
    return json.dumps({"digest": hashlib.sha256(body.encode()).hexdigest(), "receipt": body}).encode()


def from_json(data: bytes) -> Receipt:
    """The receipt, also one of before its fields were renamed. Raises ValueError if it is not whole."""
    try:
        outer = json.loads(data)
        body = outer["receipt"]
        if hashlib.sha256(body.encode()).hexdigest() != outer["digest"]:
            raise ValueError("its receipt is damaged")
        return restored(json.loads(body), Receipt, RENAMED)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError("its receipt is damaged") from error


def read(uri: str) -> Receipt:
    """A committed part's receipt, from the object's last bytes. Raises StorageError if they are damaged."""
    (receipt,) = read_each(uri)
    return receipt


def read_each(uri: str) -> list[Receipt]:
    """The receipts of an object: of a part its own, of a compacted one all of those in it. Raises as `read`."""
    try:
        if uri.endswith(".json"):
            return [storage.read_checked(uri, from_json)]
        return storage.read_checked(uri, lambda tail: _receipts_in(uri, tail), suffix=TAIL)
    except ValueError as error:
        known = f" ({error})" if str(error).startswith(("its", "not", "no ")) else ""
        raise StorageError(f"{uri}: not a whole object of batchq's{known}; move it away and run again") from error


def _receipts_in(uri: str, tail: bytes) -> list[Receipt]:
    wanted = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != b"PAR1":
        raise ValueError("not a whole Parquet file")
    if wanted > len(tail):
        tail = storage.read(uri, suffix=wanted)
    try:
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + tail[-wanted:])).metadata or {}
    except (pa.ArrowException, OSError) as error:  # damaged Thrift is an OSError
        raise ValueError("its footer is damaged") from error
    if KEY_OF_ALL in metadata:
        return [from_json(each.encode()) for each in json.loads(metadata[KEY_OF_ALL])]
    if KEY not in metadata:
        raise ValueError("no receipt in its footer: not written by batchq")
    return [from_json(metadata[KEY])]


def all_to_json(receipts: Sequence[Receipt]) -> bytes:
    """For a compacted object's footer."""
    return json.dumps([to_json(each).decode() for each in receipts]).encode()


def read_all(output: str, known: Mapping[str, Receipt]) -> dict[str, Receipt]:
    """All committed parts' receipts by the parts' URIs, data and empty; those `known` aren't read.

    Of a compacted output they are in the footers of what took the parts' place, and go by these and a number.
    """
    uris = [*objects.listed(output), *(s.uri for s in storage.list_objects(layout.empties(output)))]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        each = pool.map(lambda uri: [known[uri]] if uri in known else read_each(uri), uris)
        return {
            uri if len(found) == 1 else f"{uri}#{number}": receipt
            for uri, found in zip(uris, each, strict=True)
            for number, receipt in enumerate(found)
        }


def read_shard(output: str, shard: Shard) -> list[Receipt]:
    """Receipts of a shard's parts that are committed already, in order and without a gap."""
    committed: list[Receipt] = []
    while True:
        uri = layout.part(output, shard, len(committed))
        if not storage.exists(uri):
            return committed
        committed.append(read(uri))
        if committed[-1].last:
            return committed
