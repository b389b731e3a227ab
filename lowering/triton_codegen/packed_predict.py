"""Which tiles the kernels for packed weights may have, what each needs of shared memory, and its predicted time.

gemv: seconds = start + bytes / bandwidth, in whole rounds of the programs that run at once
swap: seconds = start + steps · step + bytes / rate + x once per block from L2
split: as swap, + sums of the shares, for more than 16 rows; for fewer
       seconds = start + steps of the programs on one multiprocessor · step, and more where they take rounds
tile: seconds = start + rounds of the programs that run at once · steps · step

The constants are measured (packed.json, with device, date and versions); they serve other machines until they have
their own.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import Any

import sympy

from ...cost.amounts import amount
from ...cost.roofline import matmul_traffic
from ...fused import MatmulFamily, MatmulGroup, PerGroup
from ...machine import TABLE, Machine
from . import packed_direct
from .plans import Plan
from .predict import power_of_two
from .shared_memory import within

Matmuls = MatmulFamily | MatmulGroup

MOST_ROWS = 64  # of one program with all rows of x; beyond, tiles along M
TILE = Plan("tile", 128, 64, 128, 4, 3)  # others were slower
SPLIT_ROWS = 16
SHORTEST = 64  # elements of K in a tile
GEMV_ROWS = 4
GEMV_WARPS = 16  # on a multiprocessor at once: a thread holds two tiles of weights and all of x, in 128 registers
GEMV_BYTES = 64  # of weights that a thread asks for at once
WHOLE = 128  # blocks of 32 in a row that is never shared
SHARE = 64  # and in a share of a longer one: two warps, of which each thread has one block


@functools.cache
def constants() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((resources.files(__package__) / "packed.json").read_text())
    return loaded


@dataclass(frozen=True)
class Tiles:
    """What may be launched, fastest first with predicted seconds, and what may not with the reason."""

    fitting: tuple[tuple[float, Plan], ...]
    rejected: tuple[str, ...]


def tiles(op: Matmuls, machine: Machine, rows: int) -> Tiles:
    """The tiles for up to `rows` rows of x on a machine."""
    wanted = ((plan.label, shared_memory(op, plan), plan) for plan in plans(op, rows))
    fitting, rejected = within(machine.shared_memory, wanted)
    timed = ((seconds(op, plan, machine, rows), plan) for plan in fitting)
    known = (pair for pair in timed if pair[0] < math.inf)
    return Tiles(tuple(sorted(known, key=lambda pair: pair[0])), tuple(rejected))


def plans(op: Matmuls, rows: int) -> list[Plan]:
    """What may be launched for up to `rows` rows; for several linears of one input, only what shares no memory."""
    direct = packed_direct.plans(op, rows)
    if isinstance(op, MatmulGroup) or op.norm is not None or op.q8_activations:
        return direct
    if rows > MOST_ROWS:
        return [] if _untiled(op) else [TILE]
    padded = max(8 if op.packed[0].order == "halves" else 16, power_of_two(rows))
    groups = [p.group for packed in op.packed for p in (packed.scale, packed.zero) if isinstance(p, PerGroup)]
    stages = 4 if padded == 8 and op.weights == 1 else 3
    found = []
    # longer tiles spill registers
    for block_n, block_k in itertools.product((32, 64, 128), (64, 128, 256)):
        whole = int(op.k) % block_k == 0 and all(block_k % g == 0 or g % block_k == 0 for g in groups)
        if whole:
            found.append(Plan("swap", padded, block_n, block_k, 2 if block_n < 64 else 4, stages))
    return found + _split_plans(op, padded) + direct


def _split_plans(op: MatmulFamily, padded: int) -> list[Plan]:
    if not _as_measured(op) or int(op.n) % 64:
        return []
    steps, rest = divmod(int(op.k), 256)
    wanted = [splits for splits in (1, 2, 4, 8) if not rest and not steps % splits and steps >= 2 * splits]
    if padded > SPLIT_ROWS:  # the tiles of swap
        shared = itertools.product((64, 128), (splits for splits in wanted if splits > 1))
        return [Plan("split", padded, n, 256, 4, 3, splits=splits) for n, splits in shared if not int(op.n) % n]
    found = [Plan("split", padded, 64, 256, 2, 3, splits=splits) for splits in wanted]
    return found + ([Plan("split", 16, 64, 512, 2, 3)] if padded == 16 and int(op.k) % 512 == 0 else [])


def _as_measured(op: MatmulFamily) -> bool:
    """Whether there is one weight in Q4_0, its codes and scales apart."""
    packed = op.packed[0]
    apart = packed.order == "halves" and packed.block == 16 and packed.scale is not None and packed.scale.group == 32
    return op.weights == 1 and apart and not isinstance(packed.zero, PerGroup)


def _untiled(op: MatmulFamily) -> str:
    """Why a weight is not multiplied in tiles along M; empty where it is."""
    if not _as_measured(op) or int(op.k) % TILE.block_k:
        return (
            f"beyond {MOST_ROWS} rows one weight in Q4_0, its codes and scales apart (fc.ggml.split), is multiplied in "
            "tiles; any other is dequantised for the vendor's GEMM, which is faster there"
        )
    return ""


def refusal(op: MatmulFamily, rows: int) -> str:
    """Why there is no plan for so many rows."""
    return (_untiled(op) if rows > MOST_ROWS else "") or f"no tile divides K = {op.k} and its groups evenly"


def gemv_plans(op: Matmuls) -> list[Plan]:
    """Tiles of the kernel for few rows: so many features that a thread asks for GEMV_BYTES of weights at once, and
    fewer where more rows of x take the registers; for one row of a long K also in shares of it."""
    length, weights, rows = int(op.whole.k) // 32, op.whole.weights, int(op.m)
    blocks, block_n = power_of_two(length), max(1, 4 // weights)
    warps = max(1, blocks * block_n * weights * 16 // (32 * GEMV_BYTES))
    if rows > 1:
        digits = 1 if op.whole.q8_activations else 2
        block_n = max(1, block_n // (1 if rows * digits <= 2 else 2 if rows * digits <= 4 else 4))
    found = [Plan("gemv", rows, block_n, blocks * 32, warps)]
    single = rows == weights == len(op.parts) == 1 and op.whole.norm is None and op.whole.packed[0].block == 16
    if single and length > WHOLE and length % SHARE == 0:
        found.append(Plan("gemv", 1, 4, SHARE * 32, 2, splits=length // SHARE))
    return [p for p in found if p.num_warps <= GEMV_WARPS and not any(int(part.n) % p.block_n for part in op.parts)]


def gemv_programs(op: Matmuls, plan: Plan, machine: Machine) -> int:
    places = machine.num_sms * max(1, GEMV_WARPS // plan.num_warps) // plan.splits
    return min(int(op.whole.n) // plan.block_n, places) * plan.splits


def shared_memory(op: Matmuls, plan: Plan) -> int:
    """Upper estimate: every stage holds the codes, their scales and zeros, and the tile of x."""
    if plan.kind == "direct" or isinstance(op, MatmulGroup):
        return packed_direct.shared_memory(op, plan)
    x = plan.rows * plan.block_k * op.dtype.itemsize
    stored = sum(p.bytes_per_weight for p in op.packed)
    return math.ceil(plan.num_stages * (plan.block_n * plan.block_k * stored + x)) + 1024


def seconds(op: Matmuls, plan: Plan, machine: Machine, rows: int) -> float:
    """Predicted time of one launch of a tiled kernel."""
    if plan.kind == "direct" or isinstance(op, MatmulGroup):
        return packed_direct.seconds(op, plan, machine, constants()["direct"])
    if plan.kind == "tile":
        return _tile_seconds(op, plan, machine, rows)
    if plan.kind == "split" and plan.rows <= SPLIT_ROWS:
        return _split_seconds(op, plan, machine)
    known = constants()["swap"]
    traffic = matmul_traffic(op)
    moved = float(sympy.sympify(traffic.bytes_read + traffic.bytes_written).subs(amount(op.m), rows))
    blocks = math.ceil(int(op.n) / plan.block_n)
    x = op.dtype.itemsize * rows * int(op.k) * blocks
    if plan.splits > 1 and blocks * plan.splits > machine.num_sms:
        return math.inf  # a share would wait for another to end
    # too few programs cannot draw what the machine has
    drawing = min(1.0, blocks * plan.splits / (known["saturating"] * machine.num_sms))
    reached = known["rate"] * machine.memory_bandwidth * drawing
    steps = int(op.k) // plan.block_k // plan.splits * (known["step"] + known["step_element"] * plan.block_k)
    unaligned = known["unaligned"] if any(p.order == "halves" and p.block != 16 for p in op.packed) else 1.0
    codes = "float8" if op.packed[0].float8 else op.packed[0].order
    slower = known["order"][codes] * (known["pair"] if op.weights > 1 and plan.rows > 8 else 1.0)
    work = known["start"] + steps + unaligned * moved / reached + x / machine.l2_bandwidth
    # every share's sums are written, and read by one program
    gathering = known["gather"] * plan.splits * plan.rows * plan.block_n if plan.splits > 1 else 0.0
    return float(machine.launch_overhead + slower * work + gathering)


def _split_seconds(op: MatmulFamily, plan: Plan, machine: Machine) -> float:
    known = constants()["split"]
    programs = plan.programs(plan.rows, int(op.n))
    rounds = math.ceil(programs / (known["per_sm"][str(plan.block_k)] * machine.num_sms))
    steps = math.ceil(programs / machine.num_sms) * (int(op.k) // plan.block_k // plan.splits)
    slower = TABLE["h200"].memory_bandwidth / machine.memory_bandwidth
    walk = steps * known["step"][f"{plan.rows}x{plan.block_k}"] * slower
    # few on a multiprocessor do not hide each other's waiting
    waiting = known["waiting"][f"{plan.rows}x{plan.block_k}"].items()
    walk *= next((slower for few, slower in waiting if programs < float(few) * machine.num_sms), 1.0)
    gathering = known["gather"] * plan.splits if plan.splits > 1 else 0.0
    return float(machine.launch_overhead + known["start"] + gathering + (rounds - 1) * known["round"] + walk)


def _tile_seconds(op: MatmulFamily, plan: Plan, machine: Machine, rows: int) -> float:
    known = constants()["tile"]
    programs = plan.programs(rows, int(op.n))
    together = min(len(known["step"]), math.ceil(programs / machine.num_sms))  # on one multiprocessor
    steps = math.ceil(programs / (together * machine.num_sms)) * (int(op.k) // plan.block_k)
    # measured at the rate of this machine's matrix units; others take as much longer
    slower = TABLE["h200"].rate(op.dtype) / machine.rate(op.dtype)
    return float(machine.launch_overhead + known["start"] + steps * known["step"][together - 1] * slower)


def gemv_seconds(op: Matmuls, plan: Plan, machine: Machine) -> float:
    """Predicted time of one launch of the kernel for few rows."""
    known = constants()["gemv"]
    traffic = matmul_traffic(op)
    whole = op.whole
    tiles_ = int(whole.n) / plan.block_n
    programs = gemv_programs(op, plan, machine)
    rounds = math.ceil(tiles_ / programs) * programs / tiles_
    memory = float(sympy.sympify(traffic.bytes_read + traffic.bytes_written)) * rounds / machine.memory_bandwidth
    unaligned = known["unaligned"] if any(p.block != 16 for p in whole.packed) else 1.0
    start = known["start"] + (0.0 if whole.q8_activations else known["second_digit"])
    start += known["norm"] if whole.norm is not None else 0.0
    start += known["gather"] if plan.splits > 1 else 0.0
    start += known["row"]["q8_1" if whole.q8_activations else "float"] * (plan.rows - 1)
    # programs of many warps wait for each other at the end of each tile
    per_byte = known["per_byte"][str(max(4, power_of_two(plan.num_warps)))]
    return float(start + machine.launch_overhead + per_byte * unaligned * memory)
