"""The Engine protocol: a prompt in, token ids or label log-probabilities out.

`vllm.py` and `fake.py` implement it. A worker knows only this module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from batchq.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Prompt:
    """All that is one request's own: what the model reads, and its draw. Its length is counted in tokens."""

    token_ids: list[int]  # the chat template's among them
    seed: int | None = None  # of this request's sampling; None for Sampling's

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to answer. With `score_ids` the engine runs the prefill only and returns their
    log-probabilities; otherwise it generates up to `max_tokens` tokens. With `score_prompt` the
    prompt's own log-probability comes too, which makes the prefill slower."""

    score_ids: tuple[int, ...] = ()
    max_tokens: int = 1
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    score_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """`logprobs` are in the order of `Sampling.score_ids` (natural log, over the whole
    vocabulary); `text` is empty when scoring. `prompt_logprob` sums over the prompt's tokens but the first."""

    logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    token_ids: tuple[int, ...] = ()
    prompt_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a machine that hasn't the folder `EngineSpec.model` gets it from: the model's own source, or `cache`, the
    folder or prefix that has the checkpoint with the key `checkpoint` (None: the model as it came)."""

    model: ModelConfig
    cache: str
    checkpoint: str | None = None


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine is started with, the same for the real one and the fake.

    `cores` are the CPU cores this engine may use (empty: all it was given); `scored` is how many
    token ids a request may ask the log-probabilities of; `options` go to vLLM under its own names.
    """

    kind: str  # "vllm" or "fake"
    model: str  # a local folder
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    device: str = "cpu"  # "cpu" or "cuda"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    cores: tuple[int, ...] = ()
    scored: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False  # the model's own Python code may run
    origin: Origin | None = None  # None: every machine has the folder

    @property
    def devices(self) -> int:
        """Accelerators that it spans."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


class Engine(Protocol):
    """One model on one replica's devices. All methods run on one event loop."""

    async def start(self) -> dict[str, float]:
        """Load and warm up; returns seconds by phase ("load", "compile"). An engine that is up stays as it is.

        Raises EngineError with one line that says why it could not start.
        """
        ...

    async def ask(self, prompt: Prompt, sampling: Sampling) -> Completion:
        """Answer one prompt; any number may be under way at once.

        Raises RowError when this prompt can't be answered and EngineError when the engine died.
        """
        ...

    async def close(self) -> None:
        """Free the devices. Safe to call twice."""
        ...
