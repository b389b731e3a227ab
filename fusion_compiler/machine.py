"""The machines that decisions are made for: a table of known ones, and detection of the one at hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch


@dataclass(frozen=True)
class Machine:
    """What the cost model needs to know of a device. Rates are what kernels reach, not datasheet peaks.

    flops: matmul FLOP/s by dtype; vector_flops: float32 FLOP/s of the ordinary (non-matrix) units;
    memory_bandwidth, l2_bandwidth: bytes/s; sizes in bytes; times in seconds.
    """

    name: str
    kind: Literal["cuda", "rocm", "cpu"]
    arch: str  # "sm_90", "gfx942", "x86-64" …
    flops: dict[torch.dtype, float] = field(hash=False)
    vector_flops: float
    memory_bandwidth: float
    l2_bytes: int
    l2_bandwidth: float
    shared_memory: int  # per block, the most a kernel may ask for
    num_sms: int
    launch_overhead: float  # device-side cost of one more kernel in a stream or a CUDA graph
    source: str = ""  # where the figures come from
