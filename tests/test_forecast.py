"""forecast: the table of `plan`, from published shapes alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from batchq import capacity, forecast, shapes
from batchq.config import Scheme
from batchq.hardware import Gpu

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def printed() -> str:
    """`python -m batchq plan`, in a process of its own that says what it imported."""
    code = (
        "import sys, batchq.cli; code = batchq.cli.main(['plan']);"
        "print('heavy:', sorted({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules))); sys.exit(code)"
    )
    before = os.times().children_user
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert os.times().children_user - before < 3, "`plan` answers at once"
    assert "heavy: []" in done.stdout
    return done.stdout


def rows(printed: str, model: str) -> dict[str, list[str]]:
    """Cells of a model's lines, by scheme."""
    block = next(part for part in printed.split("\n\n") if part.startswith(model))
    return {line.split()[0]: re.split(r"  +", line.strip()) for line in block.splitlines()[3:]}


def test_scout_takes_three_two_and_one_gpu_of_80_gb(printed: str) -> None:
    found = rows(printed, "Llama 4 Scout")
    for scheme, nominal, gpus in (
        ("none", "220 GB", "3 (pp 3)"),
        ("int8", "109 GB", "2 (tp 2)"),
        ("w4a16", "55 GB", "1"),
    ):
        assert found[scheme][1] == nominal
        assert found[scheme][3] == gpus


def test_maverick_is_800_gb(printed: str) -> None:
    assert rows(printed, "Llama 4 Maverick")["none"][1] == "800 GB"


def test_all_four_models_and_both_gpus_are_shown(printed: str) -> None:
    for words in ("Llama 3.1 8B", "Llama 3.3 70B", "Llama 4 Scout", "Llama 4 Maverick", "H100 80GB", "H200"):
        assert words in printed


@pytest.mark.parametrize(("name", "billions"), [("Llama 3.1 8B", 8.03), ("Llama 3.3 70B", 70.55)])
def test_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    """As the safetensors index of each model states it."""
    (shape,) = (s for s in shapes.published() if s.name == name)
    assert sum(t.elements for t in shape.tensors) / 1e9 == pytest.approx(billions, abs=0.005)


def test_of_a_mixture_only_the_experts_asked_are_multiplied() -> None:
    """17B active parameters, as published, hold the embedding and the head too, 2 x 1.03B."""
    for name in ("Llama 4 Scout", "Llama 4 Maverick"):
        (shape,) = (s for s in shapes.published() if s.name == name)
        assert capacity.linear_parameters(shape.tensors, shape.config) / 1e9 == pytest.approx(15.1, abs=0.1)


@pytest.mark.parametrize(
    ("name", "scheme", "tokens"),
    [
        ("Llama 3.1 8B", Scheme.none, 44320),
        ("Llama 3.3 70B", Scheme.none, 8724),
        ("Llama 4 Scout", Scheme.none, 27798),
        ("Llama 4 Scout", Scheme.w4a16, 7650),
    ],
)
def test_forecasts_are_what_h200s_reached(name: str, scheme: Scheme, tokens: int) -> None:
    """README's tables, of the weights that have no zeros for want of bits; FP8's of 70B were such."""
    (shape,) = (s for s in shapes.published() if s.name == name)
    (line,) = forecast.lines(shape.parameters, shape.tensors, shape.config, forecast.REFERENCE[1], schemes=(scheme,))
    assert line.tokens_per_second == pytest.approx(tokens, rel=0.03)


def test_an_unknown_gpu_has_no_speed() -> None:
    gpu = Gpu("NVIDIA Whatever", 80 << 30, 80 << 30, (9, 0), "")
    (shape, *_) = shapes.published()
    (line, *_) = forecast.lines(shape.parameters, shape.tensors, shape.config, gpu)
    assert line.tokens_per_second is None and line.layout is not None


@pytest.mark.parametrize(
    ("name", "sixteen", "eight"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 1979),
        ("NVIDIA H200", 989, 1979),
        ("NVIDIA H100 PCIe", 756, 1513),
        ("NVIDIA A100-SXM4-80GB", 312, 624),
        ("NVIDIA L40", 181, 362),
        ("NVIDIA L4", 121, 242),
        ("NVIDIA RTX A1000", None, None),
        ("NVIDIA H20", None, None),
        ("cpu_core", None, None),
    ],
)
def test_a_peak_is_that_of_the_gpu_named_and_of_no_other(name: str, sixteen: int | None, eight: int | None) -> None:
    for schemes, teraflops in (((Scheme.none, Scheme.w4a16), sixteen), ((Scheme.fp8, Scheme.w4a8_fp8), eight)):
        for scheme in schemes:
            assert forecast.peak(name, scheme) == (None if teraflops is None else teraflops * 1e12)


@pytest.mark.parametrize(
    ("name", "terabytes"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35),
        ("NVIDIA H100 PCIe", 2.0),
        ("NVIDIA H200", 4.8),
        ("NVIDIA A100-SXM4-80GB", 2.04),
        ("NVIDIA A100-SXM4-40GB", 1.56),
        ("NVIDIA L4", 0.3),
        ("NVIDIA H20", None),
        ("cpu_core", None),
    ],
)
def test_a_bandwidth_is_that_of_the_gpu_named(name: str, terabytes: float | None) -> None:
    assert forecast.bandwidth(name) == (None if terabytes is None else terabytes * 1e12)
    assert (forecast.peak(name, Scheme.none) is None) == (terabytes is None), "both are known or none"
