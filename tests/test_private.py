"""What batchq patches or reaches into in other packages, and no version promises: it is there, in the form we need.

A failure names the installed version and the function of ours that has to be looked at. pyproject.toml's upper bounds
are raised once this passes on the new version.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import platform
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def load(name: str) -> Any:
    """A module, or what is in one."""
    if find_spec(name.partition(".")[0]) is None:
        raise AssertionError("not installed")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def takes(function: Any, *names: str) -> None:
    """Its parameters are these, or among them."""
    missing = set(names) - set(inspect.signature(function).parameters)
    assert not missing, f"no parameter {', '.join(sorted(missing))}"


def says(thing: Any, *words: str) -> None:
    """These words stand in its source: who calls what is patched still looks it up where it is patched."""
    source = inspect.getsource(thing)
    for word in words:
        assert word in source, f"its source no longer says {word}"


def has_fields(thing: Any, *names: str) -> None:
    missing = set(names) - {field.name for field in dataclasses.fields(thing)}
    assert not missing, f"no field {', '.join(sorted(missing))}"


# ---- vLLM ----


def process_context() -> None:
    utils = load("vllm.v1.engine.utils")
    assert not inspect.signature(utils.get_mp_context).parameters
    says(utils.CoreEngineProcManager, "get_mp_context()", "context.Process(", "kwargs=", '"vllm_config"')


def preloaded_modules() -> None:
    for module in ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "vllm.v1.worker.gpu_worker"):
        assert find_spec(module), f"no module {module}"


def environment_variables() -> None:
    known = load("vllm.envs").environment_variables
    for name in ("CPU_OMP_THREADS_BIND", "NO_USAGE_STATS", "USE_FLASHINFER_SAMPLER", "WORKER_MULTIPROC_METHOD"):
        assert f"VLLM_{name}" in known, f"no variable VLLM_{name}"


def worker_extension() -> None:
    base = load("vllm.v1.worker.worker_base")
    says(base.WorkerBase.__init__, "self.compilation_config =")
    says(base, "worker_extension_cls", "resolve_obj_by_qualname")
    has_fields(load("vllm.config.CompilationConfig"), "compilation_time")


def operations() -> None:
    priority = load("vllm.config.kernel.IrOpPriorityConfig")
    for name in ("rms_norm", "fused_add_rms_norm"):
        op = getattr(load("vllm.ir").ops, name)
        takes(op.register_impl, "provider", "supports_args", "inplace")
        assert callable(op.impls["native"].impl_fn)
        has_fields(priority, name)


def norm_kernels() -> None:
    import torch

    current = load("vllm.platforms").current_platform
    current.import_kernels()
    if not current.is_cpu():
        return
    for name, wanted in (("rms_norm", 4), ("fused_add_rms_norm", 4)):
        found = getattr(torch.ops._C, name).default._schema
        assert len(found.arguments) == wanted, f"{found} takes other arguments"


def products() -> None:
    kernel = load("vllm.model_executor.kernels.linear.scaled_mm.pytorch.ChannelWiseTorchFP8ScaledMMLinearKernel")
    takes(kernel.apply_scaled_mm, "A", "B", "out_dtype", "As", "Bs", "bias", "output_shape")
    says(kernel.__mro__[2].apply_weights, "self.apply_scaled_mm(", "As=x_s", "Bs=w_s", "w.shape[1]")
    says(load("vllm.config.VllmConfig").compute_hash, "additional_config")
    has_fields(load("vllm.AsyncEngineArgs"), "linear_backend", "additional_config")


def one_process_on_a_cpu() -> None:
    assert inspect.isclass(load("vllm.v1.executor.uniproc_executor.UniProcExecutor"))


def asking() -> None:
    llm = load("vllm.v1.engine.async_llm.AsyncLLM")
    assert list(inspect.signature(llm.generate).parameters)[1:4] == ["prompt", "sampling_params", "request_id"]
    takes(llm.collective_rpc, "method", "args")
    takes(llm.from_engine_args, "engine_args")
    assert callable(llm.shutdown)
    takes(
        load("vllm.SamplingParams"), "logprob_token_ids", "prompt_logprobs", "detokenize", "output_kind", "skip_clone"
    )


def errors() -> None:
    raised = load("vllm.v1.engine.exceptions")
    assert issubclass(raised.EngineDeadError, Exception) and issubclass(raised.EngineGenerateError, Exception)
    assert issubclass(load("vllm.exceptions").VLLMValidationError, Exception)


def engine_arguments() -> None:
    names = ["max_logprobs", "worker_extension_cls", "ir_op_priority", "kv_cache_memory_bytes", "generation_config"]
    has_fields(load("vllm.AsyncEngineArgs"), *names, "distributed_executor_backend", "disable_log_stats")


# ---- Ray, Python ----


def signal_handler() -> None:
    assert list(inspect.signature(load("ray._private.utils").set_sigterm_handler).parameters) == ["sigterm_handler"]
    says(load("ray._private.worker"), "ray._private.utils.set_sigterm_handler(")


def inner_options() -> None:
    says(load("ray._private.worker").init, '"_node_ip_address"')
    assert load("ray._private.ray_constants").ENABLE_RAY_CLUSTERS_ENV_VAR == "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def unhandled_errors() -> None:
    says(load("ray._private.worker"), '"RAY_IGNORE_UNHANDLED_ERRORS" in os.environ')


def worker_logs() -> None:
    worker = load("ray._private.worker")
    assert isinstance(worker._worker_logs_enabled, bool)  # which: as the last test that used Ray left it
    says(worker.print_worker_logs, "if not _worker_logs_enabled")
    says(worker.listen_error_messages, "print_to_stdstream(")


def job_environment() -> None:
    says(load("ray._private.worker").init, "RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ", "_merge_runtime_env(")


def fork_server() -> None:
    process: Any = ForkServerProcess(target=print, kwargs={"a": 1})
    assert process._kwargs == {"a": 1}
    assert ForkServerContext.Process is ForkServerProcess
    takes(forkserver.set_forkserver_preload, "modules_names")
    assert callable(forkserver.ensure_running)


VLLM, NORMS, PROCESS, PRODUCTS = (
    f"batchq/engine/{name}.py" for name in ("vllm", "vllm_norms", "vllm_process", "vllm_products")
)
CONNECTION = "batchq/pool/connection.py"
PRIVATE = [
    ("vllm", "vllm.v1.engine.utils.get_mp_context", f"{PROCESS}: fork_engines", process_context),
    ("vllm", "the modules that vLLM's engine process imports", f"{PROCESS}: import_ahead", preloaded_modules),
    ("vllm", "vllm.envs", f"{PROCESS}: set_environment", environment_variables),
    ("vllm", "vllm.v1.worker.worker_base.WorkerBase", f"{PROCESS}: Extension", worker_extension),
    ("vllm", "vllm.ir.ops", f"{NORMS}: register", operations),
    ("vllm", "torch.ops._C, vLLM's kernels", f"{NORMS}: register", norm_kernels),
    ("vllm", "vLLM's FP8 products by torch", f"{PRODUCTS}: _change", products),
    ("vllm", "vllm.v1.executor.uniproc_executor", f"{VLLM}: engine_arguments", one_process_on_a_cpu),
    ("vllm", "vllm.AsyncEngineArgs", f"{VLLM}: engine_arguments", engine_arguments),
    ("vllm", "vllm.v1.engine.async_llm.AsyncLLM", f"{VLLM}: VllmEngine", asking),
    ("vllm", "vllm.v1.engine.exceptions", f"{VLLM}: _refusals", errors),
    ("ray", "ray._private.utils.set_sigterm_handler", f"{CONNECTION}: _signals_left_alone", signal_handler),
    ("ray", "ray.init's _node_ip_address", f"{CONNECTION}: connect", inner_options),
    ("ray", "RAY_IGNORE_UNHANDLED_ERRORS", f"{CONNECTION}: connect", unhandled_errors),
    ("ray", "ray._private.worker._worker_logs_enabled", f"{CONNECTION}: _hush", worker_logs),
    ("ray", "RAY_JOB_CONFIG_JSON_ENV_VAR", f"{CONNECTION}: _runtime_env", job_environment),
    ("Python", "multiprocessing.forkserver", f"{PROCESS}: _EngineProcess", fork_server),
]


def installed(package: str) -> str:
    """The package's name and version, as it is installed here."""
    if package == "Python":
        return f"Python {platform.python_version()}"
    for name in (package, f"{package}-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return f"{package}, not installed"


@pytest.mark.parametrize(("package", "what", "place", "check"), PRIVATE, ids=[what for _, what, _, _ in PRIVATE])
def test_what_we_rely_on_without_a_promise_is_there(
    package: str, what: str, place: str, check: Callable[[], None]
) -> None:
    file, _, name = place.partition(": ")
    assert any(f"{kind} {name}" in (ROOT / file).read_text() for kind in ("def", "class")), f"there is no {place}"
    try:
        check()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        pytest.fail(f"{installed(package)}: {what}: {reason}. Look at {place}", pytrace=False)


def test_a_failure_names_the_version_and_the_place() -> None:
    def gone() -> None:
        load("ray._private.utils.no_such_function")

    with pytest.raises(pytest.fail.Exception, match=r"^ray 2\..*: x: .*no_such_function.*Look at .*: connect$"):
        test_what_we_rely_on_without_a_promise_is_there("ray", "x", f"{CONNECTION}: connect", gone)
