"""Predicted time of a plan, and the plans worth predicting. Tiles have a formula of their own (`tiles.py`); the others:

seconds = start + ‖(memory, chain, work)‖₄ + launch overhead
memory  = bytes / bandwidth, more where a tile's rows are short
chain   = rounds of blocks · steps · latency of a step: a block waits for its own tile, computes, asks for the next;
          blocks that share an SM hide each other's waiting, pipeline stages hide the memory's latency
work    = what one SM has to issue for all of its blocks: handling of x (again in every block) and the products

The 4-norm is a soft maximum: near a tie the terms disturb each other. The constants are measured (efficiency.json,
with device, date and versions); they are times of an SM and serve other machines until they have their own.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from importlib import resources
from typing import Any

import sympy
import torch

from ...candidates import MARGIN
from ...cost.amounts import amount
from ...cost.efficiency import dtype_name, efficiency
from ...fused import MatmulFamily, MatmulGroup
from ...machine import Machine
from . import tiles
from .footprint import REGISTERS_PER_THREAD, registers, resident_blocks, shared_memory, step_bytes
from .plans import Plan
from .writer import norm_mode, statistics_block

SMALL_SHARED_MEMORY = 100 * 1024  # below, two pipeline stages are worth a thought
MOST_ROWS = 64  # beyond, a block no longer holds all rows of x
SLICED_ROWS = 32  # beyond, every block reads more of x than of the weights
SLICES = 4  # 8 were never better
SPLITS = (2, 4, 8)
UNTRIED = 0.3  # of what is predicted less well, or was never measured: autotune may take it
ARRIVALS = 1024  # blocks of columns that can be counted, in zeros that all kernels of a graph share
SPLIT_BLOCKS = 0.7, 1.0  # for each multiprocessor; a second round was never better
SLICED_STEPS = 4  # fewer would not fill the pipeline
ACTIVATIONS = {"silu": 25, "gelu_erf": 33, "gelu_tanh": 32}  # flops, beside those of the single functions
CORRECTED_ROWS = 16  # of a plan that puts products right for a LayerNorm's mean
GEMV_ROWS = 4  # more rows need more registers than a thread has


@dataclass(frozen=True)
class KindConstants:
    """Seconds. `start`: before the first and after the last step, with `row` for each row of x after the first; `step`:
    least latency of a step, to which `latency` of memory, `byte_per_thread` of a weight tile and `multiply_add` per
    thread add; `x_element`, per element of x per block, and `product`, per multiply-add, occupy the SM;
    `statistics` is a step of the pass that computes mean and rstd first, `correction` comes to `x_element` where
    products are put right for the mean afterwards. An activation in front takes `activation` times its arithmetic.
    `short` is the fraction of the memory's time that rows of less than
    SHORT_ROW bytes cost on top."""

    start: float
    row: float
    latency: float
    step: float
    byte_per_thread: float
    multiply_add: float
    x_element: float
    product: float
    statistics: float
    correction: float
    activation: float
    short: float


@dataclass(frozen=True)
class Constants:
    """`reached`: fraction of the machine's (copy) bandwidth that pure reading reaches. `gather`: seconds for each sum
    that the last of the blocks that share K adds up; `zeroing`: for the zeros that such kernels of a graph count in;
    `norm`: for a norm's own kernel in front, over its launch.
    `errors` tells, by the number of weights and the kind of plan, by how much its gain over Inductor was less than
    predicted: measured on `machine`, in `dtype`, with one weight for up to MOST_ROWS rows."""

    reached: float
    gather: float
    zeroing: float
    norm: float
    kinds: dict[str, KindConstants]
    machine: str
    dtype: str
    errors: dict[str, dict[str, float]]


@functools.cache
def constants() -> Constants:
    raw: dict[str, Any] = json.loads((resources.files(__package__) / "efficiency.json").read_text())
    kinds = {kind: KindConstants(**entry) for kind, entry in raw["kinds"].items()}
    return Constants(**{field.name: raw[field.name] for field in fields(Constants)} | {"kinds": kinds})


def error(op: MatmulFamily | MatmulGroup, plan: Plan, machine: Machine) -> float:
    """By how much a prediction may flatter the plan beside Inductor's."""
    known, whole, rows = constants(), op.whole, amount(op.m)
    few, several = isinstance(rows, int) and rows <= MOST_ROWS, len(op.parts) > 1
    untried = plan.kind in ("split", "shared") or (plan.tiled and several and not few)
    alike = machine.name == known.machine and dtype_name(op.dtype) == known.dtype and whole.activation is None
    measured = known.errors[str(whole.weights)] if alike and not several and (few or whole.weights == 2) else {}
    return measured.get(plan.kind, UNTRIED if untried else MARGIN)


def activation_flops(op: MatmulFamily, machine: Machine) -> float:
    """Arithmetic for an element of x that is computed in the kernel."""
    if op.activation is None:
        return 0.0
    special = {**efficiency(machine).special_flops, **ACTIVATIONS}
    return sum(special.get(v.op, 1) for v in op.activation.walk() if v.op not in ("const", "extra"))


def power_of_two(at_least: int) -> int:
    return 1 << max(at_least - 1, 0).bit_length()


def plans(op: MatmulFamily, machine: Machine, rows: int) -> Iterator[Plan]:
    """Every plan for up to `rows` rows that fits `machine`."""
    yield from tiles.plans(op, machine, rows)
    few = (_gemv_plans(op, rows), _swap_plans(op, machine, rows), _sliced_plans(op, machine, rows))
    for plan in itertools.chain(*few, _split_plans(op, machine, rows)):
        if shared_memory(op, plan) <= machine.shared_memory and registers(op, plan) <= REGISTERS_PER_THREAD:
            yield plan


def _gemv_plans(op: MatmulFamily, rows: int) -> Iterator[Plan]:
    if rows > GEMV_ROWS:
        return
    stages = 1 if rows == 1 else 3
    longest = max(128, power_of_two(int(op.k)))
    for block_n, block_k, warps in itertools.product((4, 8, 16, 32), (128, 256, 512, 1024, 2048), (2, 4, 8)):
        # Each thread asks for 64 bytes of weights at once: less leaves the memory idle, more costs resident blocks.
        # With several rows and a pipeline, twice as much spreads the handling of x further.
        loaded = step_bytes(op, Plan("gemv", rows, block_n, block_k, warps)) // (32 * warps)
        if loaded in ((64,) if rows == 1 else (64, 128)) and block_k <= longest:
            yield Plan("gemv", rows, block_n, block_k, warps, stages, lanes=8)


def _swap_plans(op: MatmulFamily, machine: Machine, rows: int) -> Iterator[Plan]:
    if rows > MOST_ROWS or (machine.kind == "cuda" and machine.capability < 80):
        return  # Triton has no matrix instructions for older ones
    padded = max(8, power_of_two(rows))
    if op.dtype == torch.float32:
        # "ieee" products run on the ordinary units with their operands in registers: narrow tiles, few rows
        if padded <= 16:
            yield from (Plan("swap", padded, block_n, 32, 4, stages) for block_n in (16, 32, 64) for stages in (3, 4))
        return
    longest = max(64, power_of_two(int(op.k)))
    blocks = itertools.product((16, 32, 64, 128), (64, 128, 256), (1, 2, 4, 8), (2, 3, 4, 6))
    for block_n, block_k, warps, stages in blocks:
        if block_k > longest or (stages == 2 and machine.shared_memory > SMALL_SHARED_MEMORY):
            continue
        if stages > 4 and block_k > 64:
            continue
        plan = Plan("swap", padded, block_n, block_k, warps, stages)
        if plan.wide and warps == (8 if padded >= 64 and block_k == 256 else 4):
            yield plan
        elif not plan.wide and padded <= 16 and warps <= block_n // 16:
            yield replace(plan, gram=norm_mode(op, plan) == "folded")
            if op.norm is not None and op.norm.kind == "layer" and op.dtype == torch.bfloat16:
                # with 8 rows, the products of x with itself take longer than with 16
                # two weights in wide steps would take more registers than there are
                if rows > 1 and warps == block_n // 16 and op.weights * block_k <= 256:
                    yield replace(plan, rows=CORRECTED_ROWS, gram=True)


def _sliced_plans(op: MatmulFamily, machine: Machine, rows: int) -> Iterator[Plan]:
    padded = max(8, power_of_two(rows))
    if (
        op.norm is not None
        or padded > SLICED_ROWS
        or op.dtype == torch.float32
        or (machine.kind == "cuda" and machine.capability < 80)
    ):
        return
    for block_n, block_k, stages in itertools.product((16, 32), (64, 128), (3, 4, 6)):
        plan = Plan("sliced", padded, block_n, block_k, SLICES, stages, slices=SLICES)
        # they are for few columns: with a second block on a multiprocessor, Inductor's kernels were as fast
        narrow = plan.programs(padded, int(op.n)) <= machine.num_sms
        if narrow and SLICED_STEPS * plan.step_k <= int(op.k) and stages * block_k <= 512:
            yield plan


def _split_plans(op: MatmulFamily, machine: Machine, rows: int) -> Iterator[Plan]:
    """Tiles whose blocks would leave multiprocessors idle, with so many for each that all have one or two."""
    padded = max(16, power_of_two(rows))
    if (
        op.norm is not None
        or op.activation is not None
        or op.weights > 1
        or padded > MOST_ROWS
        or op.dtype == torch.float32
        or (machine.kind == "cuda" and machine.capability < 80)
    ):
        return
    fewest, most = (share * machine.num_sms for share in SPLIT_BLOCKS)
    for splits in SPLITS:
        plan = Plan("split", padded, 64, 128, 4, 4, splits=splits)
        blocks = plan.programs(padded, int(op.n))
        filled = plan.num_stages * splits * plan.block_k <= int(op.k)
        if filled and fewest <= blocks <= most and blocks <= splits * ARRIVALS:
            yield plan


def _constants_of(op: MatmulFamily, plan: Plan) -> str:
    if plan.kind != "swap":
        return plan.kind
    # without a norm, x does not pass through the registers of every block; measured for single linears
    return f"{'wide' if plan.wide else 'narrow'}{' plain' if op.norm is None and op.weights == 1 else ''}"


def _shares_squares(op: MatmulFamily, plan: Plan) -> bool:
    """Whether several warps compute Σ x² of 16 rows for one weight, which was measured to take half as long again as in
    a single warp (and with two weights no longer); why is not known."""
    return plan.gram and plan.rows == CORRECTED_ROWS and op.weights == 1 and plan.num_warps > 1


def seconds(op: MatmulFamily, plan: Plan, machine: Machine, moved: Any, rows: Any) -> Any:
    """Predicted time where the kernel moves `moved` bytes (a number or sympy). `rows` is the most that the plan is to
    serve; of tiles, the number there is (a number or sympy)."""
    if plan.tiled:
        return tiles.seconds(op, plan, machine, moved, rows)
    known = constants()
    kind = known.kinds[_constants_of(op, plan)]
    threads = 32 * plan.num_warps
    blocks = plan.programs(plan.rows, int(op.n))
    steps = plan.part_of(int(op.k)) // plan.step_k
    per_sm = math.ceil(blocks / machine.num_sms)
    share = blocks / (machine.num_sms * min(resident_blocks(op, plan, machine), per_sm))
    products = plan.rows * op.weights * plan.block_n * plan.step_k
    latency = kind.step + kind.latency / max(1, plan.num_stages - 1)
    latency += kind.byte_per_thread * step_bytes(op, plan) / threads + kind.multiply_add * products / threads
    chain = math.ceil(share) * steps * latency
    # no matrix unit multiplies in full float32; an eighth of the ordinary units' rate is a guess that leaves the
    # library its place until somebody measures
    ordinary = plan.kind == "swap" and op.dtype == torch.float32
    per_product = 8 * 2 * machine.num_sms / machine.vector_flops if ordinary else kind.product
    element = kind.x_element
    if op.norm and norm_mode(op, plan) == "folded" and (op.norm.kind == "layer" or _shares_squares(op, plan)):
        element += kind.correction
    work = per_sm * steps * (element * plan.rows * plan.step_k + per_product * products)
    start = kind.start + kind.row * (plan.rows - 1) + machine.launch_overhead
    if op.activation is not None:
        arithmetic = plan.rows * int(op.k) * activation_flops(op, machine) * machine.num_sms / machine.vector_flops
        start += per_sm * kind.activation * arithmetic
    if plan.splits > 1:
        start += known.gather * plan.splits * plan.block_n * plan.rows
    if norm_mode(op, plan) == "first":
        start += kind.statistics * math.ceil(int(op.k) / statistics_block(op, plan))
    short = kind.short if plan.step_k * op.dtype.itemsize < tiles.SHORT_ROW else 0.0
    memory = moved * (1 + short) / (machine.memory_bandwidth * known.reached)
    if isinstance(memory, sympy.Expr):
        # the 4-norm of a symbolic amount would be slow to solve for crossovers; over few rows the weights dominate
        least = float(memory.subs(dict.fromkeys(memory.free_symbols, rows)))
        return start + (least**4 + chain**4 + work**4) ** 0.25 + (memory - least)
    return start + (memory**4 + chain**4 + work**4) ** 0.25
