"""Candidates for attention: the plans of the flash kernel, what each is predicted to take, and what it cannot serve.

A program visits the blocks of keys that its rows may see; a block costs its products on the matrix units and its
softmax on the ordinary ones, at rates that were measured per kind of plan. Programs fill the machine in waves.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef

from ....attention.choices import parts_of
from ....candidates import Amount, Candidate, Traffic, Unavailable
from ....cost.amounts import amount, ceil_div, maximum
from ....cost.roofline import attention_traffic, visible_keys
from ....fused import Attention
from ....machine import TABLE, Machine
from ..matmul import imprecise, interpreted
from .emit import emit
from .expressions import Read
from .limits import proved
from .plan import Plan, pieces
from .scores import Scores, slope
from .sizes import Unprintable
from .source import contiguous, write

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FEWEST_QUERIES = 16  # below, most rows of a block would be padding
WIDEST_HEAD = 256
DESCRIBING = 90  # the compute capability from which keys come through descriptors, 2–3 % faster
LISTED_SCORES = 1024**2  # fewer are computed before lists of them are made


@dataclass(frozen=True)
class Constants:
    """Seconds of one SM: `product` per score and element of its two head dimensions, `score` per score (softmax), `cap`
    per capped score, `native_cap` where the chip's own tanh does it, `operation` per operation of a modification,
    `start` per row and element of a program beside its steps; `launch` of the kernel beside the machine's own overhead,
    `listing` of the kernels that list blocks. Products in full float32 take `ordinary` times as long, and a program
    that is left alone on an SM `alone` times its part of one that is shared."""

    product: float
    score: float
    cap: float
    native_cap: float
    operation: float
    start: float
    launch: float
    listing: float
    ordinary: float
    alone: float


@functools.cache
def constants() -> Constants:
    raw: dict[str, Any] = json.loads((resources.files(__package__) / "efficiency.json").read_text())
    return Constants(**raw["constants"])


def candidates(op: Attention, machine: Machine) -> list[Candidate] | Unavailable:
    """The fastest predicted plan."""
    refusal = unserved(op, machine)
    if refusal:
        return Unavailable(refusal)
    plan = chosen(op, machine)
    if plan is None:
        return Unavailable(f"no block of queries and keys of {op.dtype} fits the shared memory of {machine.name}")
    try:
        write(op, plan, contiguous(op, _reads(op)))
    except Unprintable as error:
        return Unavailable(f"what happens to the scores cannot be written into a kernel: {error}")
    traffic = attention_traffic(op)
    return [
        Candidate(
            name="triton_flash",
            kernel=f"triton flash_{plan.label}",
            traffic=traffic,
            seconds=seconds(op, plan, machine, traffic),
            emit=functools.partial(emit, op, plan),
            details=(
                ("block_m", plan.block_m), ("block_n", plan.block_n), ("num_warps", plan.num_warps),
                ("num_stages", plan.num_stages), ("blocks listed", plan.listed),
            ),
        )
    ]  # fmt: skip


def chosen(op: Attention, machine: Machine) -> Plan | None:
    """The first plan that fits the machine."""
    return next((p for p in plans(op, machine) if shared_memory(op, p) <= machine.shared_memory), None)


def unserved(op: Attention, machine: Machine) -> str:
    if machine.kind == "cpu":
        return "Triton kernels are generated for GPUs; on a CPU attention is left to torch's kernels and Inductor"
    if machine.kind == "cuda" and machine.capability < 80:
        return f"Triton has no matrix instructions for {machine.arch}"
    if op.dtype not in DTYPES or op.out.dtype not in DTYPES:
        return f"the generated kernel takes bfloat16, float16 and float32, not {op.dtype}"
    if op.dtype == torch.bfloat16 and op.dtype not in machine.flops:
        return f"{machine.name} ({machine.arch}) has no bfloat16 units; use float16 there"
    if reason := imprecise(op.dtype):
        return reason
    if op.dtype == torch.float32 and machine.kind != "cuda":
        return f"float32 is multiplied in three products of TF32, which Triton does not make for {machine.arch}"
    if max(op.head_dim, op.v_dim) > WIDEST_HEAD:
        return f"head dimension {max(op.head_dim, op.v_dim)} exceeds {WIDEST_HEAD}"
    q_len = amount(op.q_len)
    if isinstance(q_len, int) and q_len < FEWEST_QUERIES:
        return f"{q_len} queries would leave most of a block empty"
    if op.mask.kind == "tensor" and op.modification is None:
        return f"what happens to the scores cannot be written into a kernel: {op.mask.proof}"
    return ""


def plans(op: Attention, machine: Machine) -> Iterator[Plan]:
    """Plans from the fastest on, as measured: two programs share an SM, so that the softmax of one hides behind the
    products of the other."""
    width = sum(size for _, size in (*pieces(op.head_dim), *pieces(op.v_dim)))
    if op.dtype == torch.float32:
        blocks = [(32, 32, 4, 2)] * (width <= 128) + [(16, 32, 4, 2)]
    else:
        few = [(64, 64, 4, 3)] * (width <= 256) + [(64, 64, 4, 2)] * (256 < width <= 320)
        blocks = [*few, (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)]
    whole = len(pieces(op.head_dim)) == len(pieces(op.v_dim)) == 1
    describing = machine.kind == "cuda" and machine.capability >= DESCRIBING
    described = describing and whole and op.dtype != torch.float32
    for block_m, block_n, warps, stages in blocks:
        yield Plan(block_m, block_n, warps, stages, described, _is_listed(op), _is_native(op, machine))


def _is_native(op: Attention, machine: Machine) -> bool:
    """Whether a cap is left to the tanh of NVIDIA's chips, which errs by up to 2⁻¹¹ of its result: eager's own scores
    are rounded to 2⁻⁹ in bfloat16, but to 2⁻¹² in float16."""
    capped = op.softcap is not None and op.dtype == torch.bfloat16
    return capped and machine.kind == "cuda" and machine.capability >= 75 and not interpreted()


def _is_listed(op: Attention) -> bool:
    """Whether looking for blocks that can be skipped is likely to pay."""
    made = op.modification
    if made is None or made.visible == sympy.true or made.finite:
        return False
    sizes = op.batch, op.heads, op.q_len, op.kv_len
    return all(isinstance(n, int) for n in sizes) and int(op.q_len) * int(op.kv_len) >= LISTED_SCORES


def shared_memory(op: Attention, plan: Plan) -> int:
    """Upper estimate of a program's shared memory: the queries, and keys and values of every stage."""
    qk, pv = (sum(size for _, size in pieces(width)) for width in (op.head_dim, op.v_dim))
    return op.dtype.itemsize * (plan.block_m * qk + plan.num_stages * plan.block_n * (qk + pv)) + 2048


def seconds(op: Attention, plan: Plan, machine: Machine, traffic: Traffic) -> Amount:
    """Predicted time, launches included."""
    known, made = constants(), op.modification
    limited = replace(op, mask=proved(op))
    width = sum(size for _, size in (*pieces(op.head_dim), *pieces(op.v_dim)))
    step = known.product * width * (known.ordinary if op.dtype == torch.float32 else 1.0) + known.score
    if op.softcap is not None:
        # the chip's tanh takes no longer than the running maximum that is not needed then
        bounded = Scores(op, plan, {}).bound is not None
        step += 0.0 if bounded else known.native_cap if plan.native else known.cap
    if made is not None:
        added = [1 if slope(op, a) is not None else _operations(a) for a in made.added]
        step += known.operation * (sum(added) + (0 if plan.listed else _operations(made.visible)))
    block = plan.block_n + plan.block_m
    programs = amount(op.batch) * amount(op.heads) * ceil_div(amount(op.q_len), plan.block_m)
    mean = plan.block_m * (visible_keys(limited, block) * step + known.start * width)
    # the program of the last queries has the most keys, and an SM of its own only in part
    mask = replace(limited.mask, offset=amount(limited.mask.offset) + amount(op.q_len) - 1)
    most = visible_keys(replace(limited, q_len=1, mask=mask), block)
    longest = plan.block_m * (most * step * known.alone + known.start * width)
    # constants are of the H200's SMs; others are taken to be as fast as their matrix units
    faster = TABLE["h200"].rate(op.dtype) / TABLE["h200"].num_sms * machine.num_sms / machine.rate(op.dtype)
    work = maximum(programs / machine.num_sms * mean, longest) * faster
    moved = (traffic.bytes_read + traffic.bytes_written) / machine.memory_bandwidth
    launches = known.launch + machine.launch_overhead + (known.listing if plan.listed else 0.0)
    return maximum(work, moved) + launches


def _reads(op: Attention) -> dict[str, Read]:
    """Tensors of the right ranks for what the modification reads."""
    made = op.modification
    if made is None:
        return {}
    terms = [*made.added, made.visible, *([made.sink] if made.sink is not None else [])]
    loads = {str(f.func): len(f.args) for e in terms for part in parts_of(e) for f in part.atoms(AppliedUndef)}
    names = [n for n in made.reads if n not in ("position", "lengths")]
    return {n: Read(f"read{i}", (1,) * loads.get(n, 0), op.dtype) for i, n in enumerate(names)}


def _operations(term: object) -> int:
    """Operations per score that a term takes."""
    formulas = parts_of(term)
    loads = sum(len(formula.atoms(AppliedUndef)) for formula in formulas)
    return len(formulas) // 2 + sum(int(sympy.count_ops(formula)) for formula in formulas) + 2 * loads
