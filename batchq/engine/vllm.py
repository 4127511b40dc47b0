"""The Engine protocol on vLLM's AsyncLLM.

What differs between the vLLM versions that batchq runs on (0.26 and 0.32) is at the end of this
module, and nowhere else.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import logging
import os
import re
import stat
import time
from itertools import count
from typing import TYPE_CHECKING, Any

from batchq.engine import vllm_norms
from batchq.engine.protocol import Completion, EngineSpec, Prompt, Sampling
from batchq.engine.vllm_process import Extension, fork_engines, is_forked, set_environment
from batchq.errors import EngineError, EngineOutOfMemory, RowError

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger(__name__)


class VllmEngine:
    """The Engine protocol: vLLM's AsyncLLM, which computes in processes of its own."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.llm: AsyncLLM | None = None
        self._ids = count()
        self._params: dict[Sampling, Any] = {}
        self._log_began = 0

    async def start(self) -> dict[str, float]:
        if self.llm is not None:
            return {}
        set_environment(self.spec)
        began = time.monotonic()
        self._log_began = _log_size()
        # In a thread: the constructor blocks until the weights are loaded and warmed up, and the
        # loop has to answer "how far are you" meanwhile.
        try:
            self.llm = await asyncio.to_thread(self._open)
        except Exception as error:
            raise EngineError(f"vLLM did not start: {_first_line(error)}") from error
        total = time.monotonic() - began
        await self.llm.collective_rpc("batchq_end_with", args=(os.getpid(),))
        # Only vLLM's worker processes know it: 31.6 of 116 s until an H200 was ready for a 135M model.
        compiled = max(await self.llm.collective_rpc("batchq_compile_seconds"))
        return {"load": max(0.0, total - compiled), "compile": compiled}

    def _open(self) -> AsyncLLM:
        began = time.monotonic()
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_arguments(self.spec, AsyncEngineArgs)
        if arguments.get("enforce_eager") and self.spec.device == "cpu" and self.spec.devices == 1:
            arguments.setdefault("ir_op_priority", vllm_norms.register())
        if is_forked(self.spec):
            fork_engines()
        imported = time.monotonic()
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        took = f"vLLM imported in {imported - began:.1f} s, engine up in {time.monotonic() - imported:.1f} s"
        logger.info(took)
        return llm

    async def ask(self, prompt: Prompt, sampling: Sampling) -> Completion:
        import vllm.exceptions
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        assert self.llm is not None, "start() comes first"
        final = None
        params = self.request_params(prompt, sampling)
        try:
            request = {"prompt_token_ids": prompt.token_ids}
            async for output in self.llm.generate(request, params, str(next(self._ids))):  # type: ignore[arg-type]
                final = output
        except EngineDeadError as error:
            if _out_of_memory(_log_since(self._log_began)):
                raise EngineOutOfMemory("vLLM's engine process died for want of memory") from error
            raise EngineError("vLLM's engine process died") from error
        except EngineGenerateError as error:
            kind = EngineOutOfMemory if _out_of_memory(str(error.__cause__ or error)) else EngineError
            raise kind(f"vLLM failed: {_first_line(error)}") from error
        except _refusals(vllm.exceptions) as error:
            raise RowError("engine_refused", f"vLLM refused the prompt: {type(error).__name__}") from error
        if final is None:
            raise EngineError("vLLM ended a request without an answer")
        answer = final.outputs[0]
        return Completion(
            logprobs=_logprobs(answer.logprobs, sampling.score_ids),
            text=answer.text,
            finish_reason=answer.finish_reason or "",
            prompt_tokens=len(prompt),
            cached_tokens=final.num_cached_tokens or 0,
            output_tokens=len(answer.token_ids),
            token_ids=tuple(answer.token_ids),
            prompt_logprob=_prompt_logprob(final.prompt_logprobs, prompt.token_ids) if sampling.score_prompt else None,
        )

    def request_params(self, prompt: Prompt, sampling: Sampling) -> Any:
        """One request's sampling: what all share, and where it is random the request's own seed."""
        params = self.sampling_params(sampling)
        if sampling.temperature and prompt.seed is not None:
            params = copy.copy(params)  # it shares what is in it, which vLLM only reads: see skip_clone
            params.seed = prompt.seed
        return params

    def sampling_params(self, sampling: Sampling) -> Any:
        if sampling not in self._params:
            from vllm import SamplingParams
            from vllm.sampling_params import RequestOutputKind

            scoring = bool(sampling.score_ids)
            self._params[sampling] = SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                seed=sampling.seed if sampling.temperature else None,
                stop=(list(sampling.stop) or None) if not scoring else None,
                logprob_token_ids=list(sampling.score_ids) or None,
                logprobs=None if not scoring else len(sampling.score_ids),
                prompt_logprobs=0 if sampling.score_prompt else None,
                detokenize=not scoring,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_clone=True,  # a deep copy for each request was 15% of a replica's Python time
            )
        return self._params[sampling]

    async def close(self) -> None:
        if self.llm is not None:
            llm, self.llm = self.llm, None
            await asyncio.to_thread(llm.shutdown)


def engine_arguments(spec: EngineSpec, known: Any) -> dict[str, Any]:
    """vLLM's engine arguments. Raises EngineError for an option that this vLLM doesn't have."""
    arguments: dict[str, Any] = {
        "model": spec.model,
        "max_model_len": spec.max_model_len,
        # AsyncLLM falls back to 2,048 tokens and 128 sequences a step where LLM takes 16,384 and 1,024.
        "max_num_batched_tokens": spec.max_num_batched_tokens,
        "max_num_seqs": spec.max_num_seqs,
        "tensor_parallel_size": spec.tensor_parallel_size,
        "pipeline_parallel_size": spec.pipeline_parallel_size,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "max_logprobs": max(20, spec.scored),  # vLLM refuses every request that asks for more than its 20
        "worker_extension_cls": f"{Extension.__module__}.{Extension.__name__}",
        "trust_remote_code": spec.trust_remote_code,
        "generation_config": "vllm",  # the job's sampling alone counts, not the model's own defaults
    }
    if spec.devices > 1:
        arguments["distributed_executor_backend"] = "mp"
    if spec.device == "cpu":
        arguments["enforce_eager"] = True  # up in 35 s instead of 115 to 140
        if spec.devices == 1:
            # vLLM starts a worker process even for one rank on a CPU, and for "uni" too; for the class it doesn't.
            arguments["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    arguments.update(spec.options)
    if spec.device == "cuda" and arguments.get("linear_backend") == "torch":
        # The second goes into the key of vLLM's compile cache, which doesn't know of changed code: an engine would take
        # over what an unchanged vLLM has compiled of the same model.
        arguments["worker_extension_cls"] = f"batchq.engine.vllm_products.{Extension.__name__}"
        arguments["additional_config"] = {**arguments.get("additional_config", {}), "batchq_products": "cublas"}
    fields = {f.name for f in dataclasses.fields(known)}
    if unknown := sorted(set(arguments) - fields):
        raise EngineError(f"engine.options.{unknown[0]}: this vLLM has no such engine argument")
    return arguments


def _logprobs(positions: Any, ids: tuple[int, ...]) -> tuple[float, ...]:
    """The asked ids' log-probabilities at the first generated position, in their order."""
    if not ids:
        return ()
    if not positions:
        raise RowError("invalid_score", "vLLM returned no log-probabilities")
    first = positions[0]
    missing = [i for i in ids if i not in first]
    if missing:
        raise RowError("invalid_score", f"vLLM returned no log-probability for token {missing[0]}")
    return tuple(float(first[i].logprob) for i in ids)


def _prompt_logprob(positions: Any, token_ids: list[int]) -> float:
    """Sum over all prompt tokens but the first, which follows nothing."""
    return float(sum(at[token].logprob for at, token in zip(positions[1:], token_ids[1:], strict=True)))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[0])[:300] if lines else type(error).__name__


# What a process without memory left says: torch on a GPU, CUDA itself, torch on a CPU, NumPy and C++.
_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory|Unable to allocate|bad_alloc",
    re.IGNORECASE,
)
_LAST_WORDS = 64 * 1024  # bytes of the log that are read for them


def _out_of_memory(words: str) -> bool:
    return _MEMORY.search(words) is not None


def _log_size() -> int:
    """Bytes that this process and its children have written so far, where that is a file."""
    status = os.fstat(2)
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _log_since(began: int) -> str:
    """The end of what they wrote since: vLLM tells us that its process died, and only the log says of what."""
    size = _log_size()
    if size <= began:
        return ""
    with open("/proc/self/fd/2", "rb") as log:
        log.seek(max(began, size - _LAST_WORDS))
        return log.read().decode(errors="replace")


# ---- what differs between the versions ----


def _refusals(exceptions: Any) -> tuple[type[Exception], ...]:
    """What vLLM raises when it refuses one request (too long, an id out of range). `exceptions`: its module of them.

    0.26: VLLMValidationError, a ValueError. 0.32: the same name under VLLMClientError, which is no ValueError.
    """
    return (ValueError, getattr(exceptions, "VLLMClientError", exceptions.VLLMValidationError))
