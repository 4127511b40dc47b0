"""One local Ray for all runs within a process of tests: each would start its own for 5 s, of which a core has 4.5."""

from __future__ import annotations

import os
import time

from batchq.pool import connection


class SharedRay:
    """In place of batchq's own connecting and closing. Started anew where its workers would inherit something else now,
    or where one that was ended still holds a core."""

    def __init__(self) -> None:
        self.start, self.end = connection.connect, connection.close
        self._inherited: dict[str, str] | None = None  # None: not up

    def connect(self, address: str | None, metrics_port: int | None = None) -> None:
        ordinary = address is None and metrics_port is None
        if ordinary and self._inherited == environment() and idle():
            return
        self.finish()
        self.start(address, metrics_port)
        if ordinary:
            self._inherited = environment()

    def close(self) -> None:
        if self._inherited is None:
            self.end()

    def finish(self) -> None:
        if self._inherited is not None:
            self._inherited = None
            self.end()


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def idle() -> bool:
    """Whether all cores are free; replicas that were just ended take a moment."""
    import ray  # not before `connect` has set what it reads at its import

    for _ in range(50):
        if not ray.is_initialized():
            return False
        free, there = ray.available_resources(), ray.cluster_resources()  # type: ignore[no-untyped-call]
        if free.get("CPU") == there.get("CPU"):
            return True
        time.sleep(0.1)  # polling another process
    return False
