"""What a checkpoint holds, from the headers of its safetensors files: names, dtypes and shapes."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchq.config import IGNORE
from batchq.errors import ModelError
from batchq.model.folder import read_config, text_config, weight_files

BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

# Tensors that no scheme quantizes: not of Linear layers, or of layers that llm-compressor is told to leave.
UNQUANTIZED = re.compile(r"(^|\.)(embed\w*|wte|wpe|\w*embeddings?|\w*norm\w*|ln_\w+)\.")

TOWER = re.compile(r"vision|visual|audio|projector")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor; dtype in safetensors' words (BF16, I8, F8_E4M3...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Shape:
    """A model without its numbers: its tensors, and its config.json."""

    tensors: Sequence[Tensor]
    config: dict[str, Any]


def read_shape(folder: str | Path) -> Shape:
    """The shape of the model in a folder. Raises ModelError for a file that can't be read."""
    return Shape(read_tensors(folder), read_config(folder))


def read_tensors(folder: str | Path) -> tuple[Tensor, ...]:
    """All tensors of a checkpoint, from the headers of its safetensors files.

    Raises ModelError for a file that is cut short or isn't safetensors.
    """
    tensors: list[Tensor] = []
    for path in weight_files(folder):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > path.stat().st_size:
                    raise ValueError("header longer than the file")
                header = json.loads(file.read(length))
                end = (
                    8
                    + length
                    + max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
                )
        except (struct.error, ValueError, KeyError) as error:
            raise ModelError(f"{path}: not a safetensors file") from error
        if end != path.stat().st_size:
            raise ModelError(
                f"{path}: {path.stat().st_size} bytes where its header says {end}: a copy that was cut short"
            )
        tensors += [Tensor(k, v["dtype"], tuple(v["shape"])) for k, v in header.items() if k != "__metadata__"]
    return tuple(tensors)


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors as they are stored, headers aside."""
    return sum(tensor.bytes for tensor in tensors)


def parameters(tensors: Iterable[Tensor]) -> int:
    """Weights and biases, scales and zero points aside."""
    return sum(t.elements for t in tensors if not t.name.endswith(("_scale", "_zero_point", "_shape", "_g_idx")))


def is_quantized(tensor: Tensor, ignore: Iterable[str] = IGNORE) -> bool:
    """Whether llm-compressor would quantize it: the matrix of a Linear layer, or a stack of experts' matrices."""
    layer = tensor.name.removesuffix(".weight")
    matrix = len(tensor.shape) == 2 and layer != tensor.name
    experts = len(tensor.shape) == 3 and ".experts." in layer
    if not (matrix or experts) or UNQUANTIZED.search(tensor.name) or BITS[tensor.dtype] < 16:
        return False
    return not any(re.match(name[3:], layer) if name.startswith("re:") else name == layer for name in ignore)


def matrices(tensors: Iterable[Tensor], ignore: Iterable[str]) -> list[tuple[str, int, int]]:
    """Name, rows and columns of each matrix that is quantized."""
    ignore = tuple(ignore)
    quantized = (t for t in tensors if is_quantized(t, ignore))
    return [(t.name.removesuffix(".weight"), t.shape[-2], t.shape[-1]) for t in quantized]


def linear_parameters(shape: Shape) -> int:
    """Weights that one prompt token is multiplied with: of a mixture's experts those that a token is routed to. Without
    embeddings (looked up), the head (asked once for each prompt) and towers."""
    return round(sum(share * tensor.elements for tensor, share in multiplied(shape)))


def multiplied(shape: Shape) -> Iterator[tuple[Tensor, float]]:
    """The matrices that a prompt token is multiplied with, and which share of each."""
    text = text_config(shape.config)
    experts = text.get("num_local_experts") or text.get("num_experts") or text.get("n_routed_experts") or 1
    used = text.get("num_experts_per_tok") or 1
    for tensor in shape.tensors:
        if is_quantized(tensor) and not TOWER.search(tensor.name):
            yield tensor, used / experts if ".experts." in tensor.name else 1
