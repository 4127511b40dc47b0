"""The driver's connection to Ray: started on this machine or joined, and given up once its head has gone."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchq.errors import ConfigError, EngineError, ExitCode
from batchq.machine import hardware
from batchq.machine.cache import lend_home

logger = logging.getLogger(__name__)

HEAD_SHARE = 0.75  # of the time that Ray waits for its head before it ends all processes
LOOKS = 9  # at the head in that time
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # in the environment of a driver that runs as a Ray job


def connect(address: str | None, metrics_port: int | None = None) -> None:
    """Start Ray on this machine, on loopback only, or join the cluster at `address`. `metrics_port`: where a Ray that
    is started serves its metrics; None leaves it to Ray.

    Raises ConfigError if no cluster answers there, EngineError if Ray doesn't start here. The handlers of SIGTERM and
    SIGINT stay as they are.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Of the shards that a lost replica had, the first tells why; Ray would print what the others end with.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # Ray makes its workers nice to everything else (15); here the engines are what the machine is for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if address is None:
        # Or Ray takes 127.0.0.1 for the machine's outer address, and all its ports are open there. Read at its import.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    logging.getLogger(ray.__name__).setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
    if address is None:
        machine = hardware.detect()
        options |= {
            "address": "local",
            "_node_ip_address": "127.0.0.1",
            "include_dashboard": False,
            "_metrics_export_port": metrics_port,
            "num_cpus": len(machine.cores),
            "num_gpus": len(machine.gpus),
            "object_store_memory": 100 * 1024 * 1024,  # no row travels through it
        }
    else:
        _require_answer(address)
        options |= {"address": address, "runtime_env": _runtime_env()}
    try:
        lend_home()
        with _signals_left_alone():
            _start(options)
        _hush(True)
    except Exception as error:  # Ray has no class of its own for what keeps it from starting
        said = _in_words(error)
        if address is None:
            raise EngineError(f"Ray doesn't start on this machine: {said}") from error
        hint = "" if "RAY_AUTH_MODE" in os.environ else "; if it asks for a token, set RAY_AUTH_MODE=token"
        raise ConfigError(f"cluster.address={address}: {said}{hint}") from error


def _runtime_env() -> dict[str, Any]:
    """What nodes are sent: this very batchq, which need not be installed there. Within a Ray job that brings modules of
    its own, Ray takes no second list, so batchq is one of them or is installed."""
    job = json.loads(os.environ.get(JOB, "{}")).get("runtime_env") or {}
    # Its folder, not the module: in a job Ray copies this deeply, and a module can't be copied.
    return {} if "py_modules" in job else {"py_modules": [str(Path(__file__).parents[1])]}


def close() -> None:
    """End what `connect` began."""
    import ray

    ray.shutdown()
    _hush(False)


def _hush(quiet: bool) -> None:
    """Ray prints what its nodes complain of between our lines: when one dies, 40 lines of its state. What follows for
    replicas is told by us; the words themselves stay in Ray's own logs."""
    from ray._private import worker

    worker._worker_logs_enabled = not quiet


def _start(options: dict[str, Any]) -> None:
    """Start or join Ray; once more where a busy machine was too slow for it."""
    import ray

    try:
        ray.init(**options)
    except Exception as error:
        if "timed out" not in str(error):
            raise
        logger.warning("Ray was not up in time and is started once more: %s", _in_words(error))
        ray.shutdown()
        ray.init(**options)


def _in_words(error: Exception) -> str:
    """In one line what Ray, or the system below it, says, and what to set where Ray's own words don't know."""
    said = " ".join(str(error).split())
    if "AF_UNIX path length" in said:
        return f"{said}; set RAY_TMPDIR to a folder with a shorter name, such as /tmp"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; Ray's files go to RAY_TMPDIR, TMPDIR or /tmp"
    if "ersion mismatch" in said:
        return f"{said}; both need the same versions of Ray and Python"
    return said[:300]


@contextmanager
def _signals_left_alone() -> Iterator[None]:
    """Leave signals to this process: Ray would take SIGTERM for itself. While Ray starts, its handlers raise SystemExit
    wherever the signal arrives, and where nothing can be raised it is lost: a run went on and ended in exit code 0. Ray
    also leaves a handler below Python that writes a stack and aborts; Python's is put over it again."""
    from ray._private import utils

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    theirs = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _require_answer(address: str) -> None:
    """Raises ConfigError when nothing listens there; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ConfigError(
            f"cluster.address={address}: no Ray cluster answers there ({error.strerror or error})"
        ) from None


def watch_head(address: str | None, over: threading.Event) -> None:
    """Until `over` is set: end this process with a word once Ray's head has gone, from a thread of its own.

    Ray's own calls then hang, and after RAY_gcs_rpc_server_reconnect_timeout_s Ray ends the process without one that
    says what to do. Nothing is lost by it that another driver's death wouldn't lose.
    """
    import ray

    if (address or "").startswith("ray://"):
        return  # a proxy is between us and the head
    head = str(ray.get_runtime_context().gcs_address)
    limit = HEAD_SHARE * float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))  # noqa: SIM112, Ray names it so

    def watch() -> None:
        missed = 0
        while not over.wait(limit / LOOKS):
            missed = 0 if _listens(head) else missed + 1
            if missed == LOOKS:
                logger.critical(
                    "Ray's head at %s has not answered for %.0f s; what is committed stays, "
                    "and the same command goes on from there",
                    head,
                    limit,
                )
                os._exit(ExitCode.FAILED)

    threading.Thread(target=watch, name="batchq-ray-head", daemon=True).start()


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True
