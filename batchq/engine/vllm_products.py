"""FP8 products on a GPU by cuBLAS, with a scale per token and per channel, where vLLM takes CUTLASS.

Importing this module changes vLLM: its worker imports `Extension` before it loads the model, and offers no other moment
for that. `linear_backend=torch` has vLLM choose the kernel that is changed here. As vLLM has it, that kernel multiplies
in FP32 and scales afterwards, since older versions of torch had to, and gains nothing (1.004 of CUTLASS). One H100, 8B
shape, 16,384 tokens: products at 1,315 instead of 1,103 TFLOP/s, and an engine that scores labels 1.155 times as fast
(2026-11-25, benchmarks/levers.py, "rowwise"); one H200: 1.048 (2026-11-30, benchmarks/peers.py), with the same answers.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

from batchq.engine import vllm_process

KERNELS = "vllm.model_executor.kernels.linear.scaled_mm.pytorch"


class Extension(vllm_process.Extension):
    """What vLLM's worker class is given where its products are changed."""


def _change() -> None:
    import torch

    kernel: Any = importlib.import_module(KERNELS).ChannelWiseTorchFP8ScaledMMLinearKernel
    before = kernel.apply_scaled_mm

    def apply_scaled_mm(
        self: Any, *, A: Any, B: Any, out_dtype: Any, As: Any, Bs: Any, bias: Any, output_shape: Any
    ) -> Any:
        # torch does so in BF16 alone; vLLM chooses this kernel for weights with one scale too
        if out_dtype is not torch.bfloat16 or Bs.numel() != B.shape[1]:
            return before(self, A=A, B=B, out_dtype=out_dtype, As=As, Bs=Bs, bias=bias, output_shape=output_shape)
        product = torch._scaled_mm(A, B, As, Bs.reshape(1, -1), bias=bias, out_dtype=out_dtype, use_fast_accum=True)
        # without torch.compile vLLM pads A to 17 tokens at least
        return product.narrow(0, 0, math.prod(output_shape[:-1])).view(*output_shape)

    kernel.apply_scaled_mm = apply_scaled_mm


_change()
