"""fit: which scheme for which hardware, and why."""

from __future__ import annotations

from typing import Any

import pytest

from batchq.config import ClusterConfig, Config, EngineConfig, QuantizationConfig, Scheme
from batchq.errors import ConfigError
from batchq.machine.hardware import Hardware
from batchq.model.scheme import group_size
from batchq.model.source import Model
from batchq.model.tensors import Shape, Tensor
from batchq.sizing.fit import Fit, require_memory
from batchq.sizing.memory import Memory
from tests.machines import FULL, GIB, LLAMA_8B, cpu, cuda, llama_8b

# ---- does it fit ----


def configured(scheme: Scheme = Scheme.auto, max_model_len: int = 2048, **cluster: Any) -> Config:
    engine = EngineConfig(max_model_len=max_model_len)
    return Config(quantization=QuantizationConfig(scheme=scheme), engine=engine, cluster=ClusterConfig(**cluster))


def fit(hardware: Hardware, config: Config | None = None, model: Model = FULL) -> Fit:
    return Fit(model, hardware, config or configured(), Shape(llama_8b(), LLAMA_8B))


def require(scheme: Scheme, hardware: Hardware, config: Config) -> Memory:
    need = fit(hardware, config).memory(scheme)
    require_memory(need, scheme, hardware, config)
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
        Fit(FULL, here, configured(scheme), Shape(odd, LLAMA_8B)).choose()


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
