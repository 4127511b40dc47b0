"""SiLU, the product with it, and FP8 with a scale a token: one Triton kernel that holds a token's row in registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

MOST = tl.constexpr(448.0)  # of FP8
LEAST = tl.constexpr(1.0 / (448.0 * 512.0))  # of a scale, as in vLLM


@triton.autotune([triton.Config({}, num_warps=warps) for warps in (8, 16, 32)], key=["COLUMNS"])  # type: ignore[untyped-decorator]
@triton.jit  # type: ignore[untyped-decorator]
def _silu_quantized(x, quantized, scales, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < COLUMNS
    begin = x + row * 2 * COLUMNS
    gate = tl.load(begin + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(begin + COLUMNS + at, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    scale = tl.maximum(tl.max(tl.abs(value), 0) / MOST, LEAST)
    tl.store(scales + row, scale)
    scaled = tl.minimum(tl.maximum(value / scale, -MOST), MOST)
    tl.store(quantized + row * COLUMNS + at, scaled.to(tl.float8e4nv), mask=inside)


def silu_quantized(x: Any) -> tuple[Any, Any]:
    """`x`: tokens x 2 columns, contiguous; the quantized product and the tokens' scales."""
    rows, columns = x.shape[0], x.shape[1] // 2
    quantized = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    _silu_quantized[(rows,)](x, quantized, scales, COLUMNS=columns, BLOCK=triton.next_power_of_2(columns))
    return quantized, scales
