"""Recipe -> a quantized checkpoint at a content-addressed place; llm-compressor runs in its own process.

A checkpoint is a folder <cache>/<key>/ with a card, batchq.json, that lists its files with sizes and digests. On a
disk the folder appears by one rename. In an object store its files stand under <cache>/<key>/<build>/ and the card
<cache>/<key>/batchq.json, created once, is the commit and names the build; this machine keeps a copy of it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from batchq import hardware, models, storage
from batchq.capacity import GIB, gib, group_of, is_tied, predicted_bytes, read_tensors, stored_bytes
from batchq.config import QuantizationConfig, Scheme
from batchq.errors import AlreadyExists, ConfigError, NotFound, QuantizeError
from batchq.models import Model, digest_of, last_line
from batchq.scheme import FACTS

CARD = "batchq.json"
COMPRESS = Path(__file__).with_name("compress.py")
LIBRARIES = ("llmcompressor", "compressed-tensors", "transformers")  # they decide a checkpoint's bytes
PROGRESS, ERROR, PEAK = "batchq progress: ", "batchq error: ", "batchq peak: "  # how compress.py's lines begin


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is served. `key` stands for its content; `seconds` is what getting it took, this time."""

    path: str  # a local folder
    key: str
    bytes: int  # of tensors
    seconds: float
    cached: bool


def quantize(
    model: Model,
    scheme: Scheme,
    config: QuantizationConfig,
    calibration: Callable[[], list[list[int]]],
    log_path: Path,
    on_progress: Callable[[str], None],
) -> Checkpoint:
    """The model under the scheme, from the cache or made now; for `none` the model itself.

    `calibration` gives prompts as token ids; it is called only for schemes that need them. Raises ConfigError when
    `quantization.python` lacks llm-compressor, prompts are missing or there is too little room, and QuantizeError
    with one line and the log's path when llm-compressor fails.
    """
    if scheme is Scheme.none or model.quantized:
        return Checkpoint(model.path, model.digest, stored_bytes(read_tensors(model.path)), 0.0, cached=True)
    started = time.monotonic()
    prompts = _prompts(calibration(), scheme, config) if FACTS[scheme].calibrated else []
    group = group_of(scheme, read_tensors(model.path), config.ignore, config.group_size)
    steps, versions = recipe(scheme, config, group), library_versions(config.python)
    key = checkpoint_key(model, steps, prompts, versions)

    def build(folder: Path) -> None:
        _require_room(model, scheme, config, group, folder)
        on_progress(f"quantizing {model.name} to {scheme.value}")
        request = {**steps, "calibration": prompts, "model": model.path, "output": str(folder)}
        request["trust_remote_code"] = model.trusted
        began = time.monotonic()
        peak = run_compress(config.python or sys.executable, request, log_path, on_progress)
        took = {"seconds": round(time.monotonic() - began, 1), "peak_bytes": peak}
        made_with = {"recipe": steps, "versions": versions, **took}
        made_on = {"prompts": len(prompts), "tokens": sum(map(len, prompts))}
        write_card(folder, model, {"key": key, **made_with, "calibration": made_on})

    cache = cache_of(config)
    keep = _keep_in_store if storage.is_remote(cache) else _keep_on_disk
    folder, made = keep(cache, key, build, on_progress)
    seconds = time.monotonic() - started
    return Checkpoint(str(folder), key, stored_bytes(read_tensors(folder)), seconds, cached=not made)


def kept(model: Model, key: str, config: QuantizationConfig, on_progress: Callable[[str], None]) -> Checkpoint | None:
    """A checkpoint of this model that was made before, by its key; None if the cache no longer has it whole."""
    started = time.monotonic()

    def refuse(_: Path) -> None:
        raise NotFound(f"{key}: no such checkpoint")

    cache = cache_of(config)
    keep = _keep_in_store if storage.is_remote(cache) else _keep_on_disk
    if key == model.digest:
        return None  # it was served as it is
    with suppress(NotFound):
        folder, _ = keep(cache, key, refuse, on_progress)
        return Checkpoint(str(folder), key, stored_bytes(read_tensors(folder)), time.monotonic() - started, cached=True)
    return None


def recipe(scheme: Scheme, config: QuantizationConfig, group: int | None = None) -> dict[str, Any]:
    """What compress.py is told to do, beside the model and the prompts; part of the key.

    `steps`: llm-compressor's modifiers by name with their arguments, those of one step applied in one run over the
    prompts; `pipeline` is llm-compressor's way through the model.
    """
    gptq = {"dampening_frac": config.dampening}
    grouped = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    int4 = {"num_bits": 4, "type": "int", "symmetric": True, **grouped}
    # Smoothing changes no output of the model, so one plain pass finds all its scales: half the passes.
    smooth = ("SmoothQuantModifier", {"smoothing_strength": config.smoothing})
    fp8_tokens = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}

    def quantization(modifier: str, weights: Any, activations: Any = None, **more: Any) -> tuple[str, dict[str, Any]]:
        what = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        if activations:  # llm-compressor would store these four bits in eight, and vLLM's kernel wants them packed
            what["format"] = "pack-quantized"
        chosen = {"config_groups": {"group_0": what}} if isinstance(weights, dict) else {"scheme": weights}
        return modifier, {"targets": ["Linear"], "ignore": list(config.ignore), **chosen, **more}

    steps: list[tuple[str, list[tuple[str, dict[str, Any]]]]]  # pipeline, and modifiers with their arguments
    match scheme:
        case Scheme.fp8:
            steps = [("datafree", [quantization("QuantizationModifier", "FP8_DYNAMIC")])]
        case Scheme.fp8_gptq:
            # Keeps 100.2% of the small model's accuracy; rounding alone 98.8%, GPTQ 99.1%, SmoothQuant 97.5%.
            steps = [("basic", [smooth]), ("sequential", [quantization("GPTQModifier", "FP8_DYNAMIC", **gptq)])]
        case Scheme.fp8_block:
            steps = [("datafree", [quantization("QuantizationModifier", "FP8_BLOCK")])]
        case Scheme.int8_rtn:
            steps = [("datafree", [quantization("QuantizationModifier", "W8A8")])]
        case Scheme.w8a16:
            steps = [
                ("datafree", [quantization("QuantizationModifier", {**int4, "num_bits": 8, "strategy": "channel"})])
            ]
        case Scheme.int8:
            steps = [("basic", [smooth]), ("sequential", [quantization("GPTQModifier", "W8A8", **gptq)])]
        case Scheme.w4a16:
            steps = [("sequential", [quantization("GPTQModifier", int4, **gptq)])]
        case Scheme.w4a16_awq:
            lopsided = {**int4, "symmetric": False}
            steps = [("sequential", [("AWQModifier", {}), quantization("QuantizationModifier", lopsided)])]
        case Scheme.w4a8_fp8:
            steps = [("sequential", [quantization("GPTQModifier", int4, fp8_tokens, **gptq)])]
        case Scheme.nvfp4:
            steps = [("sequential", [quantization("QuantizationModifier", "NVFP4")])]
        case Scheme.sparse24:
            pruned = {"sparsity": 0.5, "mask_structure": "2:4", "targets": ["Linear"], "ignore": list(config.ignore)}
            steps = [("sequential", [("SparseGPTModifier", pruned)])]
        case _:
            raise ConfigError(f"quantization.scheme={scheme.value}: nothing to do for llm-compressor")
    return {"scheme": scheme.value, "seed": config.seed, "steps": steps}


def checkpoint_key(model: Model, steps: dict[str, Any], calibration: list[list[int]], versions: dict[str, str]) -> str:
    """A digest of all that decides a checkpoint's bytes."""
    return digest_of([model.digest, steps, digest_of(calibration), versions])


def library_versions(python: str | None) -> dict[str, str]:
    """Versions of llm-compressor and its companions in the interpreter that will run it; None is this one.

    Raises ConfigError when there is no such interpreter or it lacks llm-compressor.
    """
    if python is None:
        try:
            return {name: version(name) for name in LIBRARIES}
        except PackageNotFoundError as error:
            raise ConfigError(
                f"{error.name} isn't installed here: pip install llmcompressor, or name an interpreter that has it as "
                "quantization.python"
            ) from error
    ask = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    try:
        answer = subprocess.run([python, "-c", ask, *LIBRARIES], capture_output=True, text=True, check=True)
        found: dict[str, str] = json.loads(answer.stdout)
    except OSError as error:
        raise ConfigError(f"quantization.python={python}: no such interpreter ({error.strerror})") from error
    except subprocess.CalledProcessError as error:
        why = last_line(error.stderr)
        raise ConfigError(
            f"quantization.python={python}: it lacks llm-compressor ({why}); pip install llmcompressor"
        ) from error
    except ValueError as error:
        raise ConfigError(f"quantization.python={python}: not a Python interpreter") from error
    return found


def cache_of(config: QuantizationConfig) -> str:
    """Where checkpoints are kept, normalized; the default follows $BATCHQ_CACHE."""
    default = config.cache == QuantizationConfig.cache
    return storage.normalize(str(models.cache_dir() / "checkpoints") if default else config.cache)


def _prompts(prompts: list[list[int]], scheme: Scheme, config: QuantizationConfig) -> list[list[int]]:
    prompts = [prompt[: config.max_tokens] for prompt in prompts if prompt][: config.samples]
    if not prompts:
        where = f"quantization.calibration={config.calibration}" if config.calibration else "the input"
        raise ConfigError(
            f"quantization.scheme={scheme.value} needs prompts to calibrate on; {where} has no row that can be asked"
        )
    return prompts


def _require_room(model: Model, scheme: Scheme, config: QuantizationConfig, group: int | None, folder: Path) -> None:
    """Raise ConfigError before anything is loaded if it can't fit in memory or on the disk."""
    tensors = read_tensors(model.path)
    tied = is_tied(models.read_config(model.path))
    before, after = (
        stored_bytes(tensors),
        predicted_bytes(tensors, scheme, tied=tied, ignore=config.ignore, group=group),
    )
    if (have := hardware.detect().memory) < before + GIB:
        raise ConfigError(f"quantizing {model.name} takes {gib(before + GIB)} of memory, {gib(have)} are free")
    if (have := hardware.free_disk(folder)) < after:
        raise ConfigError(
            f"quantization.cache: {model.name} in {scheme.value} takes {gib(after)}, {gib(have)} are free"
        )


# ---- llm-compressor's process ----


def run_compress(
    python: str, request: dict[str, Any], log_path: Path, on_progress: Callable[[str], None]
) -> dict[str, int]:
    """Run compress.py on a request, its chatter to the log. The process ends with this call, whatever happens.

    Returns the most bytes that it held at a time, on "host" and "gpu". Raises QuantizeError with what it said last.
    """
    request = {**request, "threads": len(hardware.detect().cores)}
    # Threads that spin while they wait made the same work 10 times slower on two cores that were not all ours.
    patient = {"OMP_WAIT_POLICY": "PASSIVE"}
    apart = {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with (
        log_path.open("w", encoding="utf-8") as log,
        subprocess.Popen(
            [python, str(COMPRESS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**patient, **os.environ, **apart},
            text=True,
            errors="replace",
        ) as child,
    ):
        try:
            why, peak = _follow(child, request, log, on_progress)
        finally:
            child.kill()  # does nothing to one that has ended
    if child.returncode:
        cause = f"killed by signal {-child.returncode}" if child.returncode < 0 else why
        raise QuantizeError(f"quantizing to {request['scheme']} failed: {cause}; see {log_path}")
    return peak


def _follow(
    child: subprocess.Popen[str], request: dict[str, Any], log: Any, on_progress: Callable[[str], None]
) -> tuple[str, dict[str, int]]:
    """Hand over the request, pass on progress, log the rest, wait. Returns why it failed, if it did, and its peaks."""
    assert child.stdin is not None and child.stdout is not None
    with suppress(BrokenPipeError), child.stdin as stdin:  # one that died early says why on stdout
        json.dump(request, stdin)
    said = error = ""
    peak: dict[str, int] = {}
    for line in child.stdout:
        log.write(line)
        if PROGRESS in line:
            on_progress(line.rpartition(PROGRESS)[2].strip())
        elif ERROR in line:
            error = line.rpartition(ERROR)[2].strip()
        elif line.startswith(PEAK):
            peak = json.loads(line.removeprefix(PEAK))
        elif line.strip():
            said = line.strip()
    child.wait()
    return error or said or f"exit code {child.returncode}", peak


# ---- the card ----


def write_card(folder: Path, base: Model, facts: dict[str, Any]) -> None:
    """List a finished checkpoint's files in its card, the last file to be written."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": models.file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    card = {
        **facts,
        "base": {"name": base.name, "digest": base.digest, "bytes": stored_bytes(read_tensors(base.path))},
        "bytes": stored_bytes(read_tensors(folder)),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
    }
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")


def read_card(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model card of a checkpoint that was made here; see write_card."""
    card: dict[str, Any] = json.loads((Path(checkpoint.path) / CARD).read_text())
    return card


def read_verdict(checkpoint: Checkpoint, case: str, config: QuantizationConfig) -> dict[str, Any] | None:
    """What the gate found before of this checkpoint in this very case; None if it wasn't asked."""
    found: dict[str, Any] | None = None
    with suppress(FileNotFoundError):  # a model as it came has no card
        found = read_card(checkpoint).get("gate", {}).get(case)
    if found is None and storage.is_remote(cache_of(config)):
        with suppress(NotFound):
            found = json.loads(storage.read(storage.join(cache_of(config), checkpoint.key, "gate", f"{case}.json")))
    return found


def write_verdict(checkpoint: Checkpoint, case: str, verdict: dict[str, Any], config: QuantizationConfig) -> None:
    """Note in the model card, and beside it in an object store, what the gate found."""
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


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint is there as its card describes it, each file in size and content."""
    try:
        files = json.loads((folder / CARD).read_text())["files"]
        return bool(files) and all(
            (folder / name).stat().st_size == told["size"] and models.file_digest(folder / name) == told["sha256"]
            for name, told in files.items()
        )
    except (OSError, ValueError, LookupError, TypeError):  # a file or the card is missing, cut short or altered
        return False


# ---- the cache ----


def _keep_on_disk(
    cache: str, key: str, build: Callable[[Path], None], on_progress: Callable[[str], None]
) -> tuple[Path, bool]:
    """The checkpoint's folder, and whether it was made now."""
    folder = Path(cache) / key
    if folder.exists() and not is_whole(folder):
        on_progress(f"the checkpoint in {folder} is damaged and is made again")
    return folder, models.build_once(folder, build, is_whole)


def _keep_in_store(
    cache: str, key: str, build: Callable[[Path], None], on_progress: Callable[[str], None]
) -> tuple[Path, bool]:
    """Likewise for an object store: the folder is this machine's copy of the build that the store's card names."""
    place, copy = storage.join(cache, key), models.cache_dir() / "checkpoints" / key
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

    models.build_once(copy, fetch_or_build, is_whole)
    if not _publish(copy, place):
        shutil.rmtree(copy)  # another machine's build became the one, and everybody serves that
        models.build_once(copy, fetch_or_build, is_whole)
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
