"""A quantized checkpoint at a content-addressed place; llm-compressor makes it in its own process.

A checkpoint is a folder <cache>/<key>/ with a card, batchq.json, that lists its files with sizes and digests. On a
disk the folder appears by one rename. In an object store its files are under <cache>/<key>/<build>/ and the card
<cache>/<key>/batchq.json, created once, is the commit and names the build; this machine has a copy of it.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchq import storage
from batchq.config import Config, QuantizationConfig, Scheme
from batchq.engine.protocol import Origin
from batchq.errors import AlreadyExists, ConfigError, ModelError, NotFound
from batchq.machine import hardware
from batchq.machine.cache import build_once, cache_dir, cache_of
from batchq.machine.digests import digest_of
from batchq.machine.words import GIB, gib
from batchq.model.folder import is_tied, read_config
from batchq.model.scheme import SCHEMES
from batchq.model.source import Model, resolve
from batchq.model.tensors import read_tensors, stored_bytes
from batchq.quantize.card import CARD, is_whole, read_card, write_card
from batchq.quantize.process import library_versions, run_compress
from batchq.quantize.recipe import recipe_of
from batchq.quantize.sizes import Quantization, predicted_bytes


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is served. `key` identifies its content; `seconds`: how long it took to get it this time."""

    path: str  # a local folder
    key: str
    bytes: int  # of tensors
    seconds: float
    cached: bool


def make_checkpoint(
    model: Model,
    scheme: Scheme,
    config: QuantizationConfig,
    calibration: Callable[[], list[list[int]]],
    log_path: Path,
    on_progress: Callable[[str], None],
) -> Checkpoint:
    """The model under the scheme, from the cache or made now; for `none` the model itself.

    `calibration` gives prompts as token ids; it is called only for schemes that need them. Raises ConfigError when
    `quantization.python` lacks llm-compressor, prompts are missing or memory or disk are too small, and QuantizeError
    with one line and the log's path when llm-compressor fails.
    """
    if scheme is Scheme.none or model.quantized:
        return Checkpoint(model.path, model.digest, stored_bytes(read_tensors(model.path)), 0.0, cached=True)
    started = time.monotonic()
    prompts = _prompts(calibration(), scheme, config) if SCHEMES[scheme].calibrated else []
    how = Quantization.of(scheme, read_tensors(model.path), config.ignore, config.group_size)
    steps, versions = recipe_of(scheme, config, how.group), library_versions(config.python)
    key = checkpoint_key(model, steps, prompts, versions)

    def build(folder: Path) -> None:
        _require_space(model, how, folder)
        on_progress(f"quantizing {model.name} to {scheme.value}")
        request = {**steps, "calibration": prompts, "model": model.path, "output": str(folder)}
        request["trust_remote_code"] = model.trusted
        began = time.monotonic()
        peak = run_compress(config.python or sys.executable, request, log_path, on_progress)
        took = {"seconds": round(time.monotonic() - began, 1), "peak_bytes": peak}
        made_with = {"recipe": steps, "versions": versions, **took}
        made_on = {"prompts": len(prompts), "tokens": sum(map(len, prompts))}
        write_card(folder, model, {"key": key, **made_with, "calibration": made_on})

    folder, made = _get_or_build(cache_of(config), key, build, on_progress)
    seconds = time.monotonic() - started
    return Checkpoint(str(folder), key, stored_bytes(read_tensors(folder)), seconds, cached=not made)


def find_checkpoint(
    model: Model, key: str, config: QuantizationConfig, on_progress: Callable[[str], None]
) -> Checkpoint | None:
    """A checkpoint of this model that was made before, by its key; None if the cache no longer has it whole."""
    started = time.monotonic()

    def refuse(_: Path) -> None:
        raise NotFound(f"{key}: no such checkpoint")

    if key == model.digest:
        return None  # it was served as it is
    with suppress(NotFound):
        folder, _ = _get_or_build(cache_of(config), key, refuse, on_progress)
        return Checkpoint(str(folder), key, stored_bytes(read_tensors(folder)), time.monotonic() - started, cached=True)
    return None


def origin_of(checkpoint: Checkpoint, digest: str, config: Config) -> Origin:
    """Where the cluster's other nodes get what is served; `digest` is the model's."""
    made = None if checkpoint.key == digest else checkpoint.key
    return Origin(config.model, cache_of(config.quantization), made)


def bring(folder: str, origin: Origin | None) -> str:
    """The folder on this machine with what `folder` has on the driver's: the same one where they share it, else one
    that is fetched, once among all processes here.

    Raises ModelError where it can't be fetched: a checkpoint in a cache that is a folder of the driver's alone.
    """
    if origin is None or Path(folder).is_dir():
        return folder
    if origin.checkpoint is None:
        return resolve(origin.model).path
    here = f"the checkpoint {origin.checkpoint[:12]} isn't on this node ({socket.gethostname()})"
    if not storage.is_remote(origin.cache):
        raise ModelError(
            f"{here}, and quantization.cache={origin.cache} is a folder: name an object store, or a folder that all "
            "nodes share"
        )
    place, copy = storage.join(origin.cache, origin.checkpoint), cache_dir() / "checkpoints" / origin.checkpoint

    def fetch(temporary: Path) -> None:
        if not (stored := _stored_card(place)):
            raise ModelError(f"{here}, nor in quantization.cache={origin.cache}")
        storage.fetch_tree(storage.join(place, stored["build"]), temporary)

    build_once(copy, fetch, is_whole)
    return str(copy)


def checkpoint_key(model: Model, steps: dict[str, Any], calibration: list[list[int]], versions: dict[str, str]) -> str:
    """A digest of all that decides a checkpoint's bytes."""
    return digest_of([model.digest, steps, digest_of(calibration), versions])


def _prompts(prompts: list[list[int]], scheme: Scheme, config: QuantizationConfig) -> list[list[int]]:
    prompts = [prompt[: config.max_tokens] for prompt in prompts if prompt][: config.samples]
    if not prompts:
        where = f"quantization.calibration={config.calibration}" if config.calibration else "the input"
        raise ConfigError(
            f"quantization.scheme={scheme.value} needs prompts to calibrate on; {where} has no row that can be asked"
        )
    return prompts


def _require_space(model: Model, how: Quantization, folder: Path) -> None:
    """Raise ConfigError before anything is loaded if it can't fit in memory or on the disk."""
    tensors, tied = read_tensors(model.path), is_tied(read_config(model.path))
    before, after = stored_bytes(tensors), predicted_bytes(tensors, how, tied=tied)
    if (have := hardware.detect().memory) < before + GIB:
        raise ConfigError(f"quantizing {model.name} takes {gib(before + GIB)} of memory, {gib(have)} are free")
    if (have := hardware.free_disk(folder)) < after:
        raise ConfigError(
            f"quantization.cache: {model.name} in {how.scheme.value} takes {gib(after)}, {gib(have)} are free"
        )


def read_verdict(checkpoint: Checkpoint, case: str, config: QuantizationConfig) -> dict[str, Any] | None:
    """The gate's verdict on this checkpoint in this very case; None if there is none yet."""
    verdict: dict[str, Any] | None = None
    with suppress(FileNotFoundError):  # a model as it came has no card
        verdict = read_card(checkpoint.path).get("gate", {}).get(case)
    if verdict is None and storage.is_remote(cache_of(config)):
        with suppress(NotFound):
            verdict = json.loads(storage.read(storage.join(cache_of(config), checkpoint.key, "gate", f"{case}.json")))
    return verdict


def write_verdict(checkpoint: Checkpoint, case: str, verdict: dict[str, Any], config: QuantizationConfig) -> None:
    """Note the gate's verdict in the model card, and beside it in an object store."""
    path = Path(checkpoint.path) / CARD
    if not path.is_file():
        return
    card = json.loads(path.read_text())
    card.setdefault("gate", {})[case] = verdict
    temporary = path.with_name(f".{CARD}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(card, indent=2) + "\n")
    temporary.rename(path)
    cache = cache_of(config)
    if storage.is_remote(cache):
        place = storage.join(cache, checkpoint.key, "gate")
        storage.put(storage.join(place, f"{case}.json"), json.dumps(verdict, indent=2).encode())


def _get_or_build(
    cache: str, key: str, build: Callable[[Path], None], on_progress: Callable[[str], None]
) -> tuple[Path, bool]:
    """The checkpoint's folder on this machine, and whether it was made now."""
    return (_in_store if storage.is_remote(cache) else _on_disk)(cache, key, build, on_progress)


def _on_disk(
    cache: str, key: str, build: Callable[[Path], None], on_progress: Callable[[str], None]
) -> tuple[Path, bool]:
    folder = Path(cache) / key
    if folder.exists() and not is_whole(folder):
        on_progress(f"the checkpoint in {folder} is damaged and is made again")
    return folder, build_once(folder, build, is_whole)


def _in_store(
    cache: str, key: str, build: Callable[[Path], None], on_progress: Callable[[str], None]
) -> tuple[Path, bool]:
    """The folder is this machine's copy of the build that the store's card names."""
    place, copy = storage.join(cache, key), cache_dir() / "checkpoints" / key
    made = False

    def fetch_or_build(folder: Path) -> None:
        nonlocal made
        if stored := _stored_card(place):
            on_progress(f"fetching the checkpoint from {place}")
            with suppress(NotFound):
                storage.fetch_tree(storage.join(place, stored["build"]), folder)
            if is_whole(folder):
                return
            on_progress(f"the checkpoint in {place} is damaged and is made again")
            storage.delete(storage.join(place, CARD))
            shutil.rmtree(folder)
            folder.mkdir()
        build(folder)
        made = True

    build_once(copy, fetch_or_build, is_whole)
    if not _publish(copy, place):
        shutil.rmtree(copy)  # another machine's build became the one, and everybody serves that
        build_once(copy, fetch_or_build, is_whole)
    return copy, made


def _publish(folder: Path, place: str) -> bool:
    """Commit a build to the store unless it has one; whether the one it has then is this."""
    card = json.loads((folder / CARD).read_text())
    stored = _stored_card(place)
    if stored is None:
        build = uuid.uuid4().hex
        storage.publish_tree(folder, storage.join(place, build))
        with suppress(AlreadyExists):  # also raised when our create won and its reply was lost, so look what is there
            storage.create(storage.join(place, CARD), json.dumps({**card, "build": build}, indent=2).encode())
        stored = _stored_card(place) or {}
        if stored.get("build") != build:
            storage.delete_prefix(storage.join(place, build))
    told_later = {"build": None, "gate": None}
    return {**stored, **told_later} == {**card, **told_later}


def _stored_card(place: str) -> dict[str, Any] | None:
    """The store's card, which names the build that was committed; None where nothing was."""
    try:
        card: dict[str, Any] = json.loads(storage.read(storage.join(place, CARD)))
    except NotFound:
        return None
    return card
