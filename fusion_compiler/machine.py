"""The machines that decisions are made for: a table of known ones, and detection of the one at hand.

Rates are what kernels reach. The H200's are measured; the others are data-sheet figures times the fraction of the
data sheet that the H200 reached (90 % of its memory bandwidth, 80 % of its dense matrix rate), and say so.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Machine:
    """What the cost model needs to know of a device. Rates are what kernels reach, not datasheet peaks.

    flops: matmul FLOP/s by dtype; vector_flops: float32 FLOP/s of the ordinary (non-matrix) units;
    memory_bandwidth, l2_bandwidth: bytes/s; sizes in bytes; times in seconds.
    On a CPU `l2_*` describe the last-level cache, `num_sms` the cores, `shared_memory` one core's L2.
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
    # Fresh pages of a large buffer cost a fault each on a CPU; None where the allocator keeps memory mapped (GPUs).
    first_touch_bandwidth: float | None = None
    first_touch_bytes: int = 0  # buffers larger than this are mapped afresh at every allocation

    def rate(self, dtype: torch.dtype) -> float:
        """Matmul FLOP/s for `dtype`; a type the machine has no figure for runs on the ordinary units."""
        return self.flops.get(dtype, self.vector_flops)

    @property
    def capability(self) -> int:
        """90 for "sm_90", 0 where there is no such number."""
        return int(self.arch[3:]) if self.arch.startswith("sm_") else 0


MEMORY_REACHED = 4.3 / 4.8  # H200: copy bandwidth measured over data sheet
MATRIX_REACHED = 790 / 989  # H200: bf16 matmul measured over data sheet (dense)


def _gpu(
    name: str,
    arch: str,
    *,
    tb_s: float,
    half: float,
    single: float,
    l2_mb: float,
    l2_tb_s: float,
    smem_kb: int,
    sms: int,
    fp8: float | None = None,
    int8: float | None = None,
    bf16: bool = True,
    source: str,
) -> Machine:
    """A GPU from data-sheet figures (TB/s, dense TFLOP/s), derated to what kernels reach."""
    reach = MATRIX_REACHED * 1e12
    flops = {torch.float16: half * reach, torch.float32: single * reach}
    if bf16:
        flops[torch.bfloat16] = half * reach
    if fp8 is not None:
        flops[torch.float8_e4m3fn] = flops[torch.float8_e5m2] = fp8 * reach
    if int8 is not None:
        flops[torch.int8] = int8 * reach
    return Machine(
        name=name,
        kind="rocm" if arch.startswith("gfx") else "cuda",
        arch=arch,
        flops=flops,
        vector_flops=single * reach,
        memory_bandwidth=tb_s * MEMORY_REACHED * 1e12,
        l2_bytes=int(l2_mb * 2**20),
        l2_bandwidth=l2_tb_s * 1e12,
        shared_memory=smem_kb * 1024,
        num_sms=sms,
        launch_overhead=1.5e-6,
        source=source,
    )


_DERATED = "data sheet, derated"

TABLE: dict[str, Machine] = {
    m.name: m
    for m in (
        _gpu(
            "h200", "sm_90", tb_s=4.8, half=989, single=67, fp8=1979, int8=1979, l2_mb=60, l2_tb_s=7.0, smem_kb=227,
            sms=132, source="bf16 and memory measured (torch 2.11, triton 3.6), rest data sheet, derated",
        ),
        _gpu(
            "h100", "sm_90", tb_s=3.35, half=989, single=67, fp8=1979, int8=1979, l2_mb=50, l2_tb_s=6.5, smem_kb=227,
            sms=132, source="H100 SXM5 " + _DERATED,
        ),
        _gpu(
            "a100", "sm_80", tb_s=2.039, half=312, single=19.5, int8=624, l2_mb=40, l2_tb_s=4.5, smem_kb=163,
            sms=108, source="A100 SXM4 80 GB " + _DERATED,
        ),
        _gpu(
            "l4", "sm_89", tb_s=0.3, half=121, single=30.3, fp8=242, int8=242, l2_mb=48, l2_tb_s=1.5, smem_kb=99,
            sms=58, source="L4 " + _DERATED,
        ),
        _gpu(
            "rtx4090", "sm_89", tb_s=1.008, half=165.2, single=82.6, fp8=330.3, int8=660.6, l2_mb=72, l2_tb_s=4.5,
            smem_kb=99, sms=128, source="GeForce RTX 4090 (float32 accumulation) " + _DERATED,
        ),
        _gpu(
            "v100", "sm_70", tb_s=0.9, half=125, single=15.7, l2_mb=6, l2_tb_s=2.1, smem_kb=96, sms=80, bf16=False,
            source="V100 SXM2 (no bf16 matrix units) " + _DERATED,
        ),
        _gpu(
            "mi300x", "gfx942", tb_s=5.3, half=1307, single=163.4, fp8=2615, int8=2615, l2_mb=256, l2_tb_s=11.9,
            smem_kb=64, sms=304, source="MI300X (Infinity Cache taken as L2) " + _DERATED,
        ),
    )
}  # fmt: skip


def machine(which: str | Machine | None = None) -> Machine:
    """The machine named, given, or (None) at hand: the current CUDA/ROCm device if there is one, else the CPU."""
    if isinstance(which, Machine):
        return which
    if which is None:
        return _current_gpu() if torch.cuda.is_available() else _current_cpu()
    if not isinstance(which, str):
        raise TypeError(f"machine must be a name, a Machine or None, not {type(which).__name__}")
    if which == "cpu":
        return _current_cpu()
    if which not in TABLE:
        raise ValueError(f"unknown machine {which!r}; known: {', '.join([*TABLE, 'cpu'])}, or pass a Machine")
    return TABLE[which]


# ---- GPUs ---------------------------------------------------------------------------------------
def _current_gpu() -> Machine:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return from_properties(properties, "rocm" if torch.version.hip else "cuda")


def from_properties(properties: Any, kind: Literal["cuda", "rocm"]) -> Machine:
    """The table's row for a device, or one scaled from the nearest architecture by SM count and memory bus."""
    words = re.sub(r"[^a-z0-9]+", " ", properties.name.lower())
    for key, row in TABLE.items():
        label = "rtx 4090" if key == "rtx4090" else key
        if row.kind == kind and re.search(rf"\b{label}\b", words) and properties.multi_processor_count == row.num_sms:
            return row
    base = _nearest(properties, kind)
    share = properties.multi_processor_count / base.num_sms
    bus = _bus_bandwidth(properties)
    arch = getattr(properties, "gcnArchName", "").split(":")[0] if kind == "rocm" else ""
    return dataclasses.replace(
        base,
        name=re.sub(r"\s+", "-", words.strip()),
        arch=arch or (f"sm_{properties.major}{properties.minor}" if kind == "cuda" else base.arch),
        flops={dtype: rate * share for dtype, rate in base.flops.items()},
        vector_flops=base.vector_flops * share,
        memory_bandwidth=bus * MEMORY_REACHED if bus else base.memory_bandwidth * share,
        l2_bytes=getattr(properties, "L2_cache_size", 0) or base.l2_bytes,
        l2_bandwidth=base.l2_bandwidth * share,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", 0) or base.shared_memory,
        num_sms=properties.multi_processor_count,
        source=f"not in the table: scaled from {base.name} by {properties.multi_processor_count}/{base.num_sms} SMs",
    )


def _nearest(properties: Any, kind: Literal["cuda", "rocm"]) -> Machine:
    if kind == "rocm":
        return TABLE["mi300x"]
    capability = 10 * properties.major + properties.minor
    rows = {90: "h100", 89: "l4", 80: "a100", 70: "v100"}
    return TABLE[next((row for sm, row in rows.items() if capability >= sm), "v100")]


def _bus_bandwidth(properties: Any) -> float:
    """Data-sheet bytes/s from the memory clock (kHz) and bus width, 0 where the driver does not tell."""
    clock = getattr(properties, "memory_clock_rate", 0) or 0
    width = getattr(properties, "memory_bus_width", 0) or 0
    return 2.0 * clock * 1e3 * width / 8


# ---- CPUs ---------------------------------------------------------------------------------------
# Per core, measured on a 2-core AMD EPYC (Zen 4) virtual machine, torch 2.13.
_CORE_GHZ = 2.75
_CORE_BANDWIDTH = 17e9  # bytes/s one core draws from memory
_SOCKET_BANDWIDTH = 200e9
_CORE_CACHE_BANDWIDTH = 85e9
_CORE_FIRST_TOUCH = 0.5e9
_MMAP_THRESHOLD = 32 * 2**20  # glibc maps larger blocks afresh each time, whatever was freed before


def cpu_machine(cores: int, last_level_cache: int, simd: str, *, core_cache: int = 2**20, arch: str = "") -> Machine:
    """A CPU from its cores, caches and the best SIMD level: "amx", "avx512_bf16", "avx512", "avx2", "neon".

    All figures are estimated from these, not timed: a timing would differ from run to run, and with it the decisions
    and the cache keys that depend on them.
    """
    lanes = {"amx": 32, "avx512_bf16": 32, "avx512": 32, "avx2": 32, "neon": 16}.get(simd)
    if lanes is None:
        raise ValueError(f"unknown SIMD level {simd!r}; known: amx, avx512_bf16, avx512, avx2, neon")
    single = cores * lanes * _CORE_GHZ * 1e9
    # Without instructions for it bf16 is widened to fp32 and rounded back: slower than fp32 itself.
    bf16 = {"amx": 8.0, "avx512_bf16": 2.5}.get(simd, 0.6)
    return Machine(
        name="cpu",
        kind="cpu",
        arch=arch or platform.machine(),
        flops={torch.float32: single, torch.bfloat16: bf16 * single, torch.float16: 0.28 * single,
               torch.float64: single / 2},
        vector_flops=single,
        memory_bandwidth=min(cores * _CORE_BANDWIDTH, _SOCKET_BANDWIDTH),
        l2_bytes=last_level_cache,
        l2_bandwidth=cores * _CORE_CACHE_BANDWIDTH,
        shared_memory=core_cache,
        num_sms=cores,
        launch_overhead=5e-6,
        source=f"{cores} cores, {simd}; estimated per core from a measured EPYC",
        first_touch_bandwidth=min(cores, 8) * _CORE_FIRST_TOUCH,
        first_touch_bytes=_MMAP_THRESHOLD,
    )  # fmt: skip


def _current_cpu() -> Machine:
    return _detected_cpu(torch.get_num_threads())


@functools.lru_cache(maxsize=8)
def _detected_cpu(cores: int) -> Machine:
    core_cache, last_level = _cache_sizes()
    return cpu_machine(cores, last_level, _simd(), core_cache=core_cache)


def _simd() -> str:
    probes: tuple[tuple[str, str], ...] = (
        ("amx", "_is_amx_tile_supported"), ("avx512_bf16", "_is_avx512_bf16_supported"),
    )  # fmt: skip
    for level, probe in probes:
        supported: Callable[[], bool] | None = getattr(torch.cpu, probe, None)
        if supported is not None and supported():
            return level
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability.startswith(("avx512", "avx2")):
        return "avx512" if capability.startswith("avx512") else "avx2"
    return "neon" if platform.machine().lower() in ("arm64", "aarch64") else "avx2"


def _cache_sizes() -> tuple[int, int]:
    """(one core's L2, last-level cache) in bytes, as the kernel tells; 1 MiB and 1.5 MiB per core where it does not."""
    sizes: dict[int, int] = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, size = int((index / "level").read_text()), (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        match = re.fullmatch(r"(\d+)([KM])", size)
        if match and level >= 2:
            sizes[level] = int(match[1]) * (2**20 if match[2] == "M" else 2**10)
    core = sizes.get(2, 2**20)
    return core, sizes[max(sizes)] if sizes else (os.cpu_count() or 1) * 3 * 2**19
