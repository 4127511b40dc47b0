"""The cache on this machine, and folders in it that are made once among all processes."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from batchq import storage
from batchq.errors import ConfigError

BUILDING = ".building"  # beside what is made once: folders under way and their locks


def cache_dir() -> Path:
    """$BATCHQ_CACHE, or ~/.cache/batchq."""
    return Path(os.environ.get("BATCHQ_CACHE") or "~/.cache/batchq").expanduser().absolute()


def build_once(target: Path, build: Callable[[Path], None], whole: Callable[[Path], bool] = Path.is_dir) -> bool:
    """Have `build` fill `target`, once among all processes; says whether this call did it.

    `build` works in a temporary folder on the same disk, which is synced and renamed when it returns, so `target` is
    never seen half made. A target that isn't `whole` is replaced. A second process waits for the first, however it
    ends; what killed ones left is removed. Raises ConfigError where files can't be locked.
    """
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
