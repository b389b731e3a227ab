"""What a block of a plan holds while it runs, estimated without a compiler: it limits how many blocks share an SM."""

from __future__ import annotations

from ...fused import MatmulFamily
from ...machine import Machine
from .plans import Plan
from .writer import THIN, norm_mode, statistics_block

REGISTERS_PER_SM = 65536
REGISTERS_PER_THREAD = 255
WARPS_PER_SM = 64
BLOCKS_PER_SM = 32


def step_bytes(op: MatmulFamily, plan: Plan) -> int:
    """Bytes of weights that one block reads per step."""
    return op.weights * plan.block_n * plan.step_k * op.dtype.itemsize


def shared_memory(op: MatmulFamily, plan: Plan) -> int:
    """Upper estimate of a block's shared memory: every stage holds the weight tiles and the tile of x."""
    weights = step_bytes(op, plan)
    if plan.tiled:
        x_tile = plan.rows * plan.block_k * op.dtype.itemsize
        # x and the norm's weight wait for no matrix unit, so they have one stage less
        y = (plan.num_stages - 1) * (x_tile + plan.block_k * op.dtype.itemsize) if op.norm else plan.num_stages * x_tile
        return plan.num_stages * weights + y + 1024
    if plan.kind == "gemv":
        vectors = (1 + plan.rows) * plan.block_k * 4
        return vectors + (weights * plan.num_stages if plan.num_stages > 1 else 0)
    x_tile = plan.rows * plan.step_k * op.dtype.itemsize
    normed = x_tile + plan.num_stages * plan.step_k * op.dtype.itemsize if op.norm else 0
    if op.norm and op.norm.kind == "layer" and norm_mode(op, plan) == "folded":
        normed += plan.num_stages * THIN * plan.step_k * op.dtype.itemsize
    passes = 3 * plan.rows * statistics_block(op, plan) * op.dtype.itemsize if norm_mode(op, plan) == "first" else 0
    return max(plan.num_stages * (weights + x_tile) + normed, passes) + 1024


def registers(op: MatmulFamily, plan: Plan) -> int:
    """Estimate of registers per thread."""
    threads = 32 * plan.num_warps
    if plan.kind == "gemv":
        partial = op.weights * plan.rows * plan.block_n * plan.block_k // plan.lanes
        return 40 + (partial + step_bytes(op, plan) // 4) // threads + 16 * (plan.rows - 1)
    if plan.tiled:
        # the accumulators, and a normalised tile of x with its squares
        return 40 + plan.rows * (op.weights * plan.block_n + (plan.block_k if op.norm else 0)) // threads
    tile = plan.rows * (op.weights * plan.block_n + (plan.block_k // 2 if op.norm else 0))
    gram = plan.rows * plan.rows if plan.gram else 0
    return 36 + plan.slices * (tile + gram) // threads


def sums_left(op: MatmulFamily, plan: Plan) -> int:
    """How many float32 sums blocks that share K leave in memory for each other; 0 where none do."""
    if plan.kind == "split":
        return plan.programs(plan.rows, int(op.n)) * plan.block_n * plan.rows
    if plan.kind == "shared":
        left = plan.shares(int(op.m), int(op.n), int(op.k)).left
        return left * op.weights * plan.rows * plan.block_n
    return 0


def resident_blocks(op: MatmulFamily, plan: Plan, machine: Machine) -> int:
    by_registers = REGISTERS_PER_SM // (registers(op, plan) * 32 * plan.num_warps)
    by_shared = machine.shared_memory // shared_memory(op, plan)
    return max(1, min(by_registers, by_shared, WARPS_PER_SM // plan.num_warps, BLOCKS_PER_SM))
