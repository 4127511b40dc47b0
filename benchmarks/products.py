"""The matrix products of a layer alone: each kernel that can do them, at the numbers of tokens that a step may have.

    python benchmarks/products.py                                   # Llama 3.1 8B's four, on the first GPU
    python benchmarks/products.py --kernels cutlass,rowwise --steps 16384,16896 --seconds 3

Random numbers; the four products of a layer one after another, again and again for `--seconds`, so that the card is as
warm and as short of power as in a long run, and each of the four by itself for a quarter of that. TFLOP/s, without what
quantizes the activations; the scales are applied. "of peak" is of FP8's at full clocks for all kernels but bf16.

| kernel | what multiplies |
| --- | --- |
| cutlass | vLLM's CUTLASS kernel, a scale a token and a channel: what FP8 by batchq runs on |
| rowwise | the same by torch._scaled_mm, which is cuBLAS |
| tensor, tensor-exact | torch._scaled_mm with one scale a tensor, with fast accumulation and without |
| tensor-cutlass | vLLM's CUTLASS kernel with one scale a tensor |
| block | DeepGEMM, a scale a block of 128 x 128 and 128 columns of a token |
| int8 | vLLM's CUTLASS kernel in INT8 |
| bf16 | torch.mm |
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))

from batchq.config import Scheme  # noqa: E402
from batchq.machine import hardware  # noqa: E402
from batchq.sizing.peaks import peak  # noqa: E402
from benchmarks import gpu  # noqa: E402
from benchmarks.clock import say  # noqa: E402
from benchmarks.process import versions  # noqa: E402

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}  # rows, columns
Product = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--steps", default="8192,16384,16896,33792", help="tokens")
    parser.add_argument("--seconds", type=float, default=1.2)
    args = parser.parse_args()
    here = hardware.detect()
    peaks = {scheme: peak(here.accelerator, scheme) for scheme in (Scheme.fp8, Scheme.none)}
    say(f"{here.accelerator}; {versions()}; TFLOP/s of {', '.join(SHAPES)}, and of all four by turns")
    print(f"{'kernel':<16}{'tokens':>7}" + "".join(f"{name:>9}" for name in SHAPES) + "      all  of peak    W   MHz")
    for name in args.kernels.split(","):
        for tokens in map(int, args.steps.split(",")):
            try:
                line = measure(name, tokens, args.seconds, peaks[Scheme.none if name == "bf16" else Scheme.fp8])
            except Exception as error:  # a kernel that this card or this torch hasn't
                line = f"can't run: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            print(f"{name:<16}{tokens:>7}{line}", flush=True)


def measure(name: str, tokens: int, seconds: float, peak: float | None) -> str:
    products = {shape: KERNELS[name](tokens, *sides) for shape, sides in SHAPES.items()}
    flop = {shape: 2.0 * tokens * rows * columns for shape, (rows, columns) in SHAPES.items()}
    repeat(list(products.values()), 0.1)
    alone = [flop[shape] / repeat([product], seconds / 4) / 1e12 for shape, product in products.items()]
    watch = gpu.Watch()
    time.sleep(0.15)
    begin = time.time()
    every = sum(flop.values()) / repeat(list(products.values()), seconds)
    end = time.time()
    time.sleep(0.15)
    watch.close()
    watts = (watch.joules(begin, end) or 0.0) / (end - begin)
    share = f"{every / peak:>8.1%}" if peak else f"{'-':>8}"
    found = "".join(f"{rate:>9,.0f}" for rate in [*alone, every / 1e12])
    return f"{found} {share} {watts:>5.0f} {watch.mhz(begin, end) or 0.0:>5,.0f}"


def repeat(products: list[Product], seconds: float) -> float:
    """Seconds of one round of them, of rounds that go on for so long."""
    import torch

    torch.cuda.synchronize()
    began, rounds = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        for _ in range(4):
            for product in products:
                product()
        rounds += 4
        torch.cuda.synchronize()
    return spent / rounds


# ---- kernels: given tokens, rows and columns of the weights ----


def fp8(rows: int, columns: int) -> Any:
    import torch

    return (
        torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        .mul_(64)
        .clamp_(-448, 448)
        .to(torch.float8_e4m3fn)
    )


def ones(*shape: int) -> Any:
    import torch

    return torch.full(shape, 1e-3, device="cuda")


def cutlass(tokens: int, rows: int, columns: int) -> Product:
    import torch
    from vllm import _custom_ops as ops

    a, b = fp8(tokens, columns), fp8(rows, columns).t()
    scale_a, scale_b = ones(tokens, 1), ones(rows, 1)
    return lambda: ops.cutlass_scaled_mm(a, b, scale_a, scale_b, torch.bfloat16)


def tensor_cutlass(tokens: int, rows: int, columns: int) -> Product:
    import torch
    from vllm import _custom_ops as ops

    a, b, scale = fp8(tokens, columns), fp8(rows, columns).t(), ones(1)
    return lambda: ops.cutlass_scaled_mm(a, b, scale, scale, torch.bfloat16)


def rowwise(tokens: int, rows: int, columns: int) -> Product:
    import torch

    a, b = fp8(tokens, columns), fp8(rows, columns).t()
    scale_a, scale_b = ones(tokens, 1), ones(1, rows)
    return lambda: torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)


def tensor(tokens: int, rows: int, columns: int) -> Product:
    import torch

    a, b, scale = fp8(tokens, columns), fp8(rows, columns).t(), ones(1)
    return lambda: torch._scaled_mm(a, b, scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True)


def tensor_exact(tokens: int, rows: int, columns: int) -> Product:
    import torch

    a, b, scale = fp8(tokens, columns), fp8(rows, columns).t(), ones(1)
    return lambda: torch._scaled_mm(a, b, scale, scale, out_dtype=torch.bfloat16, use_fast_accum=False)


def block(tokens: int, rows: int, columns: int) -> Product:
    import torch
    from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8
    from vllm.utils import deep_gemm

    multiply: Any = deep_gemm.fp8_gemm_nt
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    a, scale_a = per_token_group_quant_fp8(x, 128, column_major_scales=True, tma_aligned_scales=True, use_ue8m0=False)
    b, scale_b = fp8(rows, columns), ones(rows // 128, columns // 128)
    out = torch.empty(tokens, rows, device="cuda", dtype=torch.bfloat16)
    return lambda: multiply((a, scale_a), (b, scale_b), out, is_deep_gemm_e8m0_used=False)


def int8(tokens: int, rows: int, columns: int) -> Product:
    import torch
    from vllm import _custom_ops as ops

    def drawn(*shape: int) -> Any:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(32).clamp_(-127, 127).to(torch.int8)

    a, b = drawn(tokens, columns), drawn(rows, columns).t()
    scale_a, scale_b = ones(tokens, 1), ones(rows, 1)
    return lambda: ops.cutlass_scaled_mm(a, b, scale_a, scale_b, torch.bfloat16)


def bf16(tokens: int, rows: int, columns: int) -> Product:
    import torch

    a = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).t()
    return lambda: torch.mm(a, b)


KERNELS: dict[str, Callable[[int, int, int], Product]] = {
    "cutlass": cutlass,
    "rowwise": rowwise,
    "tensor": tensor,
    "tensor-exact": tensor_exact,
    "tensor-cutlass": tensor_cutlass,
    "block": block,
    "int8": int8,
    "bf16": bf16,
}


if __name__ == "__main__":
    main()
