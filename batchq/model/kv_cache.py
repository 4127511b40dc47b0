"""Bytes of keys and values, from a model's config.json."""

from __future__ import annotations

import math
from typing import Any

from batchq.model.folder import first_of, text_config

BLOCK = 128  # tokens that a KV block holds on vLLM's CPU backend, its largest; a sequence takes whole blocks


def bytes_per_token(config: dict[str, Any], element_bytes: int = 2) -> int:
    """Bytes that one token's keys and values take in all attention layers, from a model's config.json.

    An upper bound for models with sliding windows. Raises ModelError when the shape isn't there.
    """
    text = text_config(config)
    layers = first_of(text, "num_hidden_layers", "n_layer", "num_layers")
    heads = first_of(text, "num_attention_heads", "n_head", "num_heads")
    if kinds := text.get("layer_types"):
        layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    if rank := text.get("kv_lora_rank"):  # multi-head latent attention stores one compressed vector instead
        return int(layers * (rank + text.get("qk_rope_head_dim", 0)) * element_bytes)
    kv_heads = text.get("num_key_value_heads") or (1 if text.get("multi_query") else heads)
    head_dim = text.get("head_dim") or first_of(text, "hidden_size", "n_embd", "d_model") // heads
    return int(2 * layers * kv_heads * head_dim * element_bytes)


def bytes_read(config: dict[str, Any], max_model_len: int, element_bytes: int = 2) -> int:
    """Bytes that decoding a token surely reads for each token before it: 0 where attention may see only a window."""
    text = text_config(config)
    window = text.get("sliding_window") or text.get("attention_chunk_size") or max_model_len
    return 0 if window < max_model_len else bytes_per_token(config, element_bytes)


def sequence_bytes(config: dict[str, Any], max_model_len: int) -> int:
    """Bytes of one sequence of the full length, in whole blocks, and one block that vLLM reserves."""
    return bytes_per_token(config) * (math.ceil(max_model_len / BLOCK) + 1) * BLOCK
