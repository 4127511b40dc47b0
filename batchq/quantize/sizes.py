"""Bytes of a model under a scheme, as compressed-tensors stores it; from headers, before anything is made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from batchq.config import IGNORE, Scheme
from batchq.model.scheme import group_size
from batchq.model.tensors import Shape, Tensor, is_quantized, multiplied

BLOCK_SIDE = 128  # of FP8's blocks


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a model's matrices are stored. `ignore` as llm-compressor takes it: names of layers left as they are, or
    "re:" and a pattern; `group`: columns that share a scale, None for whole rows."""

    scheme: Scheme
    ignore: tuple[str, ...] = tuple(IGNORE)
    group: int | None = None

    @classmethod
    def of(
        cls, scheme: Scheme, tensors: Iterable[Tensor], ignore: Iterable[str] = IGNORE, wanted: int | None = None
    ) -> Quantization:
        """With the group size that suits this model; see scheme.group_size. Raises ConfigError if `wanted` doesn't."""
        ignore = tuple(ignore)
        widths = (t.shape[-1] for t in tensors if is_quantized(t, ignore))
        return cls(scheme, ignore, group_size(scheme, widths, wanted))


def predicted_bytes(tensors: Iterable[Tensor], how: Quantization, *, tied: bool = False) -> int:
    """Stored bytes after quantizing: weights, scales, zero points and shapes of the matrices that are quantized, the
    rest as it is. `tied`: the head shares the embedding's table, and a stored copy of it is dropped."""
    total = 0
    for tensor in tensors:
        if tied and tensor.name.endswith("lm_head.weight"):
            continue
        total += _compressed(tensor, how.scheme, how.group) if is_quantized(tensor, how.ignore) else tensor.bytes
    return total


def linear_bytes(shape: Shape, how: Quantization) -> int:
    """Bytes of the weights that one token is multiplied with, as they are served; what is stored in 32 bits is served
    in 16."""
    total = 0.0
    for tensor, share in multiplied(shape):
        total += share * min(predicted_bytes((tensor,), how), 2 * tensor.elements)
    return round(total)


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
        case Scheme.w4a16_awq:  # asymmetric: four bits of zero point for each scale
            return tensor.elements // 2 + 2 * scales + scales // 2 + 16
        case Scheme.nvfp4:  # a one-byte scale for each group, and two four-byte scales for the matrix
            return tensor.elements // 2 + scales + 8
        case _:
            return tensor.elements // 2 + 2 * scales + 16
