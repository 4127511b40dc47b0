"""vLLM's processes: their environment, how they are forked from one that has imported vLLM, and when they end."""

from __future__ import annotations

import importlib
import importlib.util
import os
import select
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from batchq.engine import vllm_norms
from batchq.engine.protocol import EngineSpec
from batchq.machine.cache import lend_home

HEAP = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1"


def set_environment(spec: EngineSpec) -> None:
    """What vLLM reads from the environment; set before its first import, inherited by its processes."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a local folder by now
    os.environ.setdefault("USER", str(os.getuid()))  # torch and vLLM ask for it, and a container's uid may have no name
    lend_home()
    if importlib.util.find_spec("flashinfer") is None:  # vLLM would sample with it all the same
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if spec.device == "cpu" and spec.cores and os.environ.get("VLLM_CPU_OMP_THREADS_BIND") != "auto":
        # "auto" left one of two cores idle: 1,115 against 2,651 prompt tokens/s (BF16, 135M).
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, spec.cores))
        os.environ["OMP_NUM_THREADS"] = str(len(spec.cores))  # Ray sets it to the actor's num_cpus
    if spec.device == "cpu":
        # glibc may hand the tensors of each step back to the kernel and fetch them anew: 230,000 page faults per
        # second, or none, as the heap happens to lie. Memory that is retained, in huge pages: 114 s instead of 146
        # (2,000 calls).
        os.environ.setdefault("GLIBC_TUNABLES", HEAP)
        if spec.options.get("enforce_eager", True):
            # vLLM has torch compile one function all the same, the tokens' ranks, when the first rows are asked: 9 s of
            # a cold start and 2.5 of a warm one, for work that takes no time.
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def import_ahead(spec: EngineSpec) -> None:
    """Begin to import vLLM in a process of its own, from which the engine's will be forked.

    vLLM would spawn its engine when this process's own imports are done, and that would import everything again.
    On a GPU nothing that is imported may touch CUDA, which a forked process can't use; nothing of vLLM's does.
    """
    if not is_forked(spec):
        return
    set_environment(spec)
    before = dict(os.environ)
    if spec.device == "cpu" and (torch := importlib.util.find_spec("torch")) and torch.origin:
        # vLLM's kernels and torch have to share one OpenMP, or their threads wait for each other; vLLM sees to that
        # when it spawns, which is too late here.
        library = Path(torch.origin).parent / "lib/libgomp.so.1"
        if library.exists():
            os.environ["LD_PRELOAD"] = ":".join(filter(None, [str(library), before.get("LD_PRELOAD")]))
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, spec.cores or cores)  # of this thread, and so of what it starts
    worker = "cpu_worker" if spec.device == "cpu" else "gpu_worker"
    forkserver.set_forkserver_preload(["vllm.v1.engine.core", f"vllm.v1.worker.{worker}"])
    forkserver.ensure_running()
    os.sched_setaffinity(0, cores)
    os.environ.clear()
    os.environ.update(before)


def is_forked(spec: EngineSpec) -> bool:
    """Whether the engine's process is forked. One of several GPUs starts a process for each by itself, and on one GPU
    VLLM_WORKER_MULTIPROC_METHOD=spawn, vLLM's own word, says no."""
    if spec.device == "cpu":
        return True
    return spec.devices == 1 and os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") != "spawn"


def fork_engines() -> None:
    """Have vLLM fork its engine's process from the one that `import_ahead` began, instead of spawning it."""
    utils: Any = importlib.import_module("vllm.v1.engine.utils")
    utils.get_mp_context = _EarlyContext


class _EngineProcess(ForkServerProcess):
    """vLLM's engine process, forked from one that has imported vLLM, with this process's environment."""

    def start(self) -> None:
        self._environment, self._replica = dict(os.environ), os.getpid()
        super().start()

    def run(self) -> None:
        # From its first moment: one whose replica was killed as it began waited for that one's greeting for 5 minutes.
        end_with(self._replica)
        with suppress(ImportError):  # vLLM names its process if it can; that needs the environment where it lies now
            importlib.import_module("setproctitle").getproctitle()
        os.environ.update(self._environment)
        if "batchq" in self._kwargs["vllm_config"].kernel_config.ir_op_priority.rms_norm:  # type: ignore[attr-defined]
            vllm_norms.register()  # has to be known in this process too
        super().run()


class _EarlyContext(ForkServerContext):
    Process = _EngineProcess


def end_with(process: int) -> None:
    """End when that process does. vLLM's engine outlives a killed parent, and would hold its device for good."""
    try:
        alive = os.pidfd_open(process)
    except ProcessLookupError:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)
    except OSError as error:  # a container that forbids it
        print(f"batchq: vLLM's processes may outlive a killed replica: {error}", file=sys.stderr, flush=True)
        return

    def watch() -> None:
        select.select([alive], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="batchq-end-with", daemon=True).start()


class Extension:
    """What vLLM's worker classes are given besides their own methods."""

    compilation_config: Any

    def batchq_compile_seconds(self) -> float:
        return float(self.compilation_config.compilation_time or 0.0)

    def batchq_end_with(self, process: int) -> None:
        end_with(process)
