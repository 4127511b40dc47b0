"""Clients of object stores, by way of obstore: one per bucket, with the environment's settings."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from batchq.storage.names import SCHEMES, split

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore

TIMEOUT = "600s"  # of one request; the library's 30 s fail a slow link


def client(uri: str) -> tuple[ObjectStore, str]:
    """The client of a URI's bucket, and the URI's key."""
    scheme, bucket, key = split(uri)
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith(SCHEMES[scheme])))
    return _connect(scheme, bucket, settings), key


def quoted(etag: str | None) -> str:
    """With its quotes: Azure's listing leaves them out, where its other replies, and If-Match, have them."""
    return f'"{etag}"' if etag and not etag.endswith('"') else etag or ""


@lru_cache(maxsize=32)
def _connect(scheme: str, bucket: str, settings: tuple[tuple[str, str], ...]) -> ObjectStore:
    """One client per bucket; `settings` are the environment's, so that a changed environment makes a new one."""
    from obstore.store import from_url

    options: ClientConfig = {"timeout": TIMEOUT}
    if any("ENDPOINT" in name and value.startswith("http://") for name, value in settings):
        options["allow_http"] = True
    config: Any = {}
    if scheme == "s3" and not any(name == "AWS_CHECKSUM_ALGORITHM" for name, _ in settings):
        config["checksum_algorithm"] = "SHA256"  # else a byte flipped on its way up is stored: seen in 20 of 20
    return from_url(f"{scheme}://{bucket}", client_options=options, config=config)
