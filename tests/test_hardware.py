"""hardware: what the kernel's and NVML's words mean, and this machine's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pynvml
import pytest

from batchq.errors import ConfigError
from batchq.machine import hardware
from batchq.machine.hardware import Gpu, Hardware

XEON = """processor	: 0
model name	: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags		: fpu sse avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8

processor	: 1
model name	: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags		: fpu
"""
GRAVITON = """processor	: 0
BogoMIPS	: 2100.00
Features	: fp asimd asimddp i8mm bf16
CPU implementer	: 0x41
"""


def gpu(name: str = "NVIDIA H100 80GB HBM3", capability: tuple[int, int] = (9, 0), uuid: str = "GPU-1") -> Gpu:
    return Gpu(name, 80 << 30, 79 << 30, capability, "580.82", uuid)


def test_this_machine() -> None:
    here = hardware.detect()
    assert here.cores and set(here.cores) <= os.sched_getaffinity(0)
    assert 0 < here.memory < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert here.cpu
    assert here.device == ("cuda" if here.gpus else "cpu")
    assert all(found.memory >= found.free > 0 and found.capability > (1, 0) and found.name for found in here.gpus)


def test_nothing_heavy_comes_in() -> None:
    code = "import sys; from batchq.quantize import checkpoint; checkpoint.hardware.detect(); "
    code += "heavy = {'torch', 'transformers', 'vllm', 'ray'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cpuinfo_of_both_families() -> None:
    model, flags = hardware.parse_cpuinfo(XEON)
    assert model == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    assert flags == {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"}
    model, flags = hardware.parse_cpuinfo(GRAVITON)
    assert model == "unknown CPU" and flags == {"asimddp", "i8mm", "bf16"}


def test_meminfo_is_in_bytes() -> None:
    assert hardware.parse_meminfo("MemTotal:  64 kB\nMemFree: 1 kB\nMemAvailable:     48 kB\n") == 48 * 1024


@pytest.mark.parametrize(
    ("quota", "cores"),
    [(None, (2, 3, 5, 7)), (2.0, (2, 3)), (2.9, (2, 3)), (0.5, (2,)), (16.0, (2, 3, 5, 7))],
)
def test_a_quota_takes_cores_away(quota: float | None, cores: tuple[int, ...]) -> None:
    assert hardware.usable_cores({7, 2, 5, 3}, quota) == cores


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_limits_of_cgroups_version_2_hold_at_every_level(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/container",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000",
            "sys/fs/cgroup/pod/container/cpu.max": "max 100000",
            "sys/fs/cgroup/pod/memory.max": "max",
            "sys/fs/cgroup/pod/memory.current": "9999",
            "sys/fs/cgroup/pod/container/memory.max": "8000",
            "sys/fs/cgroup/pod/container/memory.current": "5000",
            "sys/fs/cgroup/pod/container/memory.stat": "anon 3000\ninactive_file 1500",
        },
    )
    assert hardware.cpu_quota(root) == 1.5
    assert hardware.cgroup_memory(root) == 8000 - 5000 + 1500


def test_limits_of_cgroups_version_1_in_a_container(tmp_path: Path) -> None:
    """The path is the host's, and what it names isn't there: the container's own limits stand at the top."""
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/f00\n3:cpu,cpuacct:/docker/f00\n0::/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "7000",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "6500",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 500",
        },
    )
    assert hardware.cpu_quota(root) == 4.0
    assert hardware.cgroup_memory(root) == 1000


def test_no_limits(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "1:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"})
    assert hardware.cpu_quota(root) is None
    assert hardware.cgroup_memory(root) > 1 << 60


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (None, ["a", "b", "c"]),
        ("", []),
        ("-1", []),
        ("2,0", ["c", "a"]),
        ("NoDevFiles", []),
        ("GPU-bb", ["b"]),
        ("0,-1,1", ["a"]),
    ],
)
def test_cuda_visible_devices(selection: str | None, names: list[str]) -> None:
    gpus = tuple(gpu(name, uuid=f"GPU-{name * 8}") for name in "abc")
    assert [found.name for found in hardware.visible(gpus, selection)] == names


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ("0,7,1", "7 is no GPU of this machine; there are 0 (GPU-aaaaaaaa), 1 (GPU-bbbbbbbb), 2 (GPU-cccccccc)"),
        ("MIG-GPU-aaaaaaaa/1/0", "parts of a GPU (MIG) can't be used"),
        ("0,0", "0 names a GPU that is named already"),
        ("GPU-", "GPU- names several GPUs"),
    ],
)
def test_a_gpu_that_is_not_there_never_makes_it_the_cpu(selection: str, words: str) -> None:
    gpus = tuple(gpu(name, uuid=f"GPU-{name * 8}") for name in "abc")
    with pytest.raises(ConfigError) as raised:
        hardware.visible(gpus, selection)
    assert f"CUDA_VISIBLE_DEVICES={selection}: {words}" in str(raised.value)
    with pytest.raises(ConfigError, match="there are none; set it empty to use the CPU"):
        hardware.visible((), "0")


def test_what_it_is_called_and_the_least_of_its_gpus() -> None:
    bare = Hardware((), (0, 1), "Xeon", frozenset(), 1 << 34)
    assert (bare.device, bare.accelerator, bare.capability) == ("cpu", "cpu_core", None)
    mixed = Hardware((gpu(), gpu("NVIDIA A100-SXM4-80GB", (8, 0))), (0,), "Xeon", frozenset(), 1 << 34)
    assert (mixed.device, mixed.accelerator, mixed.capability) == ("cuda", "NVIDIA H100 80GB HBM3", (8, 0))


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert hardware.free_disk(tmp_path / "a/b/c") > 0


# ---- energy; NVML itself answers on machines with GPUs alone, so its functions are stood in for ----


class Counters:
    """Two GPUs' energy counters in millijoules, or the error that NVML gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.millijoules: dict[str, int] = {"GPU-a": 7_000_000, "GPU-b": 1_000_000, "GPU-c": 0}
        self.error: int | None = None
        found = tuple(gpu(uuid=uuid) for uuid in self.millijoules)
        monkeypatch.setattr(hardware, "_gpus", lambda: found)
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", self.read)

    def read(self, handle: str) -> int:
        if self.error is not None:
            raise pynvml.NVMLError(self.error)
        return self.millijoules[handle]


def test_joules_are_those_of_the_gpus_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    meter = hardware.EnergyMeter()
    counters.millijoules = {"GPU-a": 7_300_500, "GPU-b": 1_200_000, "GPU-c": 9_000_000}
    assert meter.joules() == 500.5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.EnergyMeter().joules() is None


@pytest.mark.parametrize("error", ["NVML_ERROR_NOT_SUPPORTED", "NVML_ERROR_FUNCTION_NOT_FOUND"])
def test_where_nothing_is_counted_there_are_no_joules(
    error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counters = Counters(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    counters.error = getattr(pynvml, error)
    assert hardware.EnergyMeter().joules() is None
    assert not capsys.readouterr().err


def test_a_gpu_that_is_lost_takes_its_joules_along_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counters = Counters(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    meter = hardware.EnergyMeter()
    counters.error = pynvml.NVML_ERROR_GPU_IS_LOST
    assert meter.joules() is None and meter.joules() is None
    (line,) = caplog.messages
    assert "can't be read any more" in line


def test_this_machines_own_energy() -> None:
    found = hardware.EnergyMeter().joules()
    assert found is None or found >= 0
    assert found is None or hardware.detect().gpus
