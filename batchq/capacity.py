"""Model shape x scheme x hardware -> bytes, and the engine that is started on them. Reads headers only; no torch.

A model is a tuple of `Tensor`: read from a checkpoint's safetensors headers here; anything else that knows names,
dtypes and shapes will do as well.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchq.config import IGNORE, Config, EngineKind, KvCache, Scheme
from batchq.engine.protocol import EngineSpec
from batchq.errors import ModelError
from batchq.hardware import Hardware
from batchq.models import Model, read_config, weight_files
from batchq.scheme import group_size
from batchq.task import answers

GIB = 1 << 30
BLOCK_SIDE = 128  # of FP8's blocks
BLOCK = 128  # tokens a KV block holds on vLLM's CPU backend, its largest; a sequence takes whole blocks
OVERHEAD = {"cpu": 2 * GIB, "cuda": 2 * GIB}  # libraries, activations, CUDA context and graphs, beside weights and KV
KV_SHARE = 0.5  # of the memory that is left on a CPU; the rest is for reading, writing and the page cache
GPU_SHARE = 0.9  # what vLLM takes of a GPU unless told otherwise
LARGE_GPU = 64 * GIB  # on smaller ones a step's activations compete with the weights
STEP_TOKENS = {"cpu": 2048, "cuda": 16384}  # a CPU is busy with one row's prefill; a GPU wants many rows a step
SEQUENCES = {"cpu": 64, "cuda": 1024}
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
    tensors: Iterable[Tensor],
    scheme: Scheme,
    *,
    tied: bool = False,
    ignore: Iterable[str] = IGNORE,
    group: int | None = None,
) -> int:
    """Stored bytes after quantizing, as compressed-tensors stores them: weights, scales, zero points and shapes of the
    matrices that are quantized, the rest as it is.

    `tied`: the head shares the embedding's table, and a stored copy of it is dropped. `ignore` as llm-compressor
    takes it: names of layers, or "re:" and a pattern. `group`: columns that share a scale.
    """
    ignore, total = tuple(ignore), 0
    for tensor in tensors:
        if tied and tensor.name.endswith("lm_head.weight"):
            continue
        total += _compressed(tensor, scheme, group) if is_quantized(tensor, ignore) else tensor.bytes
    return total


def _compressed(tensor: Tensor, scheme: Scheme, group: int | None) -> int:
    columns = tensor.shape[-1]
    rows = tensor.elements // columns
    scales = rows * (columns // group if group else 1)
    match scheme:
        case Scheme.none | Scheme.sparse24:
            return tensor.bytes
        case Scheme.int8 | Scheme.int8_rtn | Scheme.fp8 | Scheme.fp8_gptq:
            return tensor.elements + 2 * rows
        case Scheme.fp8_block:
            return tensor.elements + 2 * math.ceil(rows / BLOCK_SIDE) * math.ceil(columns / BLOCK_SIDE)
        case Scheme.w8a16:
            return tensor.elements + 2 * rows + 16
        case Scheme.w4a16_awq:  # asymmetric: four bits of zero point a scale
            return tensor.elements // 2 + 2 * scales + scales // 2 + 16
        case Scheme.nvfp4:  # a one-byte scale a group, and two four-byte scales a matrix
            return tensor.elements // 2 + scales + 8
        case _:
            return tensor.elements // 2 + 2 * scales + 16


def group_of(scheme: Scheme, tensors: Iterable[Tensor], ignore: Iterable[str], wanted: int | None) -> int | None:
    """The scheme's group size for this model; see scheme.group_size."""
    ignore = tuple(ignore)
    return group_size(scheme, (t.shape[-1] for t in tensors if is_quantized(t, ignore)), wanted)


def matrices(tensors: Iterable[Tensor], ignore: Iterable[str]) -> list[tuple[str, int, int]]:
    """Name, rows and columns of each matrix that is quantized."""
    ignore = tuple(ignore)
    found = (t for t in tensors if is_quantized(t, ignore))
    return [(t.name.removesuffix(".weight"), t.shape[-2], t.shape[-1]) for t in found]


def is_quantized(tensor: Tensor, ignore: Iterable[str] = IGNORE) -> bool:
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


def kv_bytes_read(config: dict[str, Any], max_model_len: int, element_bytes: int = 2) -> int:
    """Bytes that decoding a token reads for sure for each one before it: none where attention may see only a window."""
    text = {**config, **(config.get("text_config") or {})}
    window = text.get("sliding_window") or text.get("attention_chunk_size") or max_model_len
    return 0 if window < max_model_len else kv_bytes_per_token(config, element_bytes)


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


def step_tokens(hardware: Hardware) -> int:
    """Tokens a step, unless told otherwise."""
    small = any(gpu.memory < LARGE_GPU for gpu in hardware.gpus)
    return STEP_TOKENS[hardware.device] // (2 if small else 1)


def engine_spec(config: Config, path: str, weights: int, here: Hardware) -> EngineSpec:
    """How to start an engine on a checkpoint of `weights` bytes: the configuration's limits, or the hardware's."""
    engine, cuda = config.engine, here.device == "cuda"
    tokens = engine.max_num_batched_tokens or step_tokens(here)
    sequences = engine.max_num_seqs or SEQUENCES[here.device]
    options: dict[str, Any] = {}
    if engine.kind is EngineKind.vllm and not cuda:
        options["kv_cache_memory_bytes"] = kv_cache_bytes(
            read_config(path),
            here,
            weights=weights,
            max_model_len=engine.max_model_len,
            max_num_seqs=sequences,
            replicas=config.cluster.replicas or 1,
        )
    if config.quantization.kv_cache is KvCache.fp8:
        options["kv_cache_dtype"] = "fp8"
    return EngineSpec(
        kind=engine.kind.value,
        model=path,
        max_model_len=engine.max_model_len,
        max_num_batched_tokens=max(tokens, engine.max_model_len) if not cuda else tokens,
        max_num_seqs=sequences,
        device=here.device,
        tensor_parallel_size=config.cluster.tensor_parallel_size,
        pipeline_parallel_size=config.cluster.pipeline_parallel_size,
        scored=answers.of(config.task).scored,
        options={**options, **engine.options},
        trust_remote_code=config.model.trust_remote_code,
    )


# ---- does it fit ----


def memory_needed(
    tensors: Iterable[Tensor],
    config: dict[str, Any],
    scheme: Scheme,
    *,
    max_model_len: int,
    device: str,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    ignore: Iterable[str] = IGNORE,
    group: int | None = None,
) -> Memory:
    """The least that the fullest device needs: its share of the weights, of one sequence's KV cache, and the engine."""
    size = _sizes(tensors, config, scheme, ignore, group)
    weights = _stage_bytes(size, pipeline_parallel_size)
    kv = kv_sequence_bytes(config, max_model_len) / pipeline_parallel_size
    share = tensor_parallel_size
    return Memory(math.ceil(weights / share), math.ceil(kv / share), OVERHEAD[device])


def room(hardware: Hardware, replicas: int = 1) -> int:
    """Bytes that one device of a replica can hold."""
    if hardware.gpus:
        return int(GPU_SHARE * min(gpu.memory for gpu in hardware.gpus))
    return hardware.memory // replicas


@dataclass(frozen=True, slots=True)
class Layout:
    """One engine over several GPUs: ways of tensor and of pipeline parallelism, and bytes on the fullest GPU."""

    tensor: int
    pipeline: int
    weights: int
    kv_room: int  # bytes left for the KV cache, on all its GPUs together

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline


LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")
TOWER = re.compile(r"vision|visual|audio|projector")


def layout(
    tensors: Sequence[Tensor],
    config: dict[str, Any],
    scheme: Scheme,
    gpu_memory: int,
    *,
    max_model_len: int,
    ignore: Iterable[str] = IGNORE,
    group: int | None = None,
    most: int = 64,
) -> Layout | None:
    """The fewest GPUs of `gpu_memory` bytes that hold the model and one sequence, by tensor parallelism as far as the
    attention heads divide (8 at most, a node), then by pipeline stages of equally many layers; None above `most`.

    The first stage also holds the embedding and any towers, the last one the head.
    """
    text = {**config, **(config.get("text_config") or {})}
    heads, layers = _first(text, "num_attention_heads", "n_head"), _first(text, "num_hidden_layers", "n_layer")
    kv_heads = text.get("num_key_value_heads") or heads
    size = _sizes(tensors, config, scheme, ignore, group)
    kv = kv_sequence_bytes(config, max_model_len)
    have = int(GPU_SHARE * gpu_memory) - OVERHEAD["cuda"]
    for gpus in range(1, most + 1):
        for ways in (8, 4, 2, 1):
            pipeline = gpus // ways
            if gpus % ways or heads % ways or kv_heads % ways or layers % pipeline:
                continue
            weights = math.ceil(_stage_bytes(size, pipeline) / ways)
            if weights + math.ceil(kv / gpus) <= have:
                return Layout(ways, pipeline, weights, (have - weights) * gpus)
    return None


def _sizes(
    tensors: Iterable[Tensor], config: dict[str, Any], scheme: Scheme, ignore: Iterable[str], group: int | None
) -> dict[str, int]:
    """Bytes under the scheme of the layers, of the head, and of the rest: the embedding and any towers."""
    parts: dict[str, list[Tensor]] = {"layers": [], "head": [], "rest": []}
    for tensor in tensors:
        inside = LAYER.search(tensor.name) and not TOWER.search(tensor.name)
        parts["layers" if inside else "head" if "lm_head" in tensor.name else "rest"].append(tensor)
    ignore, tied = tuple(ignore), is_tied(config)
    return {k: predicted_bytes(v, scheme, tied=tied, ignore=ignore, group=group) for k, v in parts.items()}


def _stage_bytes(size: dict[str, int], pipeline: int) -> float:
    """Bytes of the fullest of so many stages of equally many layers; the first has the embedding, the last the head."""
    ends = size["rest"] + size["head"] if pipeline == 1 else max(size["rest"], size["head"])
    return size["layers"] / pipeline + ends


def linear_parameters(tensors: Iterable[Tensor], config: dict[str, Any]) -> int:
    """Weights that one prompt token is multiplied with: of a mixture's experts those that a token is routed to. Without
    embeddings (looked up), the head (asked once a prompt) and towers."""
    return round(sum(share * tensor.elements for tensor, share in _multiplied(tensors, config)))


def linear_bytes(
    tensors: Iterable[Tensor], config: dict[str, Any], scheme: Scheme, ignore: Iterable[str], group: int | None
) -> int:
    """Bytes of the same weights as they are served under the scheme; what is stored in 32 bits is served in 16."""
    ignore, total = tuple(ignore), 0.0
    for tensor, share in _multiplied(tensors, config):
        stored = predicted_bytes((tensor,), scheme, ignore=ignore, group=group)
        total += share * min(stored, 2 * tensor.elements)
    return round(total)


def _multiplied(tensors: Iterable[Tensor], config: dict[str, Any]) -> Iterator[tuple[Tensor, float]]:
    """The matrices that a prompt token is multiplied with, and which share of each."""
    text = {**config, **(config.get("text_config") or {})}
    experts = text.get("num_local_experts") or text.get("num_experts") or text.get("n_routed_experts") or 1
    used = text.get("num_experts_per_tok") or 1
    for tensor in tensors:
        if is_quantized(tensor) and not TOWER.search(tensor.name):
            yield tensor, used / experts if ".experts." in tensor.name else 1


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
