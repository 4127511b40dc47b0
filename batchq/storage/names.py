"""What objects are called and how they are told apart: the spelling and the parts of a URI, sizes and etags."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from urllib.parse import unquote

from batchq.errors import ConfigError

SCHEMES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}  # and the prefix of its settings in the environment
OTHER_NAMES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "azure": "az"}  # what Spark and others call the same stores
HINTS = {  # what to write instead of a scheme that is none of a store's
    "http": "fetch the file first, with curl -O say; or write s3://bucket/key, gs://bucket/key, az://container/key",
    "hdfs": "copy it with hdfs dfs -get, or mount it, and give that path",
    "dbfs": "on Databricks its path is /dbfs/..., or /Volumes/...",
    "abfss": "write az://container/folder, and the account as AZURE_STORAGE_ACCOUNT_NAME in the environment",
    "hf": "only models come from there; fetch a data set with hf download NAME --repo-type dataset, then its folder",
    "ftp": "fetch the file first, and give its local path",
}
SAME_HINT = {"https": "http", "abfs": "abfss", "wasb": "abfss", "wasbs": "abfss", "adl": "abfss", "viewfs": "hdfs"}

_SIGNED = re.compile(r"[?&](X-(Amz|Goog)-\w+|AWSAccessKeyId|Signature|sig|sv|token)=", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Stat:
    """An object as it is now.

    A local file's etag is when it was written, its size, and when it was changed in any way, all in hexadecimal: who
    replaces a file can set the first time back, and not the second. Its inode is no part of it: that isn't the same
    number on every machine that mounts a file system.
    """

    uri: str
    size: int  # bytes
    etag: str
    error: str = ""  # why it can't be read, where a listing knows that; size and etag are then nothing


@dataclass(frozen=True, slots=True)
class Listing:
    """What a pattern found: what it means, by URI (a Stat with an error can't be read), and URIs of what was passed
    over: `hidden` names, at their topmost part, and what is `special`, no file, as a pipe is."""

    root: str  # the folder that names are relative to
    found: list[Stat]
    hidden: set[str] = field(default_factory=set)
    special: set[str] = field(default_factory=set)
    marks: list[str] | None = None  # URIs below the root that were asked for besides; null where nobody looked


def same(planned: str, now: str) -> bool:
    """Whether an etag is the one that was planned. A local file's may have been planned without its time of change, by
    `timed` or by version 0.1.0; then that isn't compared."""
    return now == planned or now.startswith(f"{planned}-")


def timed(uri: str, etag: str) -> str:
    """An etag without the time of change, which a chmod, a move and a restored copy change too; a store's as it is."""
    return etag if is_remote(uri) else "-".join(etag.split("-")[:2])


def is_remote(uri: str) -> bool:
    """Whether `uri` names an object store rather than a local file."""
    return "://" in uri and not uri.startswith("file://")


def normalize(uri: str) -> str:
    """One spelling of a URI: an absolute local path (from ~, relative or file://), or a remote URI; no final slash.

    Raises ConfigError for an unknown scheme, a missing bucket, or credentials in the URI.
    """
    if is_remote(uri):
        scheme, bucket, key = split(uri)
        return f"{scheme}://{bucket}/{key}" if key else f"{scheme}://{bucket}"
    return local_path(uri)


def join(base: str, *parts: str) -> str:
    """`parts` below `base`, with single slashes between."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def split(uri: str) -> tuple[str, str, str]:
    """scheme, bucket, key. The message of a refusal shows no more than the scheme: the rest may hold a secret."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme not in SCHEMES:
        raise ConfigError(_unknown(scheme))
    if "@" in bucket:
        raise ConfigError(f"{scheme}://: credentials don't belong in a URI; set them in the environment")
    if _SIGNED.search(key):
        raise ConfigError(f"{scheme}://: a signed URI is a secret; give the plain one, and credentials by environment")
    if not bucket:
        raise ConfigError(f"{scheme}://: a bucket's name is missing, as in {scheme}://bucket/folder")
    return scheme, bucket, key.strip("/")


def _unknown(scheme: str) -> str:
    """The message for a scheme that names no store, with what to write."""
    plain = scheme.lower()
    known = OTHER_NAMES.get(plain, plain)
    if known in SCHEMES:
        return f"{scheme}://: write {known}://"
    hint = HINTS.get(SAME_HINT.get(plain, plain), "use a local path, s3://, gs:// or az://")
    return f"{scheme}://: not a store that batchq knows; {hint}"


def _refuse_slashes(uri: str) -> None:
    """Raises ConfigError for a scheme without its slashes, or file:// before a host; a file may be called so."""
    scheme, colon, rest = uri.partition(":")
    plain = scheme.lower()
    known = OTHER_NAMES.get(plain, plain)
    if not colon or os.path.lexists(uri):
        return
    if known == "file" and not rest.startswith("///"):
        raise ConfigError(
            f"{scheme}:: a local file is its path alone, or file:// and a path that begins with /: file:///data"
        )
    if known in SCHEMES and not rest.startswith("//"):
        raise ConfigError(f"{scheme}:: two slashes are missing; write {known}://bucket/folder")
    if SAME_HINT.get(plain, plain) in HINTS and rest.startswith("/"):
        raise ConfigError(_unknown(scheme).replace("://", ":/", 1))


def local_path(uri: str) -> str:
    """The absolute path of a local file, which may be spelt from ~, relative or as file://.

    Raises ConfigError for a scheme that lost its slashes, for ~ where no home folder is known, and for what can't be a
    name.
    """
    _refuse_slashes(uri)
    path = unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri
    if "\0" in path:
        raise ConfigError(f"{path}: a name can't hold a zero byte")
    expanded = os.path.expanduser(path)
    if expanded == path and re.match(r"~(/|$)", path):
        raise ConfigError(f"{path}: no home folder is known; set HOME, or give the path from /")
    return os.path.abspath(expanded)
