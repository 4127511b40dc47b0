"""What objects are called: the spelling and the parts of a URI, and patterns over names."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
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
VISIBLE = r"(?![._])[^/]+"  # a path component that a wildcard may match: Spark's rule

_MAGIC = re.compile(r"[*?\[]")
_SIGNED = re.compile(r"[?&](X-(Amz|Goog)-\w+|AWSAccessKeyId|Signature|sig|sv|token)=", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Stat:
    """An object as it is now. A local file's etag is its time of change and size: an inode is not the same number on
    every machine that mounts a file system."""

    uri: str
    size: int  # bytes
    etag: str


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

    Raises ConfigError for a scheme that lost its slashes.
    """
    _refuse_slashes(uri)
    path = unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri
    return os.path.abspath(os.path.expanduser(path))


def root_of(pattern: str, matches: list[Stat]) -> str:
    """The folder that the names of `glob`'s matches are relative to: the file's own, the folder itself, or the part of
    the pattern before its wildcards."""
    uri = normalize(pattern)
    if any(each.uri == uri for each in matches):
        return uri[: uri.rindex("/")]
    literal = before_wildcards(uri)
    if literal == uri or any(each.uri.startswith(uri + "/") for each in matches):
        return uri
    return literal[: literal.rindex("/")]


def before_wildcards(uri: str) -> str:
    """The part of a pattern before its wildcards: the whole of it, if it has none."""
    return _MAGIC.split(uri)[0]


def matcher(pattern: str) -> re.Pattern[str]:
    """A pattern, relative to its root, as an expression that also matches what is below a folder it matches."""
    parts = pattern.split("/")
    text = ""
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if part == "**":
            text += f"(?:{VISIBLE}/)*" + (VISIBLE if last else "")
        else:
            text += ("(?![._])" if part[:1] in ("*", "?", "[") else "") + _component(part) + ("" if last else "/")
    return re.compile(f"{text}(?:/{VISIBLE})*")


def _component(part: str) -> str:
    text, position = "", 0
    while position < len(part):
        char = part[position]
        end = part.find("]", position + 2) if char == "[" else -1
        if end > 0:
            inside = part[position + 1 : end].replace("\\", r"\\").replace("[", r"\[")
            text += "[" + ("^/" + inside[1:] if inside[0] == "!" else inside.replace("^", r"\^")) + "]"
            position = end
        else:
            text += {"*": "[^/]*", "?": "[^/]"}.get(char) or re.escape(char)
        position += 1
    return text
