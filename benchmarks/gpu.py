"""The GPUs by NVML: how busy the first one is, its clock, what it takes, and whether memory was given back."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

from batchq.machine import hardware


def free_memory() -> tuple[int, ...]:
    """Bytes free on each GPU."""
    return tuple(gpu.free for gpu in hardware.detect().gpus)


def await_memory(wanted: tuple[int, ...], patience: float = 60.0) -> None:
    """Wait until each GPU has as much free memory as before: the driver takes its time after a process has ended."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if all(now > before - (1 << 30) for now, before in zip(free_memory(), wanted, strict=True)):
            return
        time.sleep(0.5)


class Watch:
    """NVML's utilisation, clock and energy counter of the first GPU, ten times a second, until it is closed."""

    def __init__(self) -> None:
        self.used: list[tuple[float, float]] = []
        self.energy: list[tuple[float, float]] = []  # joules
        self.clock: list[tuple[float, float]] = []  # MHz of the multiprocessors
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        import pynvml as nvml

        gpus = hardware.detect().gpus
        if not gpus:
            return
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(gpus[0].uuid)  # its index isn't 0 if CUDA_VISIBLE_DEVICES says so
        looks: list[tuple[list[tuple[float, float]], Callable[[], float]]] = [
            (self.used, lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
            (self.energy, lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000),
            (self.clock, lambda: float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))),
        ]
        while not self._stop.wait(0.1):
            for samples, look in looks:
                try:
                    samples.append((time.time(), look()))
                except nvml.NVMLError:
                    continue  # this one isn't counted on this GPU

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def busy(self, begin: float, end: float) -> float | None:
        shares = [share for at, share in self.used if begin <= at <= end]
        return statistics.mean(shares) / 100 if shares else None

    def mhz(self, begin: float, end: float) -> float | None:
        clocks = [clock for at, clock in self.clock if begin <= at <= end]
        return statistics.mean(clocks) if clocks else None

    def joules(self, begin: float, end: float) -> float | None:
        during = [sample for sample in self.energy if begin <= sample[0] <= end]
        if len(during) < 2:
            return None
        (first, low), (last, high) = during[0], during[-1]
        return (high - low) * (end - begin) / (last - first)
