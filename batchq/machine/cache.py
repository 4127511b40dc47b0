"""The cache on this machine, and folders in it that are made once among all processes."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from batchq import storage
from batchq.config import QuantizationConfig
from batchq.errors import ConfigError

# What the system says of a place that takes no files, or no more of them.
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.ENAMETOOLONG}

BUILDING = ".building"  # beside what is made once: folders under way and their locks


def cache_dir() -> Path:
    """$BATCHQ_CACHE, or ~/.cache/batchq. Raises ConfigError where there is no home folder, and for a URI of a store."""
    named = os.environ.get("BATCHQ_CACHE")
    if named and storage.is_remote(named):
        raise ConfigError(f"BATCHQ_CACHE={named}: a folder on this machine, not a store; quantization.cache may be one")
    if not named and os.path.expanduser("~") == "~":
        raise ConfigError("no home folder is known, so there is no cache: set BATCHQ_CACHE to a folder, or HOME")
    return Path(storage.normalize(named or "~/.cache/batchq"))


def cache_of(config: QuantizationConfig) -> str:
    """Where checkpoints are cached, normalized; the default follows $BATCHQ_CACHE."""
    default = config.cache == QuantizationConfig.cache
    return storage.normalize(str(cache_dir() / "checkpoints") if default else config.cache)


def lend_home() -> None:
    """Give this process, and those it starts, a temporary home where it has none that can be written: Ray doesn't start
    without one, vLLM and torch compile into it. The caches stay where they are."""
    home = os.path.expanduser("~")
    if os.access(home, os.W_OK):
        return
    if home != "~":
        os.environ.setdefault("BATCHQ_CACHE", str(cache_dir()))
        caches = os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
        os.environ.setdefault("HF_HOME", f"{caches}/huggingface")
    os.environ["HOME"] = tempfile.mkdtemp(prefix="batchq-home-")


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which need not exist yet."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def log_dir(job: str, run: str) -> Path:
    """The folder of one invocation's logs, not made yet: in the cache, or, where that can only be read, among temporary
    files. Runs of one job may work side by side. A job's name may hold what a folder's can't."""
    logs = cache_dir() / "logs" / (re.sub(r"[^\w.-]+", "_", job).strip(".")[:80] or "job") / run
    return logs if is_writable(logs) else Path(os.environ.get("TMPDIR") or "/tmp", f"batchq-logs-{run}")


@contextmanager
def written(target: Path) -> Iterator[None]:
    """For code that writes to the cache. Raises ConfigError, naming what to set, where `target` can't be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        field = "BATCHQ_CACHE" if target.is_relative_to(cache_dir()) else "quantization.cache"
        where = error.filename or target
        raise ConfigError(f"{where}: {error.strerror}; set {field} to a folder that can be written") from error


def build_once(target: Path, build: Callable[[Path], None], whole: Callable[[Path], bool] = Path.is_dir) -> bool:
    """Have `build` fill `target`, once among all processes; says whether this call did it.

    `build` works in a temporary folder on the same disk, which is synced and renamed when it returns, so `target` is
    never seen half made. A target that isn't `whole` is replaced. A second process waits for the first, however it
    ends; what killed ones left is removed. Raises ConfigError where nothing can be written or locked.
    """
    with written(target):
        if whole(target):
            return False
        building = target.parent / BUILDING
        building.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(building)
        with _locked(building, target.name):
            if whole(target):
                return False
            temporary = building / target.name
            shutil.rmtree(temporary, ignore_errors=True)  # a killed builder's, since the lock is ours
            temporary.mkdir()
            try:
                build(temporary)
                _finish(temporary)
                if target.exists():
                    shutil.rmtree(target)  # it isn't whole, so nobody reads it
                temporary.rename(target)
                storage.sync(target.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return True


@contextmanager
def _locked(building: Path, name: str, wait: bool = True) -> Iterator[None]:
    """One process at a time; the kernel lets go of the lock of one that was killed. The file stays: removing it
    would let two processes hold two locks. Raises BlockingIOError if it is taken and `wait` is false."""
    with (building / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            raise ConfigError(
                f"{building.parent}: files can't be locked there ({error.strerror}); choose a local folder"
            ) from error
        yield


def _clear_leftovers(building: Path) -> None:
    """Remove the folders that killed builders left: those whose lock is free."""
    for path in building.iterdir():
        if path.is_dir():
            with suppress(BlockingIOError), _locked(building, path.name, wait=False):
                shutil.rmtree(path, ignore_errors=True)


def _finish(folder: Path) -> None:
    """Readable by others (safetensors come out as 0600) and on the disk, before anybody can see them."""
    for path in sorted(folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
        storage.sync(path)
    storage.sync(folder)
