"""Tiled plans: which are worth predicting, and their predicted time.

seconds = start + ‖(memory, work)‖₄ + launch overhead
memory  = bytes / bandwidth, weights and x once; what further tiles read again comes from L2 and hides
work    = Σ over rounds of resident blocks: fill + steps · ‖(blocks on an SM · products of a step, latency of a stage)‖₃

The latency of memory is spread over the pipeline's stages; the last round may leave an SM with fewer blocks. All of it
holds for a symbolic number of rows too. The constants are measured (efficiency.json).
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from ...cost.amounts import ceil_div
from ...fused import MatmulFamily
from ...machine import Machine
from .footprint import REGISTERS_PER_THREAD, registers, resident_blocks, shared_memory
from .plans import Plan
from .writer import norm_mode

LEAST_ROWS = 49  # fewer leave too much of a tile empty
ACCUMULATORS = 128  # registers of a thread for the products; more leave too few for the rest
DESCRIPTOR_STEP = 16  # bytes: rows of a matrix that a descriptor holds lie multiples of it apart


@dataclass(frozen=True)
class TileConstants:
    """Seconds: `start` before the first and after the last step, `fill` for each round of blocks, `latency` of memory,
    `x_element` of an SM per element of x that a folded norm handles. Fractions of the machine's rates that steady tiles
    reach: `compute` of its matrix units', `memory` of its (copy) bandwidth."""

    start: float
    fill: float
    latency: float
    x_element: float
    compute: float
    memory: float


@functools.cache
def constants() -> TileConstants:
    raw: dict[str, Any] = json.loads((resources.files(__package__) / "efficiency.json").read_text())
    return TileConstants(**raw["tile"])


def refusal(op: MatmulFamily, machine: Machine) -> str | None:
    """Why no tiled kernel is made for `op`, in a sentence."""
    if machine.kind != "cuda" or machine.capability < 90:
        return f"{machine.name} ({machine.arch}) has no copy engine for tiles (Hopper and newer have)"
    if op.dtype == torch.float32:
        return "tiled kernels are made for 16-bit types; in float32 the vendor's GEMM is the better one"
    if any(int(size) * op.dtype.itemsize % DESCRIPTOR_STEP for size in (op.k, op.n if op.weight_is_kn else op.k)):
        return f"rows of its matrices are no multiple of {DESCRIPTOR_STEP} bytes, which the copy engine needs; pad them"
    if norm_mode(op, Plan("tile", 64, 64, 64, 4)) == "first":
        return "a tiled kernel folds no norm that needs a pass over x of its own"
    return None


def plans(op: MatmulFamily, machine: Machine, rows: int) -> Iterator[Plan]:
    """Every tiled plan for `rows` rows that fits `machine`."""
    if rows < LEAST_ROWS or refusal(op, machine):
        return
    for block_m, block_n, block_k, stages in itertools.product((64, 128), (32, 64, 128), (64, 128), (3, 4, 6)):
        for warps in (4, 8):
            plan = Plan("tile", block_m, block_n, block_k, warps, stages)
            products = op.weights * block_m * block_n // (32 * warps)
            # four warps are one group of the matrix unit, 64 rows high; handling x keeps a second one from its products
            starved = warps == 8 and (block_m < 128 or products < (ACCUMULATORS if op.norm else ACCUMULATORS // 2))
            if block_m > 64 * math.ceil(rows / 64) or products > ACCUMULATORS or starved:
                continue
            if shared_memory(op, plan) <= machine.shared_memory and registers(op, plan) <= REGISTERS_PER_THREAD:
                yield plan


def seconds(op: MatmulFamily, plan: Plan, machine: Machine, moved: Any, m: Any) -> Any:
    """Predicted time for `m` rows (a number or sympy) where the kernel moves `moved` bytes."""
    known = constants()
    sms = machine.num_sms
    blocks = ceil_div(m, plan.rows) * math.ceil(int(op.n) / plan.block_n)
    steps = math.ceil(int(op.k) / plan.block_k)
    products = 2 * op.weights * plan.rows * plan.block_n * plan.block_k
    busy = products / (machine.rate(op.dtype) * known.compute / sms)
    if op.norm:
        busy += known.x_element * plan.rows * plan.block_k
    waiting = known.latency / (plan.num_stages - 1)
    resident = resident_blocks(op, plan, machine)
    rounds = ceil_div(blocks, sms * resident)
    last = ceil_div(blocks - (rounds - 1) * sms * resident, sms)
    whole = ((resident * busy) ** 3 + waiting**3) ** (1 / 3)
    work = rounds * known.fill + steps * ((rounds - 1) * whole + ((last * busy) ** 3 + waiting**3) ** (1 / 3))
    memory = moved / (machine.memory_bandwidth * known.memory)
    return known.start + machine.launch_overhead + (memory**4 + work**4) ** 0.25
