"""vllm_products: the products that vLLM is given instead of its own are the same products."""

from __future__ import annotations

from typing import Any

import pytest

from batchq.engine.protocol import EngineSpec

TOKENS, COLUMNS, ROWS = 5, 32, 48  # of the activations and of the weight


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padded", [0, 12])
@pytest.mark.parametrize(("kind", "scaled"), [("bfloat16", True), ("float16", True), ("bfloat16", False)])
def test_a_product_is_that_of_the_unscaled_numbers(kind: str, scaled: bool, padded: int, bias: bool) -> None:
    """With a scale per token and channel in BF16, which cuBLAS takes, and where vLLM's own code goes on."""
    import torch
    from vllm.model_executor.kernels.linear.scaled_mm import pytorch

    from batchq.engine import vllm_products  # noqa: F401  (changes vLLM)

    random = torch.Generator().manual_seed(7)
    x, weight, added = (torch.randn(*size, generator=random) for size in ((TOKENS, COLUMNS), (ROWS, COLUMNS), (ROWS,)))
    each: dict[str, Any] = {"dim": 1, "keepdim": True}
    of_tokens = x.abs().amax(**each) / 448
    of_channels = (weight.abs().amax(**each) if scaled else weight.abs().amax().reshape(1, 1)) / 448
    a, b = ((numbers / scale).to(torch.float8_e4m3fn) for numbers, scale in ((x, of_tokens), (weight, of_channels)))
    wanted = (a.float() * of_tokens) @ (b.float() * of_channels).t() + (added if bias else 0.0)

    as_vllm_has_it = torch.cat([a.float(), torch.zeros(padded, COLUMNS)]).to(a.dtype)
    scales = torch.cat([of_tokens, torch.ones(padded, 1)])
    given: dict[str, Any] = {"A": as_vllm_has_it, "B": b.t(), "As": scales, "Bs": of_channels}
    kernel: Any = object.__new__(pytorch.ChannelWiseTorchFP8ScaledMMLinearKernel)
    out = getattr(torch, kind)
    found = kernel.apply_scaled_mm(
        **given, out_dtype=out, bias=added.to(out) if bias else None, output_shape=[1, TOKENS, ROWS]
    )
    assert found.shape == (1, TOKENS, ROWS) and found.dtype is out
    assert torch.allclose(found[0].float(), wanted, rtol=0.01, atol=0.02)


@pytest.mark.parametrize(
    ("device", "backend", "changed"), [("cuda", "torch", True), ("cuda", "auto", False), ("cpu", "torch", False)]
)
def test_vllm_is_changed_only_where_its_torch_products_are_chosen(device: str, backend: str, changed: bool) -> None:
    from vllm import AsyncEngineArgs

    from batchq.engine.vllm import engine_arguments

    spec = EngineSpec("vllm", "m", 8, 8, 1, device=device, options={"linear_backend": backend})
    arguments = engine_arguments(spec, AsyncEngineArgs)
    module = arguments["worker_extension_cls"].rpartition(".")[0]
    assert module == ("batchq.engine.vllm_products" if changed else "batchq.engine.vllm_process")
    assert ("additional_config" in arguments) == changed  # another key of vLLM's compile cache
