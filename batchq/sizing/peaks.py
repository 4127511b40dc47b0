"""What each kind of GPU can do at most, by its vendor's datasheet."""

from __future__ import annotations

import re
from collections.abc import Iterable

from batchq.config import Scheme

# Dense peaks in teraFLOPS by the vendor's datasheets: (16 bits, 8 bits). Of the names that are part
# of NVML's name the longest counts.
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

# Memory bandwidth in terabytes per second by the same sheets; the largest of those that go by one name.
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


def peak(accelerator: str, scheme: Scheme) -> float | None:
    """Dense FLOP/s of one device, in the bits that the scheme is multiplied in; None if it isn't in the list.
    `accelerator`: its name, as NVML gives it."""
    name = _longest(PEAKS, accelerator)
    if name is None or scheme is Scheme.nvfp4:  # which is multiplied in 4
        return None
    return PEAKS[name][scheme in EIGHT_BITS] * 1e12


def bandwidth(accelerator: str) -> float | None:
    """Bytes per second that one device reads from its memory at most; None if it isn't in the list."""
    name = _longest(BANDWIDTHS, accelerator)
    return None if name is None else BANDWIDTHS[name] * 1e12


def _longest(names: Iterable[str], accelerator: str) -> str | None:
    matching = [name for name in names if re.search(rf"\b{name}\b", accelerator)]
    return max(matching, key=len, default=None)
