"""Scheme x model x GPU -> what is stored, how many GPUs hold it, what is left for the KV cache, and how fast to expect
it: the table of `plan`. From shapes alone, without weights or torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from batchq.config import Config, QuantizationConfig, Scheme
from batchq.machine.hardware import Gpu, Hardware
from batchq.model import kv_cache
from batchq.model.folder import is_tied
from batchq.model.scheme import SCHEMES, unserved
from batchq.model.tensors import Shape, linear_parameters, matrices, parameters
from batchq.quantize.sizes import Quantization, predicted_bytes
from batchq.sizing.fit import Fit
from batchq.sizing.memory import Parallelism, parallelism_for
from batchq.sizing.peaks import EIGHT_BITS, peak
from batchq.sizing.shapes import Published, published

MIB = 1 << 20
# Memory as NVML gives it.
REFERENCE = (
    Gpu("NVIDIA H100 80GB HBM3", 81559 * MIB, 81559 * MIB, (9, 0), ""),
    Gpu("NVIDIA H200", 143771 * MIB, 143771 * MIB, (9, 0), ""),
)
SHOWN = (Scheme.none, Scheme.fp8, Scheme.int8, Scheme.w8a16, Scheme.w4a16, Scheme.w4a8_fp8)
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
    parallelism: Parallelism | None
    kv_tokens: int
    tokens_per_second: float | None  # of prefill, on all the GPUs together; None where the peak isn't known
    reason: str | None  # why it can't be served


def lines(
    shape: Shape,
    gpu: Gpu,
    nominal: int,
    quantization: QuantizationConfig,
    schemes: Sequence[Scheme] = SHOWN,
    max_model_len: int = 2048,
) -> list[Line]:
    """What each scheme makes of the model on GPUs of one kind. `nominal`: parameters on the nameplate."""
    return [_line(shape, gpu, nominal, quantization, scheme, max_model_len) for scheme in schemes]


def _line(
    shape: Shape, gpu: Gpu, nominal: int, quantization: QuantizationConfig, scheme: Scheme, max_model_len: int
) -> Line:
    how = Quantization.of(scheme, shape.tensors, quantization.ignore, quantization.group_size)
    ways = parallelism_for(shape, how, gpu.memory, max_model_len=max_model_len)
    of_one_gpu = Hardware((gpu,), (), "", frozenset(), 0)
    return Line(
        scheme,
        nominal * SCHEMES[scheme].bits // 8,
        predicted_bytes(shape.tensors, how, tied=is_tied(shape.config)),
        ways,
        ways.kv_bytes // kv_cache.bytes_per_token(shape.config) if ways else 0,
        expected(scheme, gpu.name, shape, ways.gpus) if ways else None,
        unserved(scheme, of_one_gpu, matrices(shape.tensors, quantization.ignore)),
    )


def of_scheme(fit: Fit, scheme: Scheme, gpus: int) -> float | None:
    """Prompt tokens per second of the job's model under a scheme on so many of the GPUs here; None where that can't be
    said: without a GPU, and for a model that is quantized already."""
    if not fit.hardware.gpus or fit.model.quantized:
        return None
    return expected(scheme, fit.hardware.accelerator, fit.shape, gpus)


def expected(scheme: Scheme, accelerator: str, shape: Shape, gpus: int) -> float | None:
    """Prompt tokens per second on so many GPUs: the share of the peak that was reached (DENSE, EXPERTS) x peak / (2 x
    linear parameters), attention left out; None where the peak isn't known."""
    top = peak(accelerator, scheme)
    if top is None:
        return None
    reached = EXPERTS if any(".experts." in tensor.name for tensor in shape.tensors) else DENSE
    bits = 8 if scheme in EIGHT_BITS else 0 if scheme in WEIGHTS_ONLY else 16
    return reached[bits] * top / (2 * linear_parameters(shape)) * gpus


# ---- words ----


def table() -> str:
    """`plan` without a job: published models on 80 GB and 141 GB GPUs."""
    blocks = [_block(model) for model in published()]
    notes = (
        "nominal: parameters on the nameplate x bits. stored: with embeddings, heads, routers, towers and scales as",
        "they are really stored. GPUs: the fewest that hold it and one row of 2,048 tokens; tp and pp: tensor and",
        "pipeline parallel. KV: tokens that fit beside it. tokens/s: of prompts, on those GPUs; what vLLM reached of",
        "the peak on an 8B shape (61% in 16 bits, 44% in 8, 56% of weights only) or with experts on Scout's (42%, 30%,",
        "23%), without what parallelism costs.",
        "A job's own model: plan job=NAME.",
    )
    return "\n\n".join(blocks) + "\n\n" + "\n".join(notes)


def _block(model: Published) -> str:
    total, linear = parameters(model.shape.tensors), linear_parameters(model.shape)
    head = f"{model.name} · {total / 1e9:.1f}B parameters stored, {linear / 1e9:.1f}B multiplied for a prompt token"
    columns = f"  {'':<10}{'nominal':>8}{'stored':>11}"
    titles = "".join(f"  {_short(gpu):^36}" for gpu in REFERENCE)
    heads = f"{columns}" + f"  {'GPUs':<16}{'KV':>9}{'tokens/s':>11}" * len(REFERENCE)
    by_gpu = [lines(model.shape, gpu, model.parameters, QuantizationConfig()) for gpu in REFERENCE]
    rows = [
        f"  {first.scheme.value:<10}{nominal_words(first.nominal):>8}{first.stored / 1e9:>8.1f} GB"
        + "".join(_served(line) for line in (first, *others))
        for first, *others in zip(*by_gpu, strict=True)
    ]
    return "\n".join([head, " " * len(columns) + titles, heads, *rows])


def of_job(fit: Fit, config: Config) -> list[str]:
    """The job's model under every scheme on this hardware."""
    gpus = fit.hardware.gpus
    if not gpus:
        return [f"{scheme.value:<10} {_on_cpu(fit, scheme)}" for scheme in SCHEMES]
    smallest, nominal = min(gpus, key=lambda gpu: gpu.memory), parameters(fit.shape.tensors)
    made = lines(fit.shape, smallest, nominal, config.quantization, tuple(SCHEMES), config.engine.max_model_len)
    return [f"{x.scheme.value:<10} {x.reason or f'{x.stored / 1e9:>8.3f} GB' + _served(x)}" for x in made]


def _on_cpu(fit: Fit, scheme: Scheme) -> str:
    if reason := fit.unserved(scheme):
        return reason
    fits = "fits" if fit.fits(scheme) else "doesn't fit"
    return f"{fit.memory(scheme).weights / 1e9:>8.3f} GB of weights, {fits}"


def _served(line: Line) -> str:
    if line.reason:
        return f"  {'not served':<36}"
    if line.parallelism is None:
        return f"  {'more than 64':<36}"
    tensor, pipeline = line.parallelism.tensor, line.parallelism.pipeline
    ways = [f"tp {tensor}"] * (tensor > 1) + [f"pp {pipeline}"] * (pipeline > 1)
    gpus = f"{line.parallelism.gpus}" + (f" ({' x '.join(ways)})" if ways else "")
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
