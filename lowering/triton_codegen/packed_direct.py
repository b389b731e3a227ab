"""Which blocks the kernel without shared memory may have (packed_direct_source), and its predicted time.

seconds = start + sums of other programs + steps · step, longer the more programs share a multiprocessor

The constants are measured (packed.json).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...fused import MatmulFamily, MatmulGroup, Packed, PerGroup
from ...machine import TABLE, Machine
from .packed_direct_source import GROUP
from .plans import Plan

MOST_ROWS = 16
FEW_ROWS = 4
STEP = 512  # elements of K: 16 bytes of codes for each thread and row
WARPS = 4


def refusal(op: MatmulFamily | MatmulGroup, rows: int) -> str:
    """Why the kernel does not serve so many rows; empty where it does."""
    whole = op.whole
    first = whole.packed[0]
    if rows > MOST_ROWS:
        return f"beyond {MOST_ROWS} rows x does not fit into registers"
    if whole.norm is not None or whole.activation is not None or whole.q8_activations:
        return "x goes from memory to the matrix unit as it is"
    for n, packed in ((int(part.n), p) for part in op.parts for p in part.packed):
        if not _as_loaded(packed) or _origin(packed) != _origin(first):
            return "words of Q4_0 are read 16 bytes at a time, codes and scales apart (fc.ggml.split)"
        if n % 8:
            return f"{n} features are no multiple of 8"
    return ""


def plans(op: MatmulFamily | MatmulGroup, rows: int) -> list[Plan]:
    """Blocks for up to `rows` rows."""
    if refusal(op, rows):
        return []
    padded, k, weights = 8 if rows <= 8 else 16, int(op.whole.k), op.whole.weights
    if weights > 2:
        return []
    if weights == 2:  # its sums and words take the registers of twice as many features
        slices = padded // 8
        return [Plan("direct", padded, 32, STEP, WARPS, slices=slices)] if k % (slices * STEP) == 0 else []
    shared = ((32, 1), (32, 2), (64, 1), (64, 2), (64, 4))
    found = [Plan("direct", padded, n, STEP, WARPS, splits=s) for n, s in shared if k % (s * STEP) == 0]
    ahead = (Plan("direct", 8, 32, STEP, WARPS, slices=2, splits=s) for s in (1, 2) if k % (2 * STEP * s) == 0)
    return [*found, *(ahead if padded == 8 else ())]


def shared_memory(op: MatmulFamily | MatmulGroup, plan: Plan) -> int:
    """For the sums of the warps, which meet there."""
    return plan.num_warps * plan.block_n * plan.rows * 4


def columns(op: MatmulFamily | MatmulGroup, plan: Plan) -> int:
    """Blocks of features, of which each belongs to one part."""
    return sum(math.ceil(int(part.n) / plan.block_n) for part in op.parts)


def seconds(op: MatmulFamily | MatmulGroup, plan: Plan, machine: Machine, known: Mapping[str, Any]) -> float:
    """Predicted time of one launch; infinite where so many programs share a multiprocessor that none was measured."""
    steps = int(op.whole.k) // (plan.splits * STEP)
    together = math.ceil(columns(op, plan) * plan.splits / machine.num_sms)
    kind = "pair" if op.whole.weights > 1 else "ahead" if plan.slices > 1 else "one"
    # where few rows of eight are read, more of x stays in L1
    steps_of, few = known["step"][kind], isinstance(op.m, int) and op.m <= FEW_ROWS
    measured = steps_of[f"{plan.rows}x{plan.block_n}"] | (steps_of.get(f"{FEW_ROWS}x{plan.block_n}", {}) if few else {})
    if str(together) not in measured:
        return math.inf
    # measured at the bandwidth of this machine; others take as much longer
    step = measured[str(together)] * TABLE["h200"].memory_bandwidth / machine.memory_bandwidth
    gathering = known["gather"][str(plan.rows)] * plan.splits if plan.splits > 1 else 0.0
    return float(machine.launch_overhead + known["start"] + gathering + steps * step)


def _as_loaded(packed: Packed) -> bool:
    scale = packed.scale
    apart = packed.order == "halves" and packed.block == 16 and packed.first % 16 == 0 and packed.row % 16 == 0
    regular = scale is not None and (scale.group, scale.step) == (GROUP, 1)
    return apart and regular and not isinstance(packed.zero, PerGroup)


def _origin(packed: Packed) -> Packed:
    """The same layout from the beginning of its tensors."""
    assert packed.scale is not None
    return replace(packed, first=0, scale=replace(packed.scale, first=0))
