"""tensors, kv_cache, sizes, memory: bytes as they are really stored, and what an engine takes."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

import pytest

from batchq.config import Scheme
from batchq.errors import ModelError
from batchq.model import kv_cache
from batchq.model.tensors import Shape, Tensor, is_quantized, linear_parameters, parameters, read_tensors, stored_bytes
from batchq.quantize.sizes import Quantization, linear_bytes, predicted_bytes
from batchq.sizing.memory import kv_cache_bytes, parallelism_for
from tests.machines import GIB, LLAMA_8B, cpu, llama_8b
from tests.tiny import make_tiny_model

# ---- bytes ----


def test_headers_tell_all_of_a_file_but_its_own_length(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    tensors = read_tensors(folder)
    file = folder / "model.safetensors"
    (header,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert stored_bytes(tensors) + 8 + header == file.stat().st_size
    assert parameters(tensors) * 2 == stored_bytes(tensors)


@pytest.mark.parametrize("damage", ["cut short", "no header", "a page of HTML"])
def test_a_broken_weight_file_is_named(tmp_path: Path, damage: str) -> None:
    file = make_tiny_model(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {"cut short": whole[:-5], "no header": whole[:4], "a page of HTML": b"<!DOCTYPE html>" * 9}[damage]
    )
    with pytest.raises(ModelError, match=r"model\.safetensors") as refused:
        read_tensors(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_published_model_and_its_published_size() -> None:
    tensors = llama_8b()
    assert parameters(tensors) == 8_030_261_248
    assert predicted_bytes(tensors, Quantization(Scheme.none)) == 2 * 8_030_261_248
    tables = 2 * 128256 * 4096  # embedding and head stay in BF16, so 8B in FP8 is 9 GB, not 8
    assert predicted_bytes(tensors, Quantization(Scheme.fp8)) == pytest.approx(8_030_261_248 + tables, rel=0.001)
    assert predicted_bytes(tensors, Quantization(Scheme.int8)) == predicted_bytes(tensors, Quantization(Scheme.fp8))


def test_a_tied_head_counts_once() -> None:
    table = 128256 * 4096 * 2
    two, one = (predicted_bytes(llama_8b(), Quantization(Scheme.int8), tied=tied) for tied in (False, True))
    assert two - one == table


def test_what_is_ignored_keeps_its_bytes() -> None:
    down = Tensor("model.layers.0.mlp.down_proj.weight", "BF16", (4096, 14336))
    head = Tensor("lm_head.weight", "BF16", (128256, 4096))
    assert is_quantized(down) and not is_quantized(head)
    assert is_quantized(head, ignore=[])
    assert not is_quantized(down, ["re:.*down_proj"])
    assert not is_quantized(down, ["model.layers.0.mlp.down_proj"])
    assert not is_quantized(Tensor("model.layers.0.mlp.down_proj.weight", "I8", (4096, 14336)))


def test_a_step_reads_the_layers_weights_as_they_are_served() -> None:
    """6.98e9 of 8.03e9: neither the embedding, which is looked up, nor the head, which is left out to be sure."""
    tensors, rows = llama_8b(), 32 * (4096 * 3 + 1024 * 2 + 14336 * 2)
    linear = linear_parameters(Shape(tensors, LLAMA_8B))
    assert linear == 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096) == pytest.approx(6.98e9, rel=1e-3)

    def read(scheme: Scheme, tensors: list[Tensor] = tensors) -> int:
        return linear_bytes(Shape(tensors, LLAMA_8B), Quantization(scheme, ("lm_head",)))

    assert read(Scheme.none) == 2 * linear
    assert read(Scheme.int8) == linear + 2 * rows  # a scale of two bytes per row
    assert read(Scheme.none, [dataclasses.replace(t, dtype="F32") for t in tensors]) == 2 * linear


# ---- the key-value cache ----


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (LLAMA_8B, 131072),
        ({"text_config": LLAMA_8B, "model_type": "mllama"}, 131072),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768}, 2 * 12 * 768 * 2),
        ({**LLAMA_8B, "head_dim": 64}, 65536),
        ({**LLAMA_8B, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 32 * 576 * 2),
        ({**LLAMA_8B, "layer_types": ["full_attention", "linear_attention"] * 16}, 65536),
    ],
    ids=["llama", "inside a vision model", "gpt2", "own head size", "latent", "half of it linear"],
)
def test_a_tokens_keys_and_values(config: dict[str, Any], size: int) -> None:
    assert kv_cache.bytes_per_token(config) == size


def test_keys_and_values_are_read_for_sure_where_no_window_cuts_them_off() -> None:
    assert kv_cache.bytes_read(LLAMA_8B, 2048) == 131072
    assert kv_cache.bytes_read(LLAMA_8B, 2048, element_bytes=1) == 65536
    assert kv_cache.bytes_read({**LLAMA_8B, "sliding_window": 4096}, 4096) == 131072
    assert kv_cache.bytes_read({**LLAMA_8B, "sliding_window": 4096}, 8192) == 0


def test_kv_cache_is_enough_but_not_all_memory_and_never_too_little() -> None:
    one = kv_cache.sequence_bytes(LLAMA_8B, 2048)
    assert one >= 2048 * 131072

    def size(memory: int, sequences: int, replicas: int = 1) -> int:
        return kv_cache_bytes(
            LLAMA_8B, cpu(memory=memory), weights=8 * GIB, max_model_len=2048, max_num_seqs=sequences, replicas=replicas
        )

    assert size(64 * GIB, 4) == 4 * one
    assert one < size(20 * GIB, 256) <= 5 * GIB
    assert size(64 * GIB, 256, replicas=2) < size(64 * GIB, 256)
    assert size(11 * GIB, 256) >= one


# ---- several GPUs ----


def test_the_engine_spans_as_many_gpus_as_heads_and_layers_divide() -> None:
    config = LLAMA_8B | {"num_hidden_layers": 30}  # 30 layers: two and three stages, not four
    tensors = [t for t in llama_8b() if not t.name.startswith(("model.layers.30.", "model.layers.31."))]
    shape, how = Shape(tensors, config), Quantization(Scheme.none)
    found = [parallelism_for(shape, how, int(size * 1e9), max_model_len=2048) for size in (22, 9, 7)]
    assert [(one.tensor, one.pipeline) for one in found if one] == [(1, 1), (1, 3), (4, 1)]
    assert parallelism_for(shape, how, int(2.2e9), max_model_len=2048, most=8) is None
    for one in found:
        assert one and one.kv_bytes >= kv_cache.sequence_bytes(config, 2048)


def test_an_output_head_under_any_name_stays_as_it_is() -> None:
    for name in ("lm_head", "language_model.lm_head", "model.language_model.lm_head"):
        assert not is_quantized(Tensor(f"{name}.weight", "BF16", (64, 64)))
    assert is_quantized(Tensor("model.layers.0.mlp.gate_proj.weight", "BF16", (64, 64)))
