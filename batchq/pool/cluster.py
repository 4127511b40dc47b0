"""Ray's nodes, and the slots on them that replicas take."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from batchq.config import ClusterConfig
from batchq.engine.protocol import EngineSpec
from batchq.errors import ConfigError, EngineError, ExitCode
from batchq.machine import hardware
from batchq.machine.cache import lend_home
from batchq.machine.hardware import Hardware, Node
from batchq.machine.log import LogFile
from batchq.machine.words import last_line
from batchq.pool.replica import Replica
from batchq.sizing import replicas
from batchq.sizing.replicas import Slot

logger = logging.getLogger(__name__)

HEAD_SHARE = 0.75  # of the time that Ray waits for its head before it ends all processes
LOOKS = 9  # at the head in that time


def connect(address: str | None) -> None:
    """Start Ray on this machine, on loopback only, or join the cluster at `address`.

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
            "num_cpus": len(machine.cores),
            "num_gpus": len(machine.gpus),
            "object_store_memory": 100 * 1024 * 1024,  # no row travels through it
        }
    else:
        _require_answer(address)
        import batchq

        options |= {"address": address, "runtime_env": {"py_modules": [batchq]}}
    try:
        lend_home()
        with _signals_left_alone():
            _start(options)
    except Exception as error:  # Ray has no class of its own for what keeps it from starting
        said = _in_words(error)
        if address is None:
            raise EngineError(f"Ray doesn't start on this machine: {said}") from error
        hint = "" if "RAY_AUTH_MODE" in os.environ else "; if it asks for a token, set RAY_AUTH_MODE=token"
        raise ConfigError(f"cluster.address={address}: {said}{hint}") from error


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


def why(error: BaseException) -> str:
    """What kept a process from working: our own words, or the library that its node lacks. Of other errors the class
    alone, since their messages may quote a row."""
    kind, _, words = last_line(str(error)).partition(": ")
    if isinstance(error, ImportError):
        return str(error)
    if kind.startswith("batchq.errors.") or kind in ("ModuleNotFoundError", "ImportError"):  # of an actor's beginning
        return words
    return type(error).__name__


def nodes() -> list[dict[str, Any]]:
    """Ray's records of the nodes that are alive, always in the same order."""
    import ray

    records: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return sorted((n for n in records if n["Alive"]), key=lambda n: str(n["NodeID"]))


def alive(slot: Slot) -> bool:
    """Whether the node is still there."""
    return any(node["NodeID"] == slot.node for node in nodes())


def detect() -> Hardware:
    """The hardware of the best equipped node, and all nodes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    records = nodes()
    best = min(records, key=lambda n: (-n["Resources"].get("GPU", 0), -n["Resources"].get("CPU", 0)))
    on_best = NodeAffinitySchedulingStrategy(best["NodeID"], soft=False)
    of_best: Hardware = ray.get(
        ray.remote(hardware.detect).options(num_cpus=0, scheduling_strategy=on_best).remote()  # type: ignore[arg-type]
    )
    return _with_nodes(of_best, records)


def slots(cluster: ClusterConfig, hardware: Hardware) -> list[Slot]:
    """The replicas' slots on the nodes that are alive now. Raises ConfigError if there are fewer than are asked for."""
    return list(replicas.require(cluster, _with_nodes(hardware, nodes())).slots)


def _with_nodes(hardware: Hardware, records: list[dict[str, Any]]) -> Hardware:
    """The same with the nodes of Ray's records; a node's cores are taken to have the ids that the best one's have."""
    resources = [
        (str(r["NodeID"]), int(r["Resources"].get("GPU", 0)), int(r["Resources"].get("CPU", 0))) for r in records
    ]
    return dataclasses.replace(
        hardware, cluster=tuple(Node(id, gpus, hardware.cores[:cpus]) for id, gpus, cpus in resources)
    )


def start(slot: Slot, spec: EngineSpec, hardware: Hardware, log: LogFile) -> Any:
    """A replica at that place; the handle of Ray's actor. It loads nothing before it is told to."""
    import ray

    return ray.remote(Replica).options(**placement(slot, spec, hardware)).remote(spec, log)  # type: ignore[arg-type]


def placement(slot: Slot, spec: EngineSpec, hardware: Hardware) -> dict[str, Any]:
    """Ray's options for the actor that runs one engine."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cuda = hardware.device == "cuda"
    return {
        "num_cpus": 0 if cuda else len(slot.cores),
        "num_gpus": spec.devices if cuda else 0,
        "max_restarts": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(slot.node, soft=False),
    }
