"""Bytes that serving a model takes on each device, and how many devices hold it. No torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from batchq.machine.hardware import Hardware
from batchq.model import kv_cache
from batchq.model.folder import first_of, is_tied, text_config
from batchq.model.tensors import TOWER, Shape, Tensor
from batchq.quantize.sizes import Quantization, predicted_bytes

OVERHEAD = {"cpu": 2 << 30, "cuda": 2 << 30}  # libraries, activations, CUDA context and graphs, beside weights and KV

KV_SHARE = 0.5  # of the memory that is left on a CPU; the rest is for reading, writing and the page cache

GPU_SHARE = 0.9  # what vLLM takes of a GPU unless told otherwise

LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")


@dataclass(frozen=True, slots=True)
class Memory:
    """What serving needs on one device, in bytes; `kv` is for one sequence of the full length."""

    weights: int
    kv: int
    overhead: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.overhead


@dataclass(frozen=True, slots=True)
class Parallelism:
    """One engine over several GPUs: ways of tensor and of pipeline parallelism, and bytes on the fullest GPU."""

    tensor: int
    pipeline: int
    weights: int
    kv_bytes: int  # left for the KV cache, on all its GPUs together

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline


def usable_bytes(hardware: Hardware, replicas: int = 1) -> int:
    """Bytes that one device of a replica can hold, where `replicas` of them share a node."""
    if hardware.gpus:
        return int(GPU_SHARE * min(gpu.memory for gpu in hardware.gpus))
    return hardware.memory // replicas


def memory_needed(
    shape: Shape, how: Quantization, *, max_model_len: int, device: str, tensor: int = 1, pipeline: int = 1
) -> Memory:
    """The least that the fullest device needs: its share of the weights, of one sequence's KV cache, and the engine.

    `device`: "cpu" or "cuda"; `tensor`, `pipeline`: ways of parallelism.
    """
    weights = _stage_bytes(_parts(shape, how), pipeline)
    kv = kv_cache.sequence_bytes(shape.config, max_model_len) / pipeline
    return Memory(math.ceil(weights / tensor), math.ceil(kv / tensor), OVERHEAD[device])


def parallelism_for(
    shape: Shape, how: Quantization, gpu_memory: int, *, max_model_len: int, most: int = 64
) -> Parallelism | None:
    """The fewest GPUs of `gpu_memory` bytes that hold the model and one sequence, by tensor parallelism as far as the
    attention heads divide (at most 8, the GPUs of a node), then by pipeline stages of equally many layers; None above
    `most`.

    The first stage also holds the embedding and any towers, the last one the head.
    """
    text = text_config(shape.config)
    heads, layers = first_of(text, "num_attention_heads", "n_head"), first_of(text, "num_hidden_layers", "n_layer")
    kv_heads = text.get("num_key_value_heads") or heads
    size = _parts(shape, how)
    kv = kv_cache.sequence_bytes(shape.config, max_model_len)
    have = int(GPU_SHARE * gpu_memory) - OVERHEAD["cuda"]
    for gpus in range(1, most + 1):
        for ways in (8, 4, 2, 1):
            pipeline = gpus // ways
            if gpus % ways or heads % ways or kv_heads % ways or layers % pipeline:
                continue
            weights = math.ceil(_stage_bytes(size, pipeline) / ways)
            if weights + math.ceil(kv / gpus) <= have:
                return Parallelism(ways, pipeline, weights, (have - weights) * gpus)
    return None


def kv_cache_bytes(
    config: dict[str, Any],
    hardware: Hardware,
    *,
    weights: int,
    max_model_len: int,
    max_num_seqs: int,
    replicas: int = 1,
) -> int:
    """Bytes to hand vLLM as kv_cache_memory_bytes on a CPU, for each of the replicas that share a node.

    Enough for max_num_seqs sequences of the full length, but no more than KV_SHARE of what the weights leave, and
    never less than one sequence (`require_memory` has made sure of that).
    """
    one = kv_cache.sequence_bytes(config, max_model_len)
    left = int(KV_SHARE * (hardware.memory / replicas - weights - OVERHEAD["cpu"]))
    return max(one, min(one * max_num_seqs, left))


def _parts(shape: Shape, how: Quantization) -> dict[str, int]:
    """Bytes under the scheme of the layers, of the head, and of the rest: the embedding and any towers."""
    parts: dict[str, list[Tensor]] = {"layers": [], "head": [], "rest": []}
    for tensor in shape.tensors:
        inside = LAYER.search(tensor.name) and not TOWER.search(tensor.name)
        parts["layers" if inside else "head" if "lm_head" in tensor.name else "rest"].append(tensor)
    tied = is_tied(shape.config)
    return {k: predicted_bytes(v, how, tied=tied) for k, v in parts.items()}


def _stage_bytes(size: dict[str, int], pipeline: int) -> float:
    """Bytes of the fullest of so many stages of equally many layers; the first has the embedding, the last the head."""
    ends = size["rest"] + size["head"] if pipeline == 1 else max(size["rest"], size["head"])
    return size["layers"] / pipeline + ends
