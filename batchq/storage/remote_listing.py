"""What is below a prefix of an object store: every object, or what a pattern means.

A store's names are any text, and obstore's are paths: a page of its listing that holds one key with an empty part, a
part . or .., or a control character is an error, whatever else is on the page. Such a page is read from the store's own
reply (S3's alone), and those keys are told with an error, because no object of such a name can be opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from typing import Any
from urllib.parse import quote, unquote_plus, urlencode
from xml.etree import ElementTree

from batchq.errors import AccessDenied, NotFound, StorageError
from batchq.storage.clients import client, quoted
from batchq.storage.faults import translated
from batchq.storage.names import Listing, Stat, split
from batchq.storage.patterns import Pattern

CHUNK = 10_000  # objects
PEEKED = 1000  # objects; a page of the store
ODD = "a name that can't be opened (an empty part, . or .., or a control character in it); rename the object"
_ODD_PART = re.compile(r"|\.\.?|.*[\x00-\x1f\x7f].*", re.DOTALL)
_SIGNED_FOR = timedelta(minutes=10)
_ATTEMPTS = 4


def listed(prefix: str, chunk: int = CHUNK) -> Iterator[Stat]:
    """Every object below a prefix, in the store's order; with an error, if no request can name it."""
    import obstore
    from obstore.exceptions import BaseError

    scheme, bucket, key = split(prefix)
    root, last = f"{scheme}://{bucket}/", ""
    with translated(prefix):
        try:
            for metas in obstore.list(client(prefix)[0], key or None, chunk_size=chunk):
                for meta in metas:
                    last = meta["path"]
                    if last != key:  # a folder's own marker, which some tools leave
                        yield Stat(root + last, meta["size"], quoted(meta["e_tag"]))
            return
        except BaseError as error:
            if "invalid path" not in str(error):
                raise
            if scheme != "s3":
                raise StorageError(f"{prefix}: can't be listed, because an object below it has {ODD}") from None
    yield from _listed_by_name(prefix, last)


def search(pattern: Pattern, marks: re.Pattern[str] | None) -> Listing:
    """The objects that a pattern means; `marks` as of `storage.glob`. A folder's own marker is special."""
    found, marked, hidden, folders = list[Stat](), list[str](), set[str](), set[str]()
    for each in listed(pattern.root):
        folders.add(each.uri.rpartition("/")[0])
        name = each.uri[len(pattern.root) + 1 :]
        if each.error:  # a pattern means it by the path that its writer will have meant
            name = "/".join(part for part in name.split("/") if part not in ("", ".", ".."))
        if marks and marks.search(each.uri):
            marked.append(each.uri)
        if pattern.means(name):
            found.append(each)
        elif topmost := pattern.hidden(name, is_folder=False):
            hidden.add(f"{pattern.root}/{topmost}")
    for folder in list(folders):
        while len(folder := folder.rpartition("/")[0]) > len(pattern.root):
            folders.add(folder)
    markers = {each.uri for each in found if not each.size and not each.error and each.uri in folders}
    meant = sorted((each for each in found if each.uri not in markers), key=lambda each: each.uri)
    return Listing(pattern.root, meant, hidden, markers, marked)


def folders(prefix: str) -> list[str]:
    """Names of the folders directly below a prefix."""
    import obstore

    store, key = client(prefix)
    with translated(prefix):
        found = obstore.list_with_delimiter(store, key or None)["common_prefixes"]
    return [name.rstrip("/").rpartition("/")[2] for name in found]


def peek(folder: str) -> list[str]:
    """Names of the first objects below a folder. One that mustn't be listed has none."""
    try:
        return [each.uri[len(folder) + 1 :] for each in islice(listed(folder, PEEKED), PEEKED)]
    except (AccessDenied, NotFound):
        return []


# ---- S3's own reply ----


def _listed_by_name(prefix: str, after: str) -> Iterator[Stat]:
    """Objects below a prefix whose keys come after another, in the store's order."""
    scheme, bucket, key = split(prefix)
    query = {"list-type": "2", "encoding-type": "url", "prefix": f"{key}/" if key else ""}
    more = {"start-after": after} if after else {}
    while True:
        page = ElementTree.fromstring(_get(prefix, bucket, {**query, **more}))
        for each in page.iterfind("{*}Contents"):
            name = unquote_plus(each.findtext("{*}Key", ""))
            size = int(each.findtext("{*}Size", "0"))
            is_marker = name.endswith("/") and not size
            uri = f"{scheme}://{bucket}/{name.removesuffix('/') if is_marker else name}"
            if any(map(_ODD_PART.fullmatch, uri.split("/")[3:])):
                if not is_marker:
                    yield Stat(uri, 0, "", ODD)
            elif uri not in (prefix, f"{scheme}://{bucket}/{after}"):
                yield Stat(uri, size, quoted(each.findtext("{*}ETag")))
        if page.findtext("{*}IsTruncated") != "true":
            return
        more = {"continuation-token": page.findtext("{*}NextContinuationToken", "")}


def _get(prefix: str, bucket: str, query: dict[str, str]) -> bytes:
    """The reply to a listing's request, signed with obstore's own credentials. It signs the URL of any object in a
    bucket, and a listing's is that of a bucket whose name goes on with the query; `x-id` takes up the object's name."""
    import httpx
    import obstore
    from obstore.store import S3Store

    named = f"{bucket}?{urlencode(query, quote_via=quote)}&x-id="
    config: Any = {"virtual_hosted_style_request": False}
    is_public = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes", "on")
    if is_public:
        config |= {"skip_signature": False, "access_key_id": "-", "secret_access_key": "-"}
    url = obstore.sign(S3Store(named, config=config), "GET", "ListObjectsV2", _SIGNED_FOR)
    if is_public:
        url = url.partition("&X-Amz-")[0]
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            reply = httpx.get(url, timeout=60, follow_redirects=True)
        except httpx.TransportError as error:
            if attempt == _ATTEMPTS:
                raise StorageError(f"{prefix}: the store can't be reached ({type(error).__name__})") from None
            continue
        if reply.status_code == 200:
            return reply.content
        if reply.status_code < 500 or attempt == _ATTEMPTS:
            raise StorageError(f"{prefix}: the store doesn't list it (HTTP {reply.status_code})")
    raise AssertionError("unreachable")
