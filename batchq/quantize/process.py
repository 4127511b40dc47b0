"""llm-compressor's own process: the interpreter that has it, and compress.py in it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from batchq.errors import ConfigError, QuantizeError
from batchq.machine import hardware
from batchq.machine.words import last_line

COMPRESS = Path(__file__).with_name("compress.py")

LIBRARIES = ("llmcompressor", "compressed-tensors", "transformers")  # they decide a checkpoint's bytes

PROGRESS, ERROR, PEAK = "batchq progress: ", "batchq error: ", "batchq peak: "  # how compress.py's lines begin


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
        versions: dict[str, str] = json.loads(answer.stdout)
    except OSError as error:
        raise ConfigError(f"quantization.python={python}: no such interpreter ({error.strerror})") from error
    except subprocess.CalledProcessError as error:
        why = last_line(error.stderr)
        raise ConfigError(
            f"quantization.python={python}: it lacks llm-compressor ({why}); pip install llmcompressor"
        ) from error
    except ValueError as error:
        raise ConfigError(f"quantization.python={python}: not a Python interpreter") from error
    return versions


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
