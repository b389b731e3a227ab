"""Tiled plans: which are worth predicting, and their predicted time.

seconds = start + ‖(memory, work)‖₄ + launch overhead
memory  = bytes / bandwidth: x once, the weights once for each group of tiles; what else is read again comes from L2
work    = fill · tiles that follow each other on an SM + ‖(walk, flops / rate that all units sustain together)‖₈
walk    = Σ over rounds of resident blocks: steps · ‖(blocks on an SM · products of a step, latency of a stage)‖₃

An SM alone is faster than all of them together, which the power limit slows down: that is why a last round that is half
empty costs less than its half. The latency of memory is spread over the pipeline's stages; the last round may leave an
SM with fewer blocks. A second block on an SM works while the first begins and ends. A folded norm's way through
registers is a chain of its own in each step, which only other blocks can hide. Blocks that share the last round's tiles
walk less and pay for the sums that they hand on. All of it holds for a symbolic number of rows too, except of those.
The constants are measured (efficiency.json).
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch

from ...cost.amounts import ceil_div
from ...fused import MatmulFamily
from ...machine import Machine
from .footprint import REGISTERS_PER_THREAD, registers, resident_blocks, shared_memory
from .plans import Plan
from .writer import norm_mode

LEAST_ROWS = 17  # for fewer, plans that hold all rows are always better
FOLDED_ROWS = 64  # of one tile
ACCUMULATORS = 128  # registers of a thread for the products; more leave too few for the rest
MOST_PIECES = 4  # of tiles whose ends one block computes for others: with more, less is gained than they cost
SHORT_ROW = 256  # bytes of one row of a weight that a step reads at once
DESCRIPTOR_STEP = 16  # bytes: rows of a matrix that a descriptor holds lie multiples of it apart


@dataclass(frozen=True)
class TileConstants:
    """Seconds: `start` before the first and after the last step, `fill` before and after those of a tile, `latency` of
    memory, `x_element` of an SM per element of x that a folded norm handles, `x_chain` until a block goes on, `sum` per
    sum that one block leaves for another. Fractions of the machine's rates that steady tiles reach: `compute` of its
    matrix units', by rows, columns and warps of a tile, on an SM by itself, `sustained` on all of them together,
    `memory` of its (copy) bandwidth; rows of less than SHORT_ROW bytes cost `short` of that time on top. Where tiles
    reach beyond the last row, the copy engine fills in what is not there slower than it loads: `empty` for a byte of an
    SM's share."""

    start: float
    fill: float
    sum: float
    sustained: float
    latency: float
    x_element: float
    x_chain: float
    compute: Mapping[tuple[int, int, int], float]
    memory: float
    short: float
    empty: float


@functools.cache
def constants() -> TileConstants:
    raw: dict[str, Any] = json.loads((resources.files(__package__) / "efficiency.json").read_text())
    compute = {(rows, columns, warps): fraction for rows, columns, warps, fraction in raw["tile"]["compute"]}
    return TileConstants(**{**raw["tile"], "compute": compute})


def refusal(op: MatmulFamily, machine: Machine, rows: int) -> str | None:
    """Why no tiled kernel is made for so many rows of `op`, in a sentence."""
    if machine.kind != "cuda" or machine.capability < 90:
        return f"{machine.name} ({machine.arch}) has no copy engine for tiles (Hopper and newer have)"
    if op.dtype == torch.float32:
        return "tiled kernels are made for 16-bit types; in float32 the vendor's GEMM is the better one"
    if any(int(size) * op.dtype.itemsize % DESCRIPTOR_STEP for size in (op.k, op.n if op.weight_is_kn else op.k)):
        return f"rows of its matrices are no multiple of {DESCRIPTOR_STEP} bytes, which the copy engine needs; pad them"
    if norm_mode(op, Plan("tile", 64, 64, 64, 4)) == "first":
        return "a tiled kernel folds no norm that needs a pass over x of its own"
    if op.norm is not None and rows > FOLDED_ROWS:
        return "every column of tiles would compute the norm again, which a kernel of its own does once"
    return None


def plans(op: MatmulFamily, machine: Machine, rows: int) -> Iterator[Plan]:
    """Every tiled plan for `rows` rows that fits `machine`."""
    if rows < LEAST_ROWS or refusal(op, machine, rows):
        return
    for block_m, block_n, block_k, stages in itertools.product((64, 128), (32, 64, 128), (64, 128), (3, 4, 6)):
        for warps in (8, 4):
            # a round of blocks reads the fewest bytes where its tiles cover as many rows of x as of weights
            square = math.sqrt(machine.num_sms * op.weights * block_n / block_m)
            plan = Plan("tile", block_m, block_n, block_k, warps, stages, group=2 ** round(math.log2(square)))
            products = op.weights * block_m * block_n // (32 * warps)
            # four warps are one group of the matrix unit, 64 rows high; a folded norm needs registers for x too
            if warps == 8 and (block_m < 128 or products < ACCUMULATORS // 2):
                continue
            if block_m > 64 * math.ceil(rows / 64) or products > (ACCUMULATORS // 2 if op.norm else ACCUMULATORS):
                continue
            if shared_memory(op, plan) <= machine.shared_memory and registers(op, plan) <= REGISTERS_PER_THREAD:
                yield plan
                yield from _shared(op, plan, machine, rows)


def _shared(op: MatmulFamily, plan: Plan, machine: Machine, rows: int) -> Iterator[Plan]:
    """The plan with tiles of the last round shared, where that may pay: not with small tiles, which leave little to
    share (and several blocks on an SM, which share it anyhow)."""
    shared = replace(plan, kind="shared", blocks=machine.num_sms)
    shares = shared.shares(rows, int(op.n), int(op.k))
    handed = math.ceil(int(op.k) / plan.block_k) - shares.kept
    large = plan.num_warps == 8 and resident_blocks(op, plan, machine) == 1
    if op.norm is None and large and 0 < shares.pieces <= MOST_PIECES and handed >= plan.num_stages:
        yield shared


def seconds(op: MatmulFamily, plan: Plan, machine: Machine, moved: Any, m: Any) -> Any:
    """Predicted time for `m` rows (a number or sympy) where the kernel moves `moved` bytes."""
    known = constants()
    again = op.weights * int(op.n) * int(op.k) * op.dtype.itemsize * (ceil_div(m, plan.rows * plan.group) - 1)
    short = known.short if plan.block_k * op.dtype.itemsize < SHORT_ROW else 0.0
    memory = (moved + again) * (1 + short) / (machine.memory_bandwidth * known.memory)
    outside = (ceil_div(m, plan.rows) * plan.rows - m) * int(op.k) * math.ceil(int(op.n) / plan.block_n)
    filled = known.empty * op.dtype.itemsize * outside / machine.num_sms
    walk, tiles, sums = _longest(op, plan, machine, m)
    together = 2 * op.weights * m * int(op.n) * int(op.k) / (machine.rate(op.dtype) * known.sustained)
    work = (walk**8 + together**8) ** 0.125 + tiles * known.fill + sums * known.sum
    return known.start + machine.launch_overhead + (memory**4 + work**4) ** 0.25 + filled


def _longest(op: MatmulFamily, plan: Plan, machine: Machine, m: Any) -> tuple[Any, Any, int]:
    """Of the blocks that take longest: the time of their steps, how many of their tiles follow each other with nothing
    beside them, and how many sums they hand on or take over."""
    known, sms = constants(), machine.num_sms
    steps = math.ceil(int(op.k) / plan.block_k)
    products = 2 * op.weights * plan.rows * plan.block_n * plan.block_k
    busy = products / (machine.rate(op.dtype) * known.compute[plan.rows, plan.block_n, plan.num_warps] / sms)
    waiting = known.latency / (plan.num_stages - 1)
    if op.norm:
        busy += known.x_element * plan.rows * plan.block_k
        waiting += known.x_chain * plan.rows * plan.block_k

    def step(blocks: Any) -> Any:
        return ((blocks * busy) ** 3 + waiting**3) ** (1 / 3)

    resident = resident_blocks(op, plan, machine)
    if plan.kind == "shared":
        shares, held = plan.shares(int(m), int(op.n), int(op.k)), op.weights * plan.rows * plan.block_n
        owner = (shares.rounds * steps + shares.kept, shares.rounds + 1, held)
        helped = shares.pieces * (steps - shares.kept)
        helper = (shares.rounds * steps + helped, shares.rounds + shares.pieces, shares.pieces * held)
        # which of the two takes longer does not depend on what all units reach together
        walked, tiles, sums = max(owner, helper, key=lambda w: w[0] * step(1) + w[1] * known.fill + w[2] * known.sum)
        return walked * step(1), tiles, sums
    blocks = ceil_div(m, plan.rows) * math.ceil(int(op.n) / plan.block_n)
    rounds = ceil_div(blocks, sms * resident)
    last = ceil_div(blocks - (rounds - 1) * sms * resident, sms)
    return steps * ((rounds - 1) * step(resident) + step(last)), rounds if resident == 1 else 1, 0
