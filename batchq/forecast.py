"""Scheme x model x GPU -> what is stored, how many GPUs hold it, what is left for the KV cache, and how fast to expect
it: the table of `plan`. From shapes alone, without weights or torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from batchq import capacity
from batchq.capacity import Layout, Tensor
from batchq.config import IGNORE, Config, Scheme
from batchq.fit import Fit
from batchq.hardware import Gpu, Hardware
from batchq.scheme import FACTS, unserved
from batchq.shapes import Shape, published

MIB = 1 << 20
# Memory as NVML gives it.
REFERENCE = (
    Gpu("NVIDIA H100 80GB HBM3", 81559 * MIB, 81559 * MIB, (9, 0), ""),
    Gpu("NVIDIA H200", 143771 * MIB, 143771 * MIB, (9, 0), ""),
)
SHOWN = (Scheme.none, Scheme.fp8, Scheme.int8, Scheme.w8a16, Scheme.w4a16, Scheme.w4a8_fp8)
# Dense peaks in teraFLOPS by the vendor's datasheets: (16 bits, 8 bits). The longest name counts whose words NVML's
# name has.
PEAKS = {
    "H100": (989, 1979),
    "H100 NVL": (835, 1671),
    "H100 PCIe": (756, 1513),
    "H200": (989, 1979),
    "GH200": (989, 1979),
    "H200 NVL": (835, 1671),
    "A100": (312, 624),
    "L40S": (362, 733),
    "L40": (181, 362),
    "L4": (121, 242),
    "A10": (125, 250),
    "B200": (2250, 4500),
}
# Memory bandwidth in terabytes a second by the same sheets; the largest of those that go by one name.
BANDWIDTHS = {
    "H100": 3.35,
    "H100 NVL": 3.9,
    "H100 PCIe": 2.0,
    "H200": 4.8,
    "GH200": 4.9,
    "A100": 2.04,
    "A100-SXM4-40GB": 1.56,
    "A100-PCIE-40GB": 1.56,
    "L40S": 0.864,
    "L40": 0.864,
    "L4": 0.3,
    "A10": 0.6,
    "B200": 8.0,
}
# Schemes whose matrices are multiplied in 8 bits; weights alone in fewer bits are multiplied in 16.
EIGHT_BITS = (Scheme.fp8, Scheme.fp8_gptq, Scheme.fp8_block, Scheme.int8, Scheme.int8_rtn, Scheme.w4a8_fp8)
WEIGHTS_ONLY = (Scheme.w8a16, Scheme.w4a16, Scheme.w4a16_awq)
# What vLLM reached of the peak with 1,000-token prompts and one token of answer, by the bits that are multiplied (0: in
# 16, of weights stored in fewer). Dense: an 8B shape on one H100, on one H200 for weights only. Mixtures of experts:
# Scout's shape on H200s (benchmarks/scaling.py); 8 bits weren't tried and are taken to lose what 16 do.
DENSE = {16: 0.61, 8: 0.44, 0: 0.56}
EXPERTS = {16: 0.42, 8: 0.30, 0: 0.23}


@dataclass(frozen=True, slots=True)
class Line:
    """One scheme of one model on one kind of GPU."""

    scheme: Scheme
    nominal: int  # bytes, of the nameplate's parameters
    stored: int  # bytes, as compressed-tensors stores them
    layout: Layout | None
    kv_tokens: int
    tokens_per_second: float | None  # of prefill, on all the GPUs together; None where the peak isn't known
    reason: str | None  # why it can't be served


def lines(
    name_parameters: int,
    tensors: Sequence[Tensor],
    config: dict[str, Any],
    gpu: Gpu,
    *,
    schemes: Sequence[Scheme] = SHOWN,
    max_model_len: int = 2048,
    ignore: Sequence[str] = tuple(IGNORE),
    group_size: int | None = None,
) -> list[Line]:
    """What each scheme makes of the model on GPUs of one kind."""
    there = Hardware((gpu,), (), "", frozenset(), 0)
    shapes = capacity.matrices(tensors, ignore)
    found = []
    for scheme in schemes:
        group = capacity.group_of(scheme, tensors, ignore, group_size)
        layout = capacity.layout(
            tensors, config, scheme, gpu.memory, max_model_len=max_model_len, ignore=ignore, group=group
        )
        found.append(
            Line(
                scheme,
                name_parameters * FACTS[scheme].bits // 8,
                capacity.predicted_bytes(tensors, scheme, tied=capacity.is_tied(config), ignore=ignore, group=group),
                layout,
                layout.kv_room // capacity.kv_bytes_per_token(config) if layout else 0,
                expected(scheme, gpu.name, tensors, config, layout.gpus) if layout else None,
                unserved(scheme, there, shapes),
            )
        )
    return found


def of_scheme(fit: Fit, scheme: Scheme, gpus: int) -> float | None:
    """Prompt tokens a second of the job's model under a scheme on so many of the GPUs here; None where that can't be
    said: without one, and of a model that is quantized already."""
    if not fit.hardware.gpus or fit.model.quantized:
        return None
    return expected(scheme, fit.hardware.accelerator, fit.tensors, fit.shape, gpus)


def expected(
    scheme: Scheme, accelerator: str, tensors: Sequence[Tensor], config: dict[str, Any], gpus: int
) -> float | None:
    """Prompt tokens a second on so many GPUs: the share of the peak that was reached (DENSE, EXPERTS) x peak / (2 x
    linear parameters), attention left out; None where the peak isn't known."""
    top = peak(accelerator, scheme)
    if top is None:
        return None
    reached = EXPERTS if any(".experts." in tensor.name for tensor in tensors) else DENSE
    bits = 8 if scheme in EIGHT_BITS else 0 if scheme in WEIGHTS_ONLY else 16
    return reached[bits] * top / (2 * capacity.linear_parameters(tensors, config)) * gpus


def peak(accelerator: str, scheme: Scheme) -> float | None:
    """Dense FLOP/s of one device, in the bits that the scheme is multiplied in; None if it isn't in the list.
    `accelerator`: its name, as NVML gives it."""
    name = _longest(PEAKS, accelerator)
    if name is None or scheme is Scheme.nvfp4:  # which is multiplied in 4
        return None
    return PEAKS[name][scheme in EIGHT_BITS] * 1e12


def bandwidth(accelerator: str) -> float | None:
    """Bytes a second that one device reads from its memory at most; None if it isn't in the list."""
    name = _longest(BANDWIDTHS, accelerator)
    return None if name is None else BANDWIDTHS[name] * 1e12


def _longest(names: Iterable[str], accelerator: str) -> str | None:
    found = [name for name in names if re.search(rf"\b{name}\b", accelerator)]
    return max(found, key=len, default=None)


# ---- words ----


def table() -> str:
    """`plan` without a job: published models on 80 GB and 141 GB GPUs."""
    blocks = [_block(shape) for shape in published()]
    notes = (
        "nominal: parameters on the nameplate x bits. stored: with embeddings, heads, routers, towers and scales as",
        "they are really kept. GPUs: the fewest that hold it and one row of 2,048 tokens; tp and pp: tensor and",
        "pipeline parallel. KV: tokens that fit beside it. tokens/s: of prompts, on those GPUs; what vLLM reached of",
        "the peak on an 8B shape (61% in 16 bits, 44% in 8, 56% of weights only) or with experts on Scout's (42%, 30%,",
        "23%), without what parallelism costs.",
        "A job's own model: plan job=NAME.",
    )
    return "\n\n".join(blocks) + "\n\n" + "\n".join(notes)


def _block(shape: Shape) -> str:
    total, linear = capacity.parameters(shape.tensors), capacity.linear_parameters(shape.tensors, shape.config)
    head = f"{shape.name} · {total / 1e9:.1f}B parameters stored, {linear / 1e9:.1f}B multiplied for a prompt token"
    columns = f"  {'':<10}{'nominal':>8}{'stored':>11}"
    titles = "".join(f"  {_short(gpu):^36}" for gpu in REFERENCE)
    heads = f"{columns}" + f"  {'GPUs':<16}{'KV':>9}{'tokens/s':>11}" * len(REFERENCE)
    by_gpu = [lines(shape.parameters, shape.tensors, shape.config, gpu) for gpu in REFERENCE]
    rows = [
        f"  {first.scheme.value:<10}{nominal_words(first.nominal):>8}{first.stored / 1e9:>8.1f} GB"
        + "".join(_served(line) for line in (first, *others))
        for first, *others in zip(*by_gpu, strict=True)
    ]
    return "\n".join([head, " " * len(columns) + titles, heads, *rows])


def of_job(fit: Fit, config: Config) -> list[str]:
    """The job's model under every scheme on this hardware."""
    here, found = fit.hardware, []
    if not here.gpus:
        for scheme in FACTS:
            if reason := fit.unserved(scheme):
                found.append(f"{scheme.value:<10} {reason}")
            else:
                memory = fit.memory(scheme)
                fits = "fits" if fit.fits(scheme) else "doesn't fit"
                found.append(f"{scheme.value:<10} {memory.weights / 1e9:>8.3f} GB of weights, {fits}")
        return found
    gpu = min(here.gpus, key=lambda g: g.memory)
    made = lines(
        capacity.parameters(fit.tensors),
        fit.tensors,
        fit.shape,
        gpu,
        schemes=tuple(FACTS),
        max_model_len=config.engine.max_model_len,
        ignore=fit.ignore,
        group_size=config.quantization.group_size,
    )
    for line in made:
        found.append(f"{line.scheme.value:<10} {line.reason or f'{line.stored / 1e9:>8.3f} GB' + _served(line)}")
    return found


def _served(line: Line) -> str:
    if line.reason:
        return f"  {'not served':<36}"
    if line.layout is None:
        return f"  {'more than 64':<36}"
    ways = [f"tp {line.layout.tensor}"] * (line.layout.tensor > 1) + [f"pp {line.layout.pipeline}"] * (
        line.layout.pipeline > 1
    )
    gpus = f"{line.layout.gpus}" + (f" ({' x '.join(ways)})" if ways else "")
    speed = f"{_round(line.tokens_per_second):>11,}" if line.tokens_per_second else f"{'unknown':>11}"
    return f"  {gpus:<16}{_thousands(line.kv_tokens):>9}{speed}"


def nominal_words(size: int) -> str:
    """A nameplate's round figure: whole gigabytes, tens of them from 200 on."""
    gigabytes = size / 1e9
    return f"{math.floor(gigabytes / 10 + 0.5) * 10 if gigabytes >= 200 else math.floor(gigabytes + 0.5)} GB"


def _thousands(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count // 1000}k"


def _round(value: float) -> int:
    """Three figures: it is an estimate."""
    return int(float(f"{value:.3g}"))


def _short(gpu: Gpu) -> str:
    return f"{gpu.name.removeprefix('NVIDIA ')}, {gpu.memory / MIB / 1024:.0f} GiB"
