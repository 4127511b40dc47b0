"""What benchmarks/engines.py has vLLM's own process do: fill in weights, profile itself, and try changes to vLLM.

vLLM mixes `Extension` into its worker's class, and imports this module before it loads the model. The changes are named
in the environment (BENCHMARK_CHANGES) and are part of no release of vLLM; batchq makes the first of them.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from typing import Any

from benchmarks.engines import CHANGES

WEIGHT = 0.02  # standard deviation of all matrices
SPREADS = {"float8_e4m3fn": (64.0, 448.0), "int8": (32.0, 127.0)}  # of stored numbers, and the largest
ACTIVATION_SCALE = 4.0 / 448.0  # of static activations: those behind a norm have a standard deviation of 1


class Extension:
    """What vLLM's worker is given besides its own methods."""

    model_runner: Any
    _profile: Any

    def benchmark_fill(self) -> str:
        """Random numbers of their type for all weights; returns how many of which.

        vLLM's own dummies lie between -0.001 and 0.001: nearly all of FP8 would be zeros, which take less power.
        """
        import torch

        filled: dict[str, int] = {}
        random = torch.Generator(next(self.model_runner.model.parameters()).device).manual_seed(7)
        model = self.model_runner.model
        with torch.no_grad():
            for norm in getattr(model, "benchmark_norm", ()):
                norm.weight.fill_(1.0)
            for name, parameter in model.named_parameters():
                how = _fill(name, parameter.data, random)
                filled[how] = filled.get(how, 0) + parameter.numel()
        return json.dumps(filled)

    def benchmark_profile(self) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        device = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
        self._profile = profile(activities=[device])
        self._profile.__enter__()

    def benchmark_profiled(self) -> str:
        """Since then: seconds and calls by kernel."""
        import torch

        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
        self._profile.__exit__(None, None, None)
        spent = "self_device_time_total" if cuda else "self_cpu_time_total"
        found = self._profile.key_averages()
        return json.dumps({event.key: (getattr(event, spent) / 1e6, event.count) for event in found})


def _fill(name: str, values: Any, random: Any) -> str:
    import torch

    kind = str(values.dtype).removeprefix("torch.")
    last = name.rpartition(".")[2]
    if last in ("weight_scale", "weight_scale_inv"):
        values.fill_(WEIGHT / SPREADS["float8_e4m3fn"][0])
        return "scales"
    if last == "input_scale":
        values.fill_(ACTIVATION_SCALE)
        return "scales"
    if values.dim() < 2:
        values.fill_(1.0)
        return "ones"
    if kind not in SPREADS:
        values.normal_(0.0, WEIGHT, generator=random)
        return kind
    spread, most = SPREADS[kind]
    drawn = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    values.copy_(drawn.normal_(0.0, spread, generator=random).clamp_(-most, most))
    return kind


# ---- changes ----


def _rowwise() -> None:
    """FP8 products with a scale a token and a channel by cuBLAS, as batchq has them."""
    importlib.import_module("batchq.engine.vllm_products")


def _fast_accumulation() -> None:
    """FP8 products with one scale a tensor by cuBLAS with fast accumulation, which vLLM's class leaves out."""
    import torch
    from vllm.model_executor.kernels.linear.scaled_mm import pytorch

    def apply(self: Any, *, A: Any, B: Any, out_dtype: Any, As: Any, Bs: Any, bias: Any, output_shape: Any) -> Any:
        product = torch._scaled_mm(
            A, B, As.reshape(1), Bs.reshape(1), bias=bias, out_dtype=out_dtype, use_fast_accum=True
        )
        return product.view(*output_shape)

    kernels: Any = pytorch
    kernels.PerTensorTorchFP8ScaledMMLinearKernel.apply_scaled_mm = apply


def _last_rows() -> None:
    """Llama's last layer, behind its attention, for the last token of each prompt only: no other is ever looked at.

    All layers but the last are compiled as ever; the last one's keys, values and attention are computed for all tokens.
    """
    import torch
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.models import llama

    kernels: Any = torch.ops._C

    class Sum(torch.nn.Module):
        """In place of the model's norm: what the last layer starts from."""

        def forward(self, hidden: Any, residual: Any) -> tuple[Any, None]:
            return hidden + residual, None

    def normed(norm: Any, x: Any) -> Any:
        out = torch.empty_like(x)
        kernels.rms_norm(out, x, norm.weight, norm.variance_epsilon)
        return out

    def tail(layer: Any, norm: Any, positions: Any, x: Any) -> Any:
        attention = layer.self_attn
        qkv, _ = attention.qkv_proj(normed(layer.input_layernorm, x))
        q, k, v = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        q, k = attention.rotary_emb.forward_cuda(positions, q, k)
        seen = attention.attn(q, k, v)
        context: Any = get_forward_context().attn_metadata
        if context is None:  # while vLLM looks how much memory a step takes
            last = torch.arange(min(len(x), 1024), device=x.device)
        else:
            last = context[attention.attn.layer_name].query_start_loc[1:].long() - 1
        projected, _ = attention.o_proj(seen[last])
        residual = x[last] + projected
        residual = residual + layer.mlp(normed(layer.post_attention_layernorm, residual))
        out = torch.empty_like(x)
        out[last] = normed(norm, residual)
        return out

    def forward(
        self: Any, input_ids: Any, positions: Any, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Any:
        if not hasattr(self, "benchmark_norm"):
            self.benchmark_norm = [self.model.norm]  # a list, so that it stays the model's own in torch's eyes
            self.model.norm = Sum()
            self.model.end_layer -= 1
        x = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        return tail(self.model.layers[self.model.end_layer], self.benchmark_norm[0], positions, x)

    models: Any = llama
    models.LlamaForCausalLM.forward = forward


def _silu() -> None:
    """SiLU and what quantizes its output in one kernel that reads each number once; with it the product by torch.

    What torch.compile makes of the same reads all twice: for the largest of a token, and for the numbers themselves.
    """
    import torch
    from vllm.model_executor.models import llama

    from benchmarks.silu import silu_quantized

    def fake(x: Any) -> tuple[Any, Any]:
        rows, columns = x.shape
        return x.new_empty(rows, columns // 2, dtype=torch.float8_e4m3fn), x.new_empty(rows, 1, dtype=torch.float32)

    name, schema = "benchmark::silu_quantized", "(Tensor x) -> (Tensor, Tensor)"
    torch.library.custom_op(name, silu_quantized, mutates_args=(), schema=schema).register_fake(fake)

    def forward(self: Any, x: Any) -> Any:
        x, _ = self.gate_up_proj(x)
        quantized, scale = torch.ops.benchmark.silu_quantized(x)
        down = self.down_proj
        scales = down.weight_scale.reshape(1, -1)
        return torch._scaled_mm(quantized, down.weight, scale, scales, out_dtype=x.dtype, use_fast_accum=True)

    models: Any = llama
    models.LlamaMLP.forward = forward


KNOWN: dict[str, Callable[[], None]] = {
    "rowwise": _rowwise,
    "fast-accumulation": _fast_accumulation,
    "last-rows": _last_rows,
    "silu": _silu,
}
for change in filter(None, os.environ.get(CHANGES, "").split(",")):
    KNOWN[change]()
