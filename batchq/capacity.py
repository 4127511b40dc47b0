"""Model shape x scheme x hardware -> bytes, and which scheme serves best. Reads headers only; no torch.

A model is a tuple of `Tensor`: read from a checkpoint's safetensors headers here; anything else that knows names,
dtypes and shapes will do as well.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchq.config import Scheme
from batchq.errors import ConfigError, ModelError
from batchq.hardware import Hardware
from batchq.models import Model, read_config, weight_files

GIB = 1 << 30
BLOCK = 128  # tokens a KV block holds on vLLM's CPU backend, its largest; a sequence takes whole blocks
OVERHEAD = {"cpu": 2 * GIB, "cuda": 2 * GIB}  # libraries, activations, CUDA context and graphs, beside weights and KV
KV_SHARE = 0.5  # of the memory that is left on a CPU; the rest is for reading, writing and the page cache
GPU_SHARE = 0.9  # what vLLM takes of a GPU unless told otherwise
INT8_FLAGS = frozenset({"avx512_vnni", "amx_int8"})  # without these, INT8 on a CPU is slower than BF16
FP8_SINCE = (8, 9)  # compute capability: Ada, Hopper and later
INT8_UNTIL = (10, 0)  # vLLM's INT8 matrix kernels stop before Blackwell
BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# Kept as they are whatever the scheme: not Linear layers, or Linear layers that llm-compressor is told to leave.
KEPT = re.compile(r"(^|\.)(embed\w*|wte|wpe|\w*embeddings?|\w*norm\w*|ln_\w+)\.")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor; dtype in safetensors' words (BF16, I8, F8_E4M3...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Memory:
    """What serving needs on one device, in bytes; `kv` is for one sequence of the full length."""

    weights: int
    kv: int
    overhead: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.overhead


# ---- what is stored ----


def read_tensors(folder: str | Path) -> tuple[Tensor, ...]:
    """All tensors of a checkpoint, from the headers of its safetensors files.

    Raises ModelError for a file that is cut short or isn't safetensors.
    """
    found: list[Tensor] = []
    for path in weight_files(folder):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > path.stat().st_size:
                    raise ValueError("header longer than the file")
                header = json.loads(file.read(length))
                end = (
                    8
                    + length
                    + max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
                )
        except (struct.error, ValueError, KeyError) as error:
            raise ModelError(f"{path}: not a safetensors file") from error
        if end != path.stat().st_size:
            raise ModelError(
                f"{path}: {path.stat().st_size} bytes where its header says {end}: a copy that was cut short"
            )
        found += [Tensor(k, v["dtype"], tuple(v["shape"])) for k, v in header.items() if k != "__metadata__"]
    return tuple(found)


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors as they are stored, headers aside."""
    return sum(tensor.bytes for tensor in tensors)


def parameters(tensors: Iterable[Tensor]) -> int:
    """Weights and biases, scales and zero points aside."""
    return sum(t.elements for t in tensors if not t.name.endswith(("_scale", "_zero_point", "_shape", "_g_idx")))


def predicted_bytes(
    tensors: Iterable[Tensor], scheme: Scheme, *, tied: bool = False, ignore: Iterable[str] = ("lm_head",)
) -> int:
    """Stored bytes after quantizing: a byte a weight and a 16-bit scale a row for Linear layers, the rest as it is.

    `tied`: the head shares the embedding's table, and a stored copy of it is dropped. `ignore` as llm-compressor
    takes it: names of layers, or "re:" and a pattern.
    """
    ignore = tuple(ignore)
    total = 0
    for tensor in tensors:
        if tied and tensor.name.endswith("lm_head.weight"):
            continue
        if scheme in (Scheme.int8, Scheme.fp8) and is_quantized(tensor, ignore):
            rows = tensor.elements // tensor.shape[-1]
            total += tensor.elements + 2 * rows
        else:
            total += tensor.bytes
    return total


def is_quantized(tensor: Tensor, ignore: Iterable[str] = ("lm_head",)) -> bool:
    """Whether llm-compressor would quantize it: the matrix of a Linear layer, or a stack of experts' matrices."""
    layer = tensor.name.removesuffix(".weight")
    matrix = len(tensor.shape) == 2 and layer != tensor.name
    experts = len(tensor.shape) == 3 and ".experts." in layer
    if not (matrix or experts) or KEPT.search(tensor.name) or BITS[tensor.dtype] < 16:
        return False
    return not any(re.match(name[3:], layer) if name.startswith("re:") else name == layer for name in ignore)


# ---- the key-value cache ----


def kv_bytes_per_token(config: dict[str, Any], element_bytes: int = 2) -> int:
    """Bytes that one token's keys and values take in all attention layers, from a model's config.json.

    An upper bound for models with sliding windows. Raises ModelError when the shape isn't there.
    """
    text = {**config, **(config.get("text_config") or {})}
    layers = _first(text, "num_hidden_layers", "n_layer", "num_layers")
    heads = _first(text, "num_attention_heads", "n_head", "num_heads")
    if kinds := text.get("layer_types"):
        layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    if rank := text.get("kv_lora_rank"):  # multi-head latent attention keeps one compressed vector instead
        return int(layers * (rank + text.get("qk_rope_head_dim", 0)) * element_bytes)
    kv_heads = text.get("num_key_value_heads") or (1 if text.get("multi_query") else heads)
    head_dim = text.get("head_dim") or _first(text, "hidden_size", "n_embd", "d_model") // heads
    return int(2 * layers * kv_heads * head_dim * element_bytes)


def kv_sequence_bytes(config: dict[str, Any], max_model_len: int) -> int:
    """Bytes of one sequence of the full length, in whole blocks, and one block that vLLM keeps for itself."""
    return kv_bytes_per_token(config) * (math.ceil(max_model_len / BLOCK) + 1) * BLOCK


def kv_cache_bytes(
    config: dict[str, Any],
    hardware: Hardware,
    *,
    weights: int,
    max_model_len: int,
    max_num_seqs: int,
    replicas: int = 1,
) -> int:
    """Bytes to hand vLLM as kv_cache_memory_bytes on a CPU, for each replica.

    Enough for max_num_seqs sequences of the full length, but no more than KV_SHARE of what the weights leave, and
    never less than one sequence (`require_memory` has made sure of that).
    """
    one = kv_sequence_bytes(config, max_model_len)
    room = int(KV_SHARE * (hardware.memory / replicas - weights - OVERHEAD["cpu"]))
    return max(one, min(one * max_num_seqs, room))


# ---- does it fit, and how is it best served ----


def memory_needed(
    tensors: Iterable[Tensor],
    config: dict[str, Any],
    scheme: Scheme,
    *,
    max_model_len: int,
    device: str,
    tensor_parallel_size: int = 1,
    ignore: Iterable[str] = ("lm_head",),
) -> Memory:
    """The least that one device needs: its share of the weights, one sequence's KV cache, and the engine itself."""
    weights = predicted_bytes(tensors, scheme, tied=is_tied(config), ignore=ignore)
    kv = kv_sequence_bytes(config, max_model_len)
    share = tensor_parallel_size
    return Memory(math.ceil(weights / share), math.ceil(kv / share), OVERHEAD[device])


def require_memory(
    tensors: Iterable[Tensor],
    config: dict[str, Any],
    scheme: Scheme,
    hardware: Hardware,
    *,
    max_model_len: int,
    replicas: int = 1,
    tensor_parallel_size: int = 1,
    ignore: Iterable[str] = ("lm_head",),
) -> Memory:
    """What `memory_needed` says. Raises ConfigError with the numbers when this machine hasn't that much."""
    need = memory_needed(
        tensors,
        config,
        scheme,
        max_model_len=max_model_len,
        device=hardware.device,
        tensor_parallel_size=tensor_parallel_size,
        ignore=ignore,
    )
    if hardware.gpus:
        have = int(GPU_SHARE * min(gpu.memory for gpu in hardware.gpus))
        where, ways = f"a {hardware.accelerator}", "a smaller model, a higher cluster.tensor_parallel_size"
    else:
        have = hardware.memory // replicas
        where = "each replica's share of this machine's free memory" if replicas > 1 else "this machine's free memory"
        ways = "a smaller model" + (", fewer cluster.replicas" if replicas > 1 else "")
    if need.total > have:
        raise ConfigError(
            f"too little memory: {gib(need.total)} needed (weights {gib(need.weights)} under {scheme.value}, KV cache "
            f"{gib(need.kv)} for one row of engine.max_model_len={max_model_len}, engine {gib(need.overhead)}), "
            f"{gib(have)} in {where}; choose {ways}, or a lower engine.max_model_len"
        )
    return need


def choose(scheme: Scheme, hardware: Hardware, model: Model) -> tuple[Scheme, str]:
    """The scheme to quantize to, never `auto`, and one sentence that says why.

    Raises ConfigError for a scheme, or a model's own quantization, that vLLM can't serve on this hardware.
    """
    if model.quantized:
        _require_served(model.quantized.rpartition(" ")[2], f"{model.name} is stored in", hardware, stored=True)
        return Scheme.none, f"{model.name} is already quantized ({model.quantized}) and is used as it is"
    _require_served(scheme.value, "quantization.scheme =", hardware)
    if scheme is not Scheme.auto:
        return scheme, f"{scheme.value}, as asked"
    if not hardware.gpus:
        if fast := sorted(INT8_FLAGS & hardware.flags):
            return Scheme.int8, f"no GPU here, and this CPU computes in INT8 ({', '.join(fast)})"
        return Scheme.none, "no GPU here, and this CPU has no INT8 instructions (avx512_vnni, amx_int8)"
    capability, name = hardware.capability or (0, 0), _named(hardware)
    if capability >= FP8_SINCE:
        return Scheme.fp8, f"{name} computes in FP8, which needs no calibration"
    if capability >= (8, 0):
        return Scheme.int8, f"{name} computes in INT8 but not in FP8"
    return Scheme.none, f"{name} gains nothing from FP8 or INT8"


def _require_served(kind: str, what: str, hardware: Hardware, stored: bool = False) -> None:
    """Raise ConfigError if vLLM can't compute in `kind` here. A stored FP8 model runs on older GPUs as weights only."""
    capability = hardware.capability
    if kind == "fp8" and capability is None:
        raise ConfigError(f"{what} fp8: vLLM doesn't serve FP8 on a CPU; choose int8, none or auto")
    if kind == "fp8" and capability and capability < FP8_SINCE and not stored:
        raise ConfigError(f"{what} fp8: {_named(hardware)} has no FP8, it takes 8.9; choose int8, none or auto")
    if kind == "int8" and capability and capability >= INT8_UNTIL:
        raise ConfigError(f"{what} int8: vLLM has no INT8 kernel for {_named(hardware)}; choose fp8, none or auto")


def _named(hardware: Hardware) -> str:
    major, minor = hardware.capability or (0, 0)
    return f"{hardware.accelerator} (compute capability {major}.{minor})"


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the output head is the embedding's own table."""
    return bool((config.get("text_config") or {}).get("tie_word_embeddings", config.get("tie_word_embeddings", False)))


def shape_of(model: Model) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """A model's tensors and its config.json."""
    return read_tensors(model.path), read_config(model.path)


def gib(size: int) -> str:
    """Bytes in words: "1.3 GiB"."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.0f} MiB"


def _first(config: dict[str, Any], *names: str) -> int:
    for name in names:
        if config.get(name):
            return int(config[name])
    raise ModelError(f"config.json has none of {', '.join(names)}")
