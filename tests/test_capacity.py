"""capacity: bytes as they are really stored, and which scheme for which hardware."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

import pytest

from batchq import capacity
from batchq.capacity import Fit, Memory, Tensor
from batchq.config import ClusterConfig, Config, EngineConfig, QuantizationConfig, Scheme
from batchq.errors import ConfigError, ModelError
from batchq.hardware import Gpu, Hardware
from batchq.models import Model
from batchq.scheme import group_size
from tests.tiny import make_tiny_model

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


# ---- bytes ----


def test_headers_tell_all_of_a_file_but_its_own_length(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    tensors = capacity.read_tensors(folder)
    file = folder / "model.safetensors"
    (header,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert capacity.stored_bytes(tensors) + 8 + header == file.stat().st_size
    assert capacity.parameters(tensors) * 2 == capacity.stored_bytes(tensors)


@pytest.mark.parametrize("damage", ["cut short", "no header", "a page of HTML"])
def test_a_broken_weight_file_is_named(tmp_path: Path, damage: str) -> None:
    file = make_tiny_model(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {"cut short": whole[:-5], "no header": whole[:4], "a page of HTML": b"<!DOCTYPE html>" * 9}[damage]
    )
    with pytest.raises(ModelError, match=r"model\.safetensors") as refused:
        capacity.read_tensors(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_published_model_and_its_published_size() -> None:
    tensors = llama_8b()
    assert capacity.parameters(tensors) == 8_030_261_248
    assert capacity.predicted_bytes(tensors, Scheme.none) == 2 * 8_030_261_248
    tables = 2 * 128256 * 4096  # embedding and head stay in BF16, so 8B in FP8 is 9 GB, not 8
    assert capacity.predicted_bytes(tensors, Scheme.fp8) == pytest.approx(8_030_261_248 + tables, rel=0.001)
    assert capacity.predicted_bytes(tensors, Scheme.int8) == capacity.predicted_bytes(tensors, Scheme.fp8)


def test_a_tied_head_counts_once() -> None:
    table = 128256 * 4096 * 2
    two, one = (capacity.predicted_bytes(llama_8b(), Scheme.int8, tied=tied) for tied in (False, True))
    assert two - one == table


def test_what_is_ignored_keeps_its_bytes() -> None:
    down = Tensor("model.layers.0.mlp.down_proj.weight", "BF16", (4096, 14336))
    head = Tensor("lm_head.weight", "BF16", (128256, 4096))
    assert capacity.is_quantized(down) and not capacity.is_quantized(head)
    assert capacity.is_quantized(head, ignore=[])
    assert not capacity.is_quantized(down, ["re:.*down_proj"])
    assert not capacity.is_quantized(down, ["model.layers.0.mlp.down_proj"])
    assert not capacity.is_quantized(Tensor("model.layers.0.mlp.down_proj.weight", "I8", (4096, 14336)))


def test_a_step_reads_the_layers_weights_as_they_are_served() -> None:
    """6.98e9 of 8.03e9: neither the embedding, which is looked up, nor the head, which is left out to be sure."""
    tensors, rows = llama_8b(), 32 * (4096 * 3 + 1024 * 2 + 14336 * 2)
    linear = capacity.linear_parameters(tensors, LLAMA_8B)
    assert linear == 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096) == pytest.approx(6.98e9, rel=1e-3)

    def read(scheme: Scheme, tensors: list[Tensor] = tensors, group: int | None = None) -> int:
        return capacity.linear_bytes(tensors, LLAMA_8B, scheme, ["lm_head"], group)

    assert read(Scheme.none) == 2 * linear
    assert read(Scheme.int8) == linear + 2 * rows  # a scale of two bytes a row
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
    assert capacity.kv_bytes_per_token(config) == size


def test_keys_and_values_are_read_for_sure_where_no_window_cuts_them_off() -> None:
    assert capacity.kv_bytes_read(LLAMA_8B, 2048) == 131072
    assert capacity.kv_bytes_read(LLAMA_8B, 2048, element_bytes=1) == 65536
    assert capacity.kv_bytes_read({**LLAMA_8B, "sliding_window": 4096}, 4096) == 131072
    assert capacity.kv_bytes_read({**LLAMA_8B, "sliding_window": 4096}, 8192) == 0


def test_kv_cache_is_enough_but_not_all_memory_and_never_too_little() -> None:
    one = capacity.kv_sequence_bytes(LLAMA_8B, 2048)
    assert one >= 2048 * 131072

    def size(memory: int, sequences: int, replicas: int = 1) -> int:
        return capacity.kv_cache_bytes(
            LLAMA_8B, cpu(memory=memory), weights=8 * GIB, max_model_len=2048, max_num_seqs=sequences, replicas=replicas
        )

    assert size(64 * GIB, 4) == 4 * one
    assert one < size(20 * GIB, 256) <= 5 * GIB
    assert size(64 * GIB, 256, replicas=2) < size(64 * GIB, 256)
    assert size(11 * GIB, 256) >= one


# ---- does it fit ----


def configured(scheme: Scheme = Scheme.auto, max_model_len: int = 2048, **cluster: int) -> Config:
    engine = EngineConfig(max_model_len=max_model_len)
    return Config(quantization=QuantizationConfig(scheme=scheme), engine=engine, cluster=ClusterConfig(**cluster))


def fit(hardware: Hardware, config: Config | None = None, model: Model = FULL) -> Fit:
    return Fit(model, hardware, config or configured(), (llama_8b(), LLAMA_8B))


def require(scheme: Scheme, hardware: Hardware, config: Config) -> Memory:
    need = fit(hardware, config).memory(scheme)
    capacity.require_memory(need, scheme, hardware, config)
    return need


def test_too_little_memory_is_said_in_numbers() -> None:
    with pytest.raises(ConfigError, match=r"17\.2 GiB needed.*15\.0 GiB") as refused:
        require(Scheme.none, cpu(memory=9 * GIB), configured())
    assert "9.0 GiB" in str(refused.value) and "max_model_len=2048" in str(refused.value)


def test_more_gpus_or_fewer_bits_make_room() -> None:
    small = cuda("NVIDIA L4", 8, 9, 16 * GIB)
    with pytest.raises(ConfigError, match="NVIDIA L4"):
        require(Scheme.none, small, configured())
    fp8 = require(Scheme.fp8, small, configured())
    two = require(Scheme.none, small, configured(tensor_parallel_size=2))
    assert fp8.total < 0.9 * 16 * GIB and two.weights == 8_030_261_248


def test_stages_share_the_layers_but_not_the_ends() -> None:
    """The fullest of two stages has half of the layers and the embedding, or the head, which is as large."""
    small = cuda("NVIDIA L4", 8, 9, 16 * GIB)
    need = require(Scheme.none, small, configured(pipeline_parallel_size=2))
    end = 128256 * 4096 * 2
    assert need.weights == pytest.approx((16_060_522_496 - 2 * end) / 2 + end, abs=1 << 20)
    both = require(Scheme.none, small, configured(pipeline_parallel_size=2, tensor_parallel_size=2))
    assert both.weights == pytest.approx(need.weights / 2, abs=1)


def test_replicas_share_a_machine() -> None:
    here = cpu(memory=14 * GIB)
    require(Scheme.int8, here, configured(max_model_len=1024))
    with pytest.raises(ConfigError, match=r"cluster\.replicas"):
        require(Scheme.int8, here, configured(max_model_len=1024, replicas=2))


# ---- which scheme ----


@pytest.mark.parametrize(
    ("hardware", "scheme"),
    [
        (cuda("NVIDIA H100 80GB HBM3", 9, 0), Scheme.fp8),
        (cuda("NVIDIA L4", 8, 9), Scheme.fp8),
        (cuda("NVIDIA B200", 10, 0), Scheme.fp8),
        (cuda("NVIDIA A100-SXM4-80GB", 8, 0), Scheme.int8),
        (cuda("NVIDIA A10", 8, 6), Scheme.int8),
        (cuda("Tesla T4", 7, 5), Scheme.none),
        (cpu("avx512_vnni", "avx512f"), Scheme.int8),
        (cpu("amx_int8"), Scheme.int8),
        (cpu("avx2"), Scheme.none),
        (cuda("NVIDIA H100 MIG", 9, 0, 9 * GIB), Scheme.w4a8_fp8),  # 9 GB of FP8 don't fit, 4-bit weights do
        (cuda("NVIDIA L4 half", 8, 9, 10 * GIB), Scheme.w4a16),
    ],
    ids=lambda value: value.accelerator if isinstance(value, Hardware) else value.value,
)
def test_auto_follows_the_hardware_and_says_why(hardware: Hardware, scheme: Scheme) -> None:
    choice = fit(hardware, configured(max_model_len=1024)).choose()
    assert choice.scheme is scheme
    assert ("CPU" if hardware.device == "cpu" else hardware.accelerator) in choice.why and "\n" not in choice.why


def test_what_costs_too_much_quality_falls_back_to_what_is_served_and_fits() -> None:
    h100 = cuda("NVIDIA H100 80GB HBM3", 9, 0)
    assert fit(h100).choose().fallback == (Scheme.fp8_gptq, Scheme.fp8_block, Scheme.w8a16, Scheme.none)
    assert fit(cpu("amx_int8"), configured(Scheme.int8_rtn)).choose().fallback == (Scheme.int8,)  # 16 GiB: no BF16
    named = configured(Scheme.fp8)
    named.gate.fallback = [Scheme.w8a16]
    assert fit(h100, named).choose().fallback == (Scheme.w8a16,)


@pytest.mark.parametrize("scheme", list(Scheme))
def test_a_quantized_model_is_never_quantized_twice(scheme: Scheme) -> None:
    choice = fit(cpu(), configured(scheme), Model("/m", "tuned", "0" * 64, "gptq")).choose()
    assert choice.scheme is Scheme.none and "already quantized (gptq)" in choice.why


@pytest.mark.parametrize(
    ("scheme", "hardware", "words"),
    [
        (Scheme.fp8, cpu("amx_int8"), "GPUs only"),
        (Scheme.fp8, cuda("NVIDIA A100-SXM4-80GB", 8, 0), "A100"),
        (Scheme.int8, cuda("NVIDIA B200", 10, 0), "B200"),
        (Scheme.nvfp4, cuda("NVIDIA H100 80GB HBM3", 9, 0), "10.0"),
        (Scheme.w4a8_fp8, cuda("NVIDIA A100-SXM4-80GB", 8, 0), "9.0"),
    ],
)
def test_a_scheme_that_cannot_be_served_is_refused_with_the_choices(
    scheme: Scheme, hardware: Hardware, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        fit(hardware, configured(scheme)).choose()
    message = str(refused.value)
    assert "quantization.scheme" in message and scheme.value in message and "auto" in message


@pytest.mark.parametrize(("scheme", "multiple"), [(Scheme.w4a8_fp8, "128"), (Scheme.fp8_block, "128")])
def test_a_kernel_that_wants_other_shapes_is_known_before_quantizing(scheme: Scheme, multiple: str) -> None:
    odd = [Tensor("model.layers.0.self_attn.k_proj.weight", "BF16", (192, 576))]
    here = cuda("NVIDIA H100 80GB HBM3", 9, 0)
    with pytest.raises(ConfigError, match=multiple):
        Fit(FULL, here, configured(scheme), (odd, LLAMA_8B)).choose()


def test_groups_divide_the_models_columns_or_are_refused() -> None:
    assert group_size(Scheme.w4a16, [4096, 14336], None) == 128
    assert group_size(Scheme.w4a16, [576, 1536], None) == 64
    assert group_size(Scheme.w4a16, [100], None) is None
    assert group_size(Scheme.w4a16, [576], 32) == 32
    assert group_size(Scheme.fp8, [576], 128) is None
    with pytest.raises(ConfigError, match="576 columns; what fits: 64, 32"):
        group_size(Scheme.w4a16, [576], 128)


def test_a_stored_fp8_model_needs_a_gpu() -> None:
    stored = Model("/m", "tuned", "0" * 64, "compressed-tensors fp8")
    with pytest.raises(ConfigError, match="tuned is stored in fp8"):
        fit(cpu(), model=stored).choose()
    assert fit(cuda("NVIDIA A10", 8, 6), model=stored).choose().scheme is Scheme.none


def test_explicit_choices_are_kept() -> None:
    for scheme, hardware in (
        (Scheme.none, cuda("NVIDIA H100", 9, 0)),
        (Scheme.int8, cuda("NVIDIA H100", 9, 0)),
        (Scheme.int8, cpu()),
    ):
        assert fit(hardware, configured(scheme)).choose().scheme is scheme


# ---- several GPUs ----


def test_the_engine_spans_as_many_gpus_as_heads_and_layers_divide() -> None:
    config = LLAMA_8B | {"num_hidden_layers": 30}  # 30 layers: two and three stages, not four
    tensors = [t for t in llama_8b() if not t.name.startswith(("model.layers.30.", "model.layers.31."))]
    found = [capacity.layout(tensors, config, Scheme.none, int(size * 1e9), max_model_len=2048) for size in (22, 9, 7)]
    assert [(one.tensor, one.pipeline) for one in found if one] == [(1, 1), (1, 3), (4, 1)]
    assert capacity.layout(tensors, config, Scheme.none, int(2.2e9), max_model_len=2048, most=8) is None
    for one in found:
        assert one and one.kv_room >= capacity.kv_sequence_bytes(config, 2048)


def test_an_output_head_under_any_name_stays_as_it_is() -> None:
    for name in ("lm_head", "language_model.lm_head", "model.language_model.lm_head"):
        assert not capacity.is_quantized(Tensor(f"{name}.weight", "BF16", (64, 64)))
    assert capacity.is_quantized(Tensor("model.layers.0.mlp.gate_proj.weight", "BF16", (64, 64)))
