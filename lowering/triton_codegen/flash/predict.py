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
from ....fused import Attention, Codes, StoredAttention
from ....machine import TABLE, Machine
from ..decode.attention import STORED_ONCE, unreadable
from ..decode.operands import as_stored
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
    that is left alone on an SM `alone` times its part of one that is shared. Of keys and values that are codes, `code`
    or `float8` per number that a program makes of them, and `scale` per score and scale or zero."""

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
    code: float
    float8: float
    scale: float


@functools.cache
def constants() -> Constants:
    raw: dict[str, Any] = json.loads((resources.files(__package__) / "efficiency.json").read_text())
    return Constants(**raw["constants"])


def candidates(asked: Attention | StoredAttention, machine: Machine) -> list[Candidate] | Unavailable:
    """The fastest predicted plan."""
    stored = as_stored(asked)
    op, codes = stored.attention, (stored.k, stored.v)
    refusal = unserved(op, machine) or unstored(stored, machine)
    if refusal:
        return Unavailable(refusal)
    plan = chosen(stored, machine)
    if plan is None:
        return Unavailable(f"no block of queries and keys of {op.dtype} fits the shared memory of {machine.name}")
    try:
        write(op, plan, contiguous(op, _reads(op)))
    except Unprintable as error:
        return Unavailable(f"what happens to the scores cannot be written into a kernel: {error}")
    traffic = attention_traffic(op)
    spared = sum(_bytes_spared(op, side, code) for side, code in zip("kv", codes, strict=True))
    traffic = replace(traffic, bytes_read=traffic.bytes_read - spared)
    return [
        Candidate(
            name="triton_flash",
            kernel=f"triton flash_{plan.label}",
            traffic=traffic,
            seconds=seconds(stored, plan, machine, traffic),
            emit=functools.partial(emit, stored, plan, native=machine.kind == "cuda" and not interpreted()),
            details=(
                ("block_m", plan.block_m), ("block_n", plan.block_n), ("num_warps", plan.num_warps),
                ("num_stages", plan.num_stages), ("blocks listed", plan.listed),
                ("codes", ", ".join("none" if c is None else f"{c.packed} {c.dtype}".strip() for c in codes)),
            ),
        )
    ]  # fmt: skip


def chosen(asked: Attention | StoredAttention, machine: Machine) -> Plan | None:
    """The first plan that fits the machine."""
    stored = as_stored(asked)
    return next((p for p in plans(stored, machine) if shared_memory(stored, p) <= machine.shared_memory), None)


def unstored(stored: StoredAttention, machine: Machine) -> str:
    """Why what is stored is no form that the kernel reads."""
    if stored.pages is not None:
        return f"many queries read no pages of a cache. {STORED_ONCE}"
    if (stored.k or stored.v) and stored.attention.dtype == torch.float32:
        return f"codes become numbers of float16 and bfloat16 in the kernel. {STORED_ONCE}"
    return unreadable((stored.k, stored.v), machine) or ""


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


def plans(asked: Attention | StoredAttention, machine: Machine) -> Iterator[Plan]:
    """Plans from the fastest on, as measured: two programs share an SM, so that the softmax of one hides behind the
    products of the other."""
    stored = as_stored(asked)
    op, codes = stored.attention, [code for code in (stored.k, stored.v) if code is not None]
    width = sum(size for _, size in (*pieces(op.head_dim), *pieces(op.v_dim)))
    if op.dtype == torch.float32:
        blocks = [(32, 32, 4, 2)] * (width <= 128) + [(16, 32, 4, 2)]
    else:
        few = [(64, 64, 4, 3)] * (width <= 256) + [(64, 64, 4, 2)] * (256 < width <= 320)
        if codes and width <= 256 and not any(code.has_zero for code in codes):
            few = [(64, 128, 4, 2)]  # with zeros too its registers do not suffice
        blocks = [*few, (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)]
    whole = len(pieces(op.head_dim)) == len(pieces(op.v_dim)) == 1
    describing = machine.kind == "cuda" and machine.capability >= DESCRIBING
    described = describing and whole and op.dtype != torch.float32 and not codes
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


def shared_memory(asked: Attention | StoredAttention, plan: Plan) -> int:
    """Upper estimate of a program's shared memory: the queries, and keys and values of every stage, or where they are
    codes these of every stage and numbers of one."""
    stored = as_stored(asked)
    op, item = stored.attention, stored.attention.dtype.itemsize
    held = item * plan.block_m * sum(size for _, size in pieces(op.head_dim)) + 2048
    for width, codes in ((op.head_dim, stored.k), (op.v_dim, stored.v)):
        tile = plan.block_n * sum(size for _, size in pieces(width))
        bytes_of_codes = 0.5 if codes is not None and codes.packed else 1
        held += (
            plan.num_stages * tile * item if codes is None else int((plan.num_stages * bytes_of_codes + item) * tile)
        )
    return held


def seconds(asked: Attention | StoredAttention, plan: Plan, machine: Machine, traffic: Traffic) -> Amount:
    """Predicted time, launches included."""
    stored = as_stored(asked)
    op = stored.attention
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
    step += sum(_making(code, width, plan) for code, width in ((stored.k, op.head_dim), (stored.v, op.v_dim)))
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


def _making(codes: Codes | None, width: int, plan: Plan) -> float:
    """What the numbers of codes and their scales add to a score."""
    if codes is None:
        return 0.0
    known = constants()
    each = known.float8 if codes.dtype.is_floating_point else known.code
    return each * sum(size for _, size in pieces(width)) / plan.block_m + known.scale * (3 if codes.has_zero else 1)


def _bytes_spared(op: Attention, side: str, codes: Codes | None) -> Amount:
    """What is not read of keys or values that are codes."""
    if codes is None:
        return 0
    width = op.head_dim if side == "k" else op.v_dim
    elements = amount(op.batch) * amount(op.kv_heads) * amount(op.kv_len) * width
    return elements * (op.dtype.itemsize - (0.5 if codes.packed else 1))


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
