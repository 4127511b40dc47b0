"""What each quantization scheme is: how it stores a weight, how it is made, and what serves it. No torch.

"Served" is what vLLM 0.26 and 0.32 do with a compressed-tensors checkpoint: read from their kernels' own conditions,
and tried (benchmarks/LOG.md) where a machine was at hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batchq.config import Scheme
from batchq.errors import ConfigError
from batchq.machine.hardware import Hardware

GROUPS = (128, 64, 32)  # weights that share a scale, most wanted first: vLLM's 4-bit kernels know these
BLOCK = 128  # the side of FP8's blocks; also what the W4A8 kernel's matrices have to be multiples of


@dataclass(frozen=True, slots=True)
class SchemeSpec:
    """One scheme. `since` and `before` bound the compute capability of the GPUs that serve it."""

    words: str  # for a table
    bits: int  # of a stored weight
    algorithm: str
    calibrated: bool = False
    grouped: bool = False  # scales by groups of columns; otherwise one per row
    since: tuple[int, int] = (7, 0)
    before: tuple[int, int] = (99, 0)
    cpu: bool = False


SCHEMES = {
    Scheme.none: SchemeSpec("as it is", 16, "none", cpu=True),
    Scheme.fp8: SchemeSpec("FP8, one scale per row and per token", 8, "rtn", since=(8, 9)),
    Scheme.fp8_gptq: SchemeSpec("FP8, SmoothQuant and GPTQ", 8, "smoothquant+gptq", True, since=(8, 9)),
    Scheme.fp8_block: SchemeSpec("FP8, one scale per block of 128 x 128", 8, "rtn", since=(8, 9)),
    Scheme.int8: SchemeSpec(
        "INT8, SmoothQuant and GPTQ", 8, "smoothquant+gptq", True, since=(8, 0), before=(10, 0), cpu=True
    ),
    Scheme.int8_rtn: SchemeSpec("INT8, rounded", 8, "rtn", since=(8, 0), before=(10, 0), cpu=True),
    Scheme.w8a16: SchemeSpec("8-bit weights alone", 8, "rtn", since=(8, 0)),
    Scheme.w4a16: SchemeSpec("4-bit weights alone, GPTQ", 4, "gptq", True, grouped=True, since=(8, 0), cpu=True),
    Scheme.w4a16_awq: SchemeSpec("4-bit weights alone, AWQ", 4, "awq", True, grouped=True, since=(8, 0), cpu=True),
    Scheme.w4a8_fp8: SchemeSpec(
        "4-bit weights, FP8 activations, GPTQ", 4, "gptq", True, grouped=True, since=(9, 0), before=(10, 0)
    ),
    Scheme.nvfp4: SchemeSpec("NVFP4 weights and activations", 4, "rtn", True, since=(10, 0)),
    Scheme.sparse24: SchemeSpec("2:4 pruned by SparseGPT, served dense", 16, "sparsegpt", True, cpu=True),
}

# From the most frugal to the model itself: what the gate tries next when a scheme costs too much quality. Each is
# cheaper to serve than what comes after it, on hardware that serves both.
LADDER = (
    Scheme.w4a16_awq,
    Scheme.w4a16,
    Scheme.w4a8_fp8,
    Scheme.nvfp4,
    Scheme.int8_rtn,
    Scheme.int8,
    Scheme.fp8,
    Scheme.fp8_gptq,
    Scheme.fp8_block,
    Scheme.w8a16,
    Scheme.none,
)

# Weights and activations of a compressed-tensors checkpoint. Which of several algorithms made it can't be seen.
STORED = {
    ("float8 per channel", "dynamic float8 per token"): Scheme.fp8,
    ("int8 per channel", "dynamic int8 per token"): Scheme.int8_rtn,
}


def fallback_after(scheme: Scheme, named: Sequence[Scheme] | None) -> tuple[Scheme, ...]:
    """What the gate may try after a scheme: as named in gate.fallback, or else what comes after it on the ladder."""
    if named is not None:
        return tuple(named)
    return LADDER[LADDER.index(scheme) + 1 :] if scheme in LADDER else (Scheme.none,)


def stored_scheme(config: Mapping[str, Any]) -> Scheme:
    """What a checkpoint is by its config.json: `none` unless it is stored as STORED has it."""
    section = config.get("quantization_config") or {}
    groups = list((section.get("config_groups") or {}).values())
    kinds = {(_stored_as(group.get("weights")), _stored_as(group.get("input_activations"))) for group in groups}
    return STORED.get(kinds.pop(), Scheme.none) if len(kinds) == 1 else Scheme.none


def _stored_as(numbers: Mapping[str, Any] | None) -> str:
    if not numbers:
        return ""
    dynamic = "dynamic " if numbers.get("dynamic") else ""
    return f"{dynamic}{numbers.get('type', 'int')}{numbers.get('num_bits', 8)} per {numbers.get('strategy', 'tensor')}"


def group_size(scheme: Scheme, columns: Iterable[int], wanted: int | None) -> int | None:
    """How many columns share a scale: the largest of GROUPS that divides all, or `wanted`; None for whole rows.

    Raises ConfigError for a `wanted` that some matrix can't be cut into.
    """
    widths = sorted(set(columns))
    if scheme is Scheme.nvfp4:
        return 16
    if not SCHEMES[scheme].grouped:
        return None
    if wanted is not None:
        if odd := [width for width in widths if width % wanted]:
            fits = [size for size in GROUPS if not any(width % size for width in widths)]
            choices = ", ".join(map(str, fits)) or "none; leave it unset for one scale per row"
            raise ConfigError(
                f"quantization.group_size={wanted}: this model has matrices of {odd[0]} columns; what fits: {choices}"
            )
        return wanted
    return next((size for size in GROUPS if not any(width % size for width in widths)), None)


def unserved(scheme: Scheme, hardware: Hardware, shapes: Iterable[tuple[str, int, int]]) -> str | None:
    """Why vLLM can't serve the scheme here, or None. `shapes`: name, rows and columns of each matrix it quantizes."""
    spec, capability = SCHEMES[scheme], hardware.capability
    if capability is None:
        return None if spec.cpu else "vLLM serves it on GPUs only"
    name = f"{hardware.accelerator} (compute capability {capability[0]}.{capability[1]})"
    if capability < spec.since:
        return f"it takes a compute capability of {spec.since[0]}.{spec.since[1]}, and {name} is older"
    if capability >= spec.before:
        return f"vLLM has no kernel of it for {name}"
    if scheme is Scheme.w4a8_fp8:
        for _, rows, columns in shapes:
            if rows % BLOCK or columns % BLOCK:
                return f"its kernel wants multiples of {BLOCK}, and this model has a matrix of {rows} x {columns}"
    if scheme is Scheme.fp8_block:
        for layer, rows, _ in shapes:  # the last of matrices that vLLM merges into one may end in a part of a block
            if re.search(r"\.(q_proj|k_proj|gate_proj)$", layer) and rows % BLOCK:
                return f"vLLM merges matrices by blocks of {BLOCK} rows, and this model's {layer} has {rows}"
    return None
