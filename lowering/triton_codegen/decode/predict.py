"""Predicted time of split-KV decode attention, and the plans worth predicting.

seconds = start + step + ‖(memory, chain)‖₇ + ramp · (1 − 1 / steps) + (waves − 1) · wave + gather + launch
memory  = bytes / (bandwidth · reached), longer where the last wave is not full
chain   = (waves · steps of a program − 1) · step: a program waits for its tiles, computes, asks for the next
step    = base + bytes of a tile + latency of the memory, hidden by pipeline stages, + work of the programs that share
          the SM: products of rows beyond eight, or in float32 all of them, on the ordinary units
gather  = the last program of a tile waits for the others and reads what they left, some splits and columns at a time

The 7-norm is a soft maximum; symbolic amounts take the maximum itself, which can be solved for crossovers. The
constants are measured (efficiency.json, with device, date and versions) at 8 to 64 rows.

Every code takes `code`, `half` or `float8` more, and where warps have keys of their own, their results `meet`, the
slower the more programs are `beside`.
How many keys a position on the device will leave visible is not known when compiling. Plans are made for the allocated
keys, but half of them are priced: the positions of a cache that fills up are evenly spread.
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

from ....candidates import Amount, Traffic
from ....cost.amounts import amount, ceil_div, is_symbolic, maximum, minimum
from ....fused import Attention, Codes, StoredAttention
from ....machine import Machine
from .operands import Plan, as_stored, power_of_two, query_rows, row_tiles
from .source import GATHERED_SPLITS, by_entries, gathered

TILE_BYTES = (16 * 1024, 64 * 1024)  # of k and v in one step: less leaves the memory idle, more costs resident programs
WARPS = 4  # measured: as good as 2 with small tiles and as 8 with large ones
WARPS_PER_SM = 64
MOST_SPLITS = 128
PER_SM = (0.5, 1)  # programs per SM that a number of splits aims at: more were slower
# With codes every warp has keys of its own: so many at a step, of so many bytes, as more numbers at a time spill.
OWN_KEYS = (16, 32, 64)
OWN_BYTES = 8192
OWN_PER_SM = (1, 2)
OWN_WARPS_PER_SM = 8  # by their registers
TILE_ROWS = 64
FEWEST_ROWS = {"cuda": 8, "rocm": 16}  # narrowest operand of the matrix units
HINT = 4096  # keys that a plan is made for where their number is symbolic


@dataclass(frozen=True)
class Constants:
    start: float
    step: float
    step_byte: float
    product: float  # per multiply-add of rows beyond eight
    latency: float
    wave: float
    tail: float  # more of the time to read, for the places that are empty in the last of several waves
    ramp: float  # until memory is as busy as it gets, where a program takes several steps
    reached: float  # fraction of the machine's (copy) bandwidth that pure reading reaches
    ordinary_fraction: float
    gather: float
    gather_step: float
    code: float  # to make a number of a code of eight bits
    half: float  # of four bits
    float8: float
    meet: float  # until the results of warps that have keys of their own are one
    beside: float  # the same for every program that shares the SM
    page: float  # per step that reads an entry of the table for each key,
    entry: float  # or only one for each page


@functools.cache
def constants() -> Constants:
    raw: dict[str, Any] = json.loads((resources.files(__package__) / "efficiency.json").read_text())
    return Constants(**{k: v for k, v in raw.items() if k not in ("device", "date", "versions", "method")})


def plans(stored: StoredAttention, machine: Machine) -> Iterator[Plan]:
    """Every plan that fits `machine`."""
    op, own = stored.attention, _coded(stored) > 0
    fewest = FEWEST_ROWS.get(machine.kind, 16)
    rows = min(fewest if own else TILE_ROWS, power_of_two(max(fewest, query_rows(op))))
    keys = amount(op.kv_len)
    longest = keys if isinstance(keys, int) else HINT
    pairs = _hint(op.batch) * int(op.kv_heads) * -(-query_rows(op) // rows)
    for block, stages in itertools.product(_blocks(stored), (2, 3, 4)):
        tile = tile_bytes(stored, block)
        if stages * tile + 4096 > machine.shared_memory or (stages == 2 and 3 * tile + 4096 <= machine.shared_memory):
            continue
        most = min(MOST_SPLITS, -(-longest // block))
        per_sm = OWN_PER_SM if own else PER_SM
        wanted = [int(n * machine.num_sms / pairs) if own else round(n * machine.num_sms / pairs) for n in per_sm]
        # and as many as are added up without a round for the last few
        wanted += [n // GATHERED_SPLITS * GATHERED_SPLITS for n in wanted] if own else []
        for splits in sorted({1, *(max(1, min(most, n)) for n in wanted)}):
            yield Plan(rows, block, splits, WARPS, stages, own)


def _blocks(stored: StoredAttention) -> Iterator[int]:
    """How many keys a step may have."""
    op = stored.attention
    if _coded(stored):
        widths = [width * _size(op, code) for width, code in ((op.head_dim, stored.k), (op.v_dim, stored.v)) if code]
        most = OWN_BYTES / max(widths) / (op.dtype.itemsize / 2) / max(1, max(op.head_dim, op.v_dim) / 128)
        yield from (WARPS * keys for keys in OWN_KEYS if keys <= max(most, OWN_KEYS[0]))
        return
    for block in (32, 64, 128):
        tile = tile_bytes(stored, block)
        smallest, largest = block == 32 and tile > TILE_BYTES[1], block == 128 and tile < TILE_BYTES[0]
        if TILE_BYTES[0] <= tile <= TILE_BYTES[1] or smallest or largest:
            yield block


def best_plan(asked: Attention | StoredAttention, machine: Machine) -> Plan | None:
    """The plan predicted fastest for all allocated keys."""
    stored = as_stored(asked)
    op = stored.attention
    keys = amount(op.kv_len)
    filled = keys if isinstance(keys, int) else HINT
    if op.mask.window is not None:
        filled = min(filled, op.mask.window + int(op.q_len))
    found = enumerate(plans(stored, machine))
    timed = [(_number(seconds(stored, plan, machine, filled), op), i, plan) for i, plan in found]
    return min(timed)[2] if timed else None


def expected_keys(op: Attention) -> Amount:
    """Keys that are walked through, in expectation where a position on the device decides."""
    keys = amount(op.kv_len)
    if op.mask.kind not in ("causal", "length"):
        return keys
    if op.mask.position:
        filled = (keys + 1) / 2 if not isinstance(keys, int) else (keys + 1) // 2
    else:
        filled = minimum(keys, amount(op.q_len) + op.mask.offset if op.mask.kind == "causal" else op.mask.offset + 1)
    return filled if op.mask.window is None else minimum(filled, op.mask.window + amount(op.q_len))


def traffic(asked: Attention | StoredAttention, plan: Plan, keys: Amount) -> Traffic:
    """k and v (and a mask that is read) once, q, the result, and what the splits leave for the last one."""
    stored = as_stored(asked)
    op, bytes_per_key = stored.attention, _bytes_per_key(stored)
    item, pairs = op.dtype.itemsize, amount(op.batch) * int(op.kv_heads)
    rows = pairs * query_rows(op)
    read = pairs * keys * bytes_per_key + item * rows * op.head_dim
    if op.mask.kind == "tensor":
        read = read + amount(op.q_len) * keys * (item if op.mask.tensor == "additive" else 1)
    handed = 4 * rows * plan.splits * (op.v_dim + 2) if plan.splits > 1 else 0
    flops = 2 * rows * keys * (op.head_dim + op.v_dim)
    return Traffic(flops, read + handed, item * rows * op.v_dim + handed, 1)


def seconds(asked: Attention | StoredAttention, plan: Plan, machine: Machine, keys: Amount) -> Amount:
    """Predicted time where `keys` keys are walked through."""
    known, stored = constants(), as_stored(asked)
    op = stored.attention
    pairs = amount(op.batch) * int(op.kv_heads)
    blocks = ceil_div(keys, plan.block)
    active = minimum(blocks, plan.splits)
    programs = pairs * row_tiles(op, plan) * active
    together = minimum(resident(stored, plan, machine), ceil_div(programs, machine.num_sms))
    waves = ceil_div(programs, machine.num_sms * resident(stored, plan, machine))
    work = known.product * (plan.rows - 8) * plan.block * (op.head_dim + op.v_dim)
    if op.dtype == torch.float32:
        flops = 2 * plan.rows * plan.block * (op.head_dim + op.v_dim)
        work = flops / (machine.vector_flops / machine.num_sms * known.ordinary_fraction)
    step = known.step + known.step_byte * tile_bytes(stored, plan.block) + known.latency / (plan.num_stages - 1)
    for width, code in ((op.head_dim, stored.k), (op.v_dim, stored.v)):
        if code is not None:
            each = known.half if code.packed else known.float8 if code.dtype.is_floating_point else known.code
            work += each * plan.block * width
    # four warps alone make numbers half as fast as two programs' eight
    step = step + work * (maximum(together, 2) if plan.own_keys else together)
    if stored.pages is not None:
        size = stored.pages.size
        step = step + (known.entry if size % plan.block == 0 or by_entries(plan, size) else known.page)
        if any(code is not None and code.in_pages for code in (stored.k, stored.v)):
            step = step + known.page  # not measured: as an entry for each key once more
    steps = waves * ceil_div(blocks, active)
    chain = (steps - 1) * step
    moved = pairs * keys * _bytes_per_key(stored)
    memory = moved / (machine.memory_bandwidth * known.reached)
    if not is_symbolic(waves) and waves > 1:
        memory *= 1 + known.tail * (1 - programs / (waves * machine.num_sms * resident(stored, plan, machine)))
    total = known.start + step + _softly(memory, chain) + (waves - 1) * known.wave + machine.launch_overhead
    total = (
        total + known.ramp * (1 - 1 / steps) + (known.meet + known.beside * (together - 1) if plan.own_keys else 0.0)
    )
    if plan.splits > 1:
        rows, splits = gathered(op, plan)
        rounds = ceil_div(active, splits) * math.ceil(min(plan.rows, query_rows(op)) / rows)
        total = total + known.gather + known.gather_step * rounds
    return total


def _softly(a: Amount, b: Amount) -> Amount:
    return maximum(a, b) if is_symbolic(a) or is_symbolic(b) else float((a**7 + b**7) ** (1 / 7))


def tile_bytes(stored: StoredAttention, block: int) -> int:
    """Bytes of k and v in shared memory for one step."""
    op, total = stored.attention, 0.0
    for width, code in zip((op.head_dim, op.v_dim), (stored.k, stored.v), strict=True):
        total += block * power_of_two(max(16, width)) * _size(op, code)
    return int(total)


def _bytes_per_key(stored: StoredAttention) -> float:
    op = stored.attention
    return op.head_dim * _size(op, stored.k) + op.v_dim * _size(op, stored.v)


def _size(op: Attention, code: Codes | None) -> float:
    """Bytes of an element."""
    return op.dtype.itemsize if code is None else 0.5 if code.packed else 1


def _coded(stored: StoredAttention) -> int:
    """How many elements of a key and its value are codes."""
    op = stored.attention
    return op.head_dim * (stored.k is not None) + op.v_dim * (stored.v is not None)


def resident(stored: StoredAttention, plan: Plan, machine: Machine) -> int:
    """Programs that run on one SM at once."""
    # a stage is computed with while the others are held; what codes cost was fitted without that
    held = plan.num_stages if plan.own_keys else plan.num_stages - 1
    memory = held * tile_bytes(stored, plan.block) + (2048 if plan.own_keys else 4096)
    warps = OWN_WARPS_PER_SM if plan.own_keys else WARPS_PER_SM
    return max(1, min(machine.shared_memory // memory, warps // plan.num_warps))


def _hint(size: int | torch.SymInt) -> int:
    """The size, or the one that a symbolic size was traced with."""
    if not isinstance(size, torch.SymInt):
        return size
    return int(size.node.hint) if size.node.hint is not None else 1


def _number(value: Amount, op: Attention) -> float:
    """`value` at the sizes seen when tracing."""
    if isinstance(value, (int, float)):
        return float(value)
    sizes = {s: _hint(n) for n in (op.batch, op.kv_len) for s in getattr(amount(n), "free_symbols", ())}
    return float(value.subs(sizes))
