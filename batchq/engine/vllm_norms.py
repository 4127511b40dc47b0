"""vLLM's norms on a CPU, by its own kernel, which vLLM itself uses on GPUs only."""

from __future__ import annotations

from typing import Any


def register() -> dict[str, list[str]]:
    """Have vLLM compute norms on a CPU by its own kernel, else used on GPUs only; returns the engine argument for that.

    By torch, operation by operation, they were an eighth of INT8's time: 5.2 ms for 2,048 tokens of 576 numbers where
    the kernel takes 0.14. Not where torch compiles the model, which fuses them itself.
    """
    import torch
    from vllm import ir
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    kernels: Any = torch.ops._C
    norm: Any = ir.ops.rms_norm
    added: Any = ir.ops.fused_add_rms_norm
    if not hasattr(kernels, "rms_norm") or not hasattr(kernels, "fused_add_rms_norm"):
        return {}

    def plain(x: Any, weight: Any, variance_size: int | None) -> bool:
        return variance_size is None and weight is not None and weight.dtype == x.dtype and bool(x.is_contiguous())

    def takes(x: Any, weight: Any, epsilon: float, variance_size: int | None = None) -> bool:
        return plain(x, weight, variance_size)

    def takes_both(x: Any, x_residual: Any, weight: Any, epsilon: float, variance_size: int | None = None) -> bool:
        return plain(x, weight, variance_size) and bool(x_residual.is_contiguous())

    def rms_norm(x: Any, weight: Any, epsilon: float, variance_size: int | None = None) -> Any:
        out = torch.empty_like(x)
        kernels.rms_norm(out, x, weight, epsilon)
        return out

    def fused_add_rms_norm(
        x: Any, x_residual: Any, weight: Any, epsilon: float, variance_size: int | None = None
    ) -> Any:
        kernels.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual

    if "batchq" not in norm.impls:
        for op, ours in ((norm, rms_norm), (added, fused_add_rms_norm)):  # vLLM wants its own signature, types and all
            ours.__annotations__ = dict(op.impls["native"].impl_fn.__annotations__)
        norm.register_impl("batchq", supports_args=takes)(rms_norm)
        added.register_impl("batchq", supports_args=takes_both, inplace=True)(fused_add_rms_norm)
    return {"rms_norm": ["batchq", "native"], "fused_add_rms_norm": ["batchq", "native"]}
