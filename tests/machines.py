"""What sizing is tried on: machines with CPUs and GPUs, and a model as it was published."""

from __future__ import annotations

from typing import Any

from batchq.machine.hardware import Gpu, Hardware
from batchq.model.source import Model
from batchq.model.tensors import Tensor

GIB = 1 << 30
FULL = Model("/models/full", "full", "0" * 64, None)
# Llama 3.1 8B as published
LLAMA_8B: dict[str, Any] = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


def cpu(*flags: str, memory: int = 16 * GIB) -> Hardware:
    return Hardware((), (0, 1), "Xeon", frozenset(flags), memory)


def cuda(name: str, major: int, minor: int, memory: int = 80 * GIB) -> Hardware:
    return Hardware((Gpu(name, memory, memory, (major, minor), "580"),), (0,), "Xeon", frozenset(), 64 * GIB)


def llama_8b() -> list[Tensor]:
    hidden, inner, keys = 4096, 14336, 1024
    found = [Tensor(name, "BF16", (128256, hidden)) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    found.append(Tensor("model.norm.weight", "BF16", (hidden,)))
    for index in range(32):
        shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
        shapes |= {"self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden)}
        shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        found += [Tensor(f"model.layers.{index}.{name}.weight", "BF16", shape) for name, shape in shapes.items()]
        norms = ("input_layernorm", "post_attention_layernorm")
        found += [Tensor(f"model.layers.{index}.{name}.weight", "BF16", (hidden,)) for name in norms]
    return found
