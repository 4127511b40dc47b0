"""What stores and the operating system raise, in our words."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from batchq.errors import (
    AccessDenied,
    AlreadyExists,
    Changed,
    ConfigError,
    Expired,
    NoConditionalWrites,
    NotFound,
    StorageError,
)

_METADATA = re.compile(r"://[^/]+/latest/(api/token|meta-data)")  # where the provider looks last for credentials
# Of S3, in a 400 or a 403, and of Azure's signatures. What a role gives is renewed by the library, before it expires.
_EXPIRED = re.compile("ExpiredToken|TokenRefreshRequired|RequestExpired|Signed expiry time")

# What is said of a bucket in another region, in some replies with its name.
_REGION = re.compile(
    r"incorrectly configured region|PermanentRedirect|AuthorizationHeaderMalformed(?:.*?expecting '([\w-]+)')?",
    re.DOTALL,
)


def taken(uri: str) -> AlreadyExists:
    return AlreadyExists(f"{uri}: already exists")


def overwrites(uri: str) -> NoConditionalWrites:
    return NoConditionalWrites(
        f"{uri}: this store lets a second create overwrite the first, so two runs could undo each other; "
        "choose a store that honours If-None-Match"
    )


def changed(uri: str) -> Changed:
    return Changed(f"{uri}: was replaced since it was listed")


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """Turn what a store or the operating system raises into one of ours, in one line."""
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"{uri}: no such file or object") from None
    except PermissionError as error:
        raise AccessDenied(f"{uri}: permission denied") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(f"{uri}: {error.strerror}") from None
        raise StorageError(f"{uri}: {error.strerror or type(error).__name__}") from error
    except Exception as error:
        if not type(error).__module__.startswith("obstore"):
            if isinstance(error, ValueError) and "Could not parse path" in str(error):
                raise StorageError(f"{uri}: not a name that object stores agree on") from None
            raise
        raise _store_error(uri, error) from None  # its own text is a page of internals


def _store_error(uri: str, error: Exception) -> StorageError:
    from obstore import exceptions as library

    reason = _reason(str(error))
    if isinstance(error, library.AlreadyExistsError):
        return taken(uri)
    if isinstance(error, (library.PreconditionError, library.NotModifiedError)):
        return changed(uri)
    if "NoSuchBucket" in reason:
        return NotFound(f"{uri}: no such bucket")
    if _EXPIRED.search(reason):
        return Expired(f"{uri}: the credentials have expired ({reason}); renew them, and the same command goes on")
    if "RequestTimeTooSkewed" in reason:
        return StorageError(f"{uri}: this machine's clock is wrong, and the store refuses its signatures ({reason})")
    if region := _REGION.search(str(error)):
        expected = f" {region[1]}" if region[1] else ""
        return StorageError(f"{uri}: the bucket is in another region{expected}; set AWS_REGION in the environment")
    if re.search(r"400 Bad Request:?$", reason):  # to a HEAD, which has no room for more words
        return StorageError(f"{uri}: the store answers 400 Bad Request; are AWS_REGION and the endpoint right?")
    if _METADATA.search(str(error)):
        return StorageError(f"{uri}: no credentials in the environment or from the provider (AWS_ACCESS_KEY_ID, ...)")
    if "error sending request" in reason:
        return StorageError(f"{uri}: the store can't be reached; is its endpoint right, and up?")
    if isinstance(error, (library.PermissionDeniedError, library.UnauthenticatedError)):
        return AccessDenied(f"{uri}: access denied ({reason}); check the credentials in the environment")
    return StorageError(f"{uri}: {reason}")


def _reason(text: str) -> str:
    """The store's own code and message, or the library's last words, without URLs: those may be signed."""
    text = text.partition("\n\nDebug source")[0]
    if said := re.search(r"<Code>(.*?)</Code>\s*<Message>(.*?)</Message>", text, re.DOTALL):
        text = f"{said[1]}: {said[2]}"
    else:
        text = re.sub(r"^Generic \w+ error: ", "", text.rpartition(" - ")[2])
    return re.sub(r"https?://\S+", "the store", " ".join(text.split()))[:200]
