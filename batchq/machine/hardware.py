"""The hardware that this process may use: GPUs by NVML, CPU cores, memory. No torch, so it answers at once."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from batchq.errors import ConfigError

logger = logging.getLogger(__name__)

CONTROL = "/dev/nvidiactl"  # is there where the kernel has a GPU's driver, or a container was given one
NO_GPU = ("", "-1", "NoDevFiles", "none", "void")  # what CUDA, Slurm and containers write for no GPU at all

# Instructions that decide how vLLM computes on a CPU; the rest of /proc/cpuinfo's flags don't matter here.
CPU_FLAGS = frozenset(
    {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimddp", "i8mm", "bf16"}
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that this process may use; memory in bytes, capability as CUDA counts it."""

    name: str  # as NVML gives it: "NVIDIA H100 80GB HBM3"
    memory: int
    free: int
    capability: tuple[int, int]
    driver: str
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """One machine that replicas may run on: Ray's id of it, its GPUs, and ids of the cores to bind to."""

    id: str
    gpus: int
    cores: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Hardware:
    """The hardware of a run: one machine, and the nodes of a cluster of such machines.

    `cores` are ids to bind to, already cut to a container's quota; `memory` is what can still be taken, in bytes,
    within a container's limit; `cluster` is empty where this machine is all there is.
    """

    gpus: tuple[Gpu, ...]
    cores: tuple[int, ...]
    cpu: str
    flags: frozenset[str]
    memory: int
    cluster: tuple[Node, ...] = ()

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All machines that replicas may run on."""
        return self.cluster or (Node("", len(self.gpus), self.cores),)

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"."""
        return "cuda" if self.gpus else "cpu"

    @property
    def accelerator(self) -> str:
        """The name that pricing goes by: the GPU's, or "cpu_core"."""
        return self.gpus[0].name if self.gpus else "cpu_core"

    @property
    def capability(self) -> tuple[int, int] | None:
        """The lowest compute capability among the GPUs, since one checkpoint serves them all; None on a CPU."""
        return min((gpu.capability for gpu in self.gpus), default=None)


def detect() -> Hardware:
    """Look at this machine; a few milliseconds. Raises ConfigError when a GPU's driver is broken, and for a GPU that
    CUDA_VISIBLE_DEVICES names and that isn't there: nobody asked for the CPU, nor for its price."""
    model, flags = parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    return Hardware(
        gpus=visible(_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")),
        cores=usable_cores(os.sched_getaffinity(0), cpu_quota()),
        cpu=model,
        flags=flags,
        memory=min(parse_meminfo(Path("/proc/meminfo").read_text()), cgroup_memory()),
    )


def free_disk(path: Path) -> int:
    """Bytes that can be written at `path`, which need not exist yet."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


# ---- GPUs ----


def _gpus() -> tuple[Gpu, ...]:
    if _asks_for_none(os.environ.get("CUDA_VISIBLE_DEVICES")):
        return ()  # asked to leave the GPUs alone, even broken ones
    import pynvml as nvml

    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        absent = isinstance(error, (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded))
        if absent and not os.path.exists(CONTROL):
            return ()
        raise _silent(error) from error
    try:
        driver = nvml.nvmlSystemGetDriverVersion()
        gpus = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            gpus.append(
                Gpu(
                    name=nvml.nvmlDeviceGetName(handle),
                    memory=memory.total,
                    free=memory.free,
                    capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
                    driver=driver,
                    uuid=nvml.nvmlDeviceGetUUID(handle),
                )
            )
        return tuple(gpus)
    except nvml.NVMLError as error:
        raise _silent(error) from error
    finally:
        nvml.nvmlShutdown()


def _silent(error: Exception) -> ConfigError:
    return ConfigError(
        f"the NVIDIA driver doesn't answer ({error}): see nvidia-smi, or set CUDA_VISIBLE_DEVICES= to use the CPU"
    )


def _asks_for_none(selection: str | None) -> bool:
    return selection is not None and selection.split(",")[0].strip() in NO_GPU


def visible(gpus: tuple[Gpu, ...], selection: str | None) -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves: indices or UUID prefixes, up to a word of NO_GPU.

    Raises ConfigError for a word that names no GPU, or one that was named before: CUDA would use fewer, or none at all.
    """
    if selection is None or _asks_for_none(selection):
        return gpus if selection is None else ()
    chosen: list[Gpu] = []
    for word in map(str.strip, selection.split(",")):
        if word in NO_GPU:
            break
        if word.isdecimal():
            match = list(gpus[int(word) : int(word) + 1])
        else:
            match = [gpu for gpu in gpus if gpu.uuid.startswith(word)]
        if len(match) != 1 or match[0] in chosen:
            raise ConfigError(f"CUDA_VISIBLE_DEVICES={selection}: {_why_not(word, gpus, named=match)}")
        chosen += match
    return tuple(chosen)


def _why_not(word: str, gpus: tuple[Gpu, ...], named: list[Gpu]) -> str:
    if word.startswith("MIG-"):
        return "parts of a GPU (MIG) can't be used, whole GPUs can"
    if named:
        return f"{word} names {'a GPU that is named already' if len(named) == 1 else 'several GPUs'}"
    there = ", ".join(f"{index} ({gpu.uuid})" for index, gpu in enumerate(gpus)) or "none"
    return f"{word} is no GPU of this machine; there are {there}; set it empty to use the CPU"


class EnergyMeter:
    """The energy that this process's GPUs took since the meter was made, whoever used them; by NVML."""

    def __init__(self) -> None:
        import pynvml as nvml

        gpus = visible(_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
        if gpus:
            nvml.nvmlInit()  # for as long as the process lives; it takes longer than a reading
        self._handles = [nvml.nvmlDeviceGetHandleByUUID(gpu.uuid) for gpu in gpus]
        self._began = self._read()

    def joules(self) -> float | None:
        """None without a GPU, and where NVML doesn't count: before Volta, and on many virtual ones."""
        now = self._read()
        return None if now is None or self._began is None else round(now - self._began, 3)

    def _read(self) -> float | None:
        import pynvml as nvml

        not_counted = (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission, nvml.NVMLError_FunctionNotFound)
        try:
            counts = [nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles]
        except nvml.NVMLError as error:
            self._handles = []
            if not isinstance(error, not_counted):  # a GPU that is lost ends its engine; a figure needn't
                logger.warning("the GPUs' energy can't be read any more: %s", error)
            return None
        return sum(counts) / 1000 if counts else None  # they count millijoules


# ---- CPU ----


def parse_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    """Model name and those of CPU_FLAGS that the first core has, from /proc/cpuinfo (x86 or Arm)."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or "unknown CPU", CPU_FLAGS.intersection(flags.split())


def usable_cores(affinity: set[int], quota: float | None) -> tuple[int, ...]:
    """The cores to bind to: as many as the quota pays for in full, at least one. More threads than that are only
    throttled."""
    cores = sorted(affinity)
    return tuple(cores if quota is None else cores[: max(1, int(quota))])


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many cores' time the cgroups above this process allow; None without a limit. `root` holds proc/ and sys/."""
    quotas = []
    for folder in _cgroups(root, "cpu"):
        if (text := _text(folder / "cpu.max")) is not None:  # version 2: "150000 100000" or "max 100000"
            quota, period = text.split()
            if quota != "max":
                quotas.append(int(quota) / int(period))
        elif (text := _text(folder / "cpu.cfs_quota_us")) is not None and int(text) > 0:
            quotas.append(int(text) / int((folder / "cpu.cfs_period_us").read_text()))
    return min(quotas, default=None)


# ---- memory ----


def parse_meminfo(text: str) -> int:
    """MemAvailable of /proc/meminfo, in bytes."""
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/meminfo has no MemAvailable")


def cgroup_memory(root: Path = Path("/")) -> int:
    """Bytes that the cgroups above this process still allow, page cache counted as free; 2**62 without a
    limit. `root` holds proc/ and sys/."""
    left = 1 << 62
    names = [("memory.max", "memory.current", "inactive_file")]
    names += [("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")]
    for folder in _cgroups(root, "memory"):
        for limit_name, usage_name, cache_name in names:
            limit, usage = _text(folder / limit_name), _text(folder / usage_name)
            if limit is None or usage is None or limit == "max":
                continue
            stat = dict(line.split() for line in (_text(folder / "memory.stat") or "").splitlines())
            left = min(left, int(limit) - int(usage) + int(stat.get(cache_name, 0)))
    return max(left, 0)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders that may limit this process, its own and all above it, for both versions of cgroups."""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        below = Path(path.lstrip("/"))
        for part in (below, *below.parents):
            yield base / part


def _text(path: Path) -> str | None:
    """A kernel file's content, stripped; None where this kernel doesn't have it."""
    try:
        return path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
