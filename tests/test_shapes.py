"""shapes: what benchmarks/shapes.py writes without a model is what llm-compressor stores of one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from batchq import capacity, models, quantize
from batchq.config import IGNORE, ModelConfig, QuantizationConfig, Scheme
from benchmarks import shapes

PROMPTS = [list(range(3 + n, 43 + n)) for n in range(4)]


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "tiny"
    shapes.write("tiny", folder, tokenizer=tiny)
    return folder


@pytest.mark.parametrize("scheme", list(shapes.FORMS), ids=lambda scheme: scheme.value)
def test_a_quantized_form_is_the_one_that_llm_compressor_stores(
    plain: Path, tiny: Path, tmp_path: Path, scheme: Scheme
) -> None:
    base, config = models.resolve(ModelConfig(path=str(plain))), QuantizationConfig(cache=str(tmp_path / "cache"))
    made = quantize.quantize(base, scheme, config, lambda: PROMPTS, tmp_path / "log", lambda _: None)
    shapes.write("tiny", tmp_path / "random", scheme, tokenizer=tiny)
    random = models.resolve(ModelConfig(path=str(tmp_path / "random")))
    stored, written = (capacity.read_tensors(path) for path in (made.path, random.path))
    assert sorted(written, key=str) == sorted(stored, key=str)
    theirs, ours = (models.read_config(path)["quantization_config"] for path in (made.path, random.path))
    assert ours["ignore"] == theirs["ignore"] == ["lm_head"]
    group, wanted = ours["config_groups"]["group_0"], theirs["config_groups"]["group_0"]
    for side in ("weights", "input_activations"):
        assert {k: wanted[side][k] for k in group[side]} == group[side] if group[side] else wanted[side] is None
    assert (group["format"], group["targets"], ours["format"]) == (wanted["format"], ["Linear"], theirs["format"])


def test_the_numbers_are_those_of_a_matrix(tiny: Path, tmp_path: Path) -> None:
    """Read back as transformers reads them, each scheme's weights deviate as much as the plain ones."""
    import torch
    from safetensors import safe_open

    for scheme in (Scheme.none, Scheme.fp8, Scheme.int8):
        shapes.write("tiny", tmp_path / scheme.value, scheme, tokenizer=tiny)
        with safe_open(tmp_path / scheme.value / "model-00001-of-00001.safetensors", "pt") as file:
            layer = "model.layers.1.mlp.down_proj.weight"
            weights = file.get_tensor(layer).to(torch.float32)
            if scheme is not Scheme.none:
                weights = weights * file.get_tensor(f"{layer}_scale").to(torch.float32)
            assert weights.std() == pytest.approx(0.02, rel=0.05)
            assert (file.get_tensor("model.norm.weight") == 1).all()


def test_a_hole_is_planned_as_a_checkpoint_and_takes_no_room(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "70b"
    size = shapes.write("70b", folder, sparse=True, tokenizer=tiny)
    assert size == capacity.stored_bytes(capacity.read_tensors(folder)) == pytest.approx(141.1e9, abs=0.1e9)
    on_disk = int(subprocess.run(["du", "-s", "-B1", folder], capture_output=True, check=True).stdout.split()[0])
    assert on_disk < 10e6
    first = models.resolve(ModelConfig(path=str(folder)))  # at once: nothing is hashed
    assert first.quantized is None and len(first.digest) == 64


def test_experts_are_written_in_as_many_bytes_as_plan_says(tiny: Path, tmp_path: Path) -> None:
    """The language model alone: 2 of Scout's 217 GB see images."""
    config, tensors = shapes.described("scout")
    assert config["architectures"] == ["Llama4ForCausalLM"]
    for scheme, gigabytes in ((Scheme.none, 215.5), (Scheme.w4a16, 58.6), (Scheme.fp8, 109.9)):
        size = shapes.write("scout", tmp_path / scheme.value, scheme, sparse=True, tokenizer=tiny)
        assert size / 1e9 == pytest.approx(gigabytes, abs=0.1)
        group = capacity.group_of(scheme, tensors, IGNORE, None)
        assert capacity.predicted_bytes(tensors, scheme, group=group) == pytest.approx(size, rel=0.01)
    written = models.read_config(tmp_path / "w4a16")
    left = written["quantization_config"]["ignore"]
    assert len(left) == 49 and {name.rpartition(".")[2] for name in left} == {"lm_head", "router"}
