"""Candidates for linears with packed weights: generated Triton kernels for few rows, emitted as nodes of the graph."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sympy
import torch

from ...candidates import Candidate, Unavailable
from ...cost.amounts import amount
from ...cost.roofline import matmul_traffic
from ...fused import MatmulGroup, PerGroup, Site
from ...machine import Machine
from ...splice import load_kernel
from . import packed_direct, packed_predict, predict
from .matmul import Matmuls, interpreted, rows_of
from .packed_direct_source import PackedDirect
from .packed_gemv_source import PackedGemv
from .packed_source import PackedSwap
from .packed_split_source import PackedSplit
from .plans import Plan
from .pointwise import unsupported
from .source import facts
from .writer import KernelSource

if TYPE_CHECKING:
    from torch.fx import Node

    from ...splice import Builder

ROW_LIMITS = (8, 16, 32, 64, 128, 256)  # where M is symbolic: one kernel serves up to so many rows
UNALIGNED = (
    "blocks of 18 bytes are aligned to nothing and are read two bytes at a time; fc.ggml.split(model) stores codes and "
    "scales apart, in as many bytes, and takes about half the time"
)
FRACTIONS = "activations as 15-bit fractions of their block"
DTYPES = (torch.float16, torch.bfloat16)


def candidates(op: Matmuls, machine: Machine) -> list[Candidate] | Unavailable:
    """The kernel for few rows where it serves, and the best tile for each range of M."""
    refusal = _refusal(op, machine)
    if refusal is not None:
        return Unavailable(refusal)
    m = amount(op.m)
    found = []
    if isinstance(m, int) and m <= packed_predict.GEMV_ROWS and _for_gemv(op):
        found += [_gemv_candidate(op, machine, plan) for plan in packed_predict.gemv_plans(op)]
    limited = _few_rows_only(op)
    for limit in [m] if isinstance(m, int) else ROW_LIMITS:
        tiles = packed_predict.tiles(op, machine, limit)
        if tiles.fitting:
            found.append(_candidate(op, machine, tiles, limit))
        elif tiles.rejected:
            return Unavailable(f"no tile fits {machine.name}: {'; '.join(tiles.rejected)}")
    if limited or isinstance(op, MatmulGroup):
        return found or Unavailable(f"{limited}, and M is {m}")
    return found or Unavailable(packed_predict.refusal(op, m if isinstance(m, int) else 1))


def _few_rows_only(op: Matmuls) -> str:
    """What the kernel for few rows does and tiles do not."""
    few = f"up to {packed_predict.GEMV_ROWS} rows"
    if op.whole.q8_activations:
        return f"Q8_1 activations are multiplied with Q4_0 weights for {few}"
    if op.whole.norm is not None:
        return f"a norm is folded in front of packed weights for {few}, which are in registers anyway"
    if len(op.parts) > 1:
        more = f"{packed_direct.MOST_ROWS} in Q4_0 with its scales apart and K a multiple of {packed_direct.STEP}"
        return f"packed weights of one input share a launch for {few}, or {more}"
    return ""


def _for_gemv(op: Matmuls) -> bool:
    """Whether all weights are Q4_0 and laid out alike, with codes and scales aligned as the kernel reads them."""
    first = op.whole.packed[0]
    for packed in (p for part in op.parts for p in part.packed):
        scale, unit = packed.scale, 4 if packed.block == 16 else 2
        blocks = packed.order == "halves" and scale is not None and scale.group == 32
        if not blocks or isinstance(packed.zero, PerGroup) or packed.first % unit or packed.row % unit:
            return False
        assert scale is not None
        if replace(packed, first=0, scale=replace(scale, first=0)) != replace(
            first, first=0, scale=first.scale and replace(first.scale, first=0)
        ):
            return False
    return True


def _refusal(op: Matmuls, machine: Machine) -> str | None:
    if machine.kind == "cpu":
        return "Triton kernels are generated for GPUs"
    if machine.kind == "cuda" and machine.capability < 80:
        return f"{machine.name} ({machine.arch}) has no matrix instructions that Triton reaches"
    if op.dtype not in DTYPES:
        return f"kernels multiply packed weights with float16 and bfloat16 activations, not {op.dtype}; cast the input"
    narrow = next((p.float8 for part in op.parts for p in part.packed if p.float8 is not None), None)
    if narrow is not None and not (machine.kind == "cuda" and machine.capability >= 89):
        return f"{machine.name} ({machine.arch}) has no instructions that widen {narrow}"
    k = amount(op.whole.k)
    if not isinstance(k, int) or not all(isinstance(amount(part.n), int) for part in op.parts):
        return "K and N are symbolic: mark only the rows of the input as dynamic"
    if k % packed_predict.SHORTEST:
        return f"K = {k}: a tile holds a multiple of {packed_predict.SHORTEST} elements of K"
    first = op.whole.packed[0]
    for n, packed in ((int(part.n), p) for part in op.parts for p in part.packed):
        if packed.order != first.order:
            return f"one weight has its codes in {first.order}, another in {packed.order}; pack both the same way"
        if not isinstance(packed.zero, PerGroup) and (packed.zero != first.zero or packed.zero not in range(16)):
            return f"the zero point {packed.zero:g} is no integer from 0 to 15, or not the same for all weights"
        if packed.first + n * packed.row >= 2**31:
            return "its codes reach over 2³¹ bytes of memory, and kernels count in 32 bits; make them contiguous"
        least = 32 if packed.order == "halves" else 16
        for held in (packed.scale, packed.zero):
            if isinstance(held, PerGroup) and (held.group % least or k % held.group):
                return f"groups of {held.group} elements do not divide K = {k}, or are shorter than {least}"
    return next(filter(None, (unsupported(part.epilogue) for part in op.parts)), None)


def _candidate(op: Matmuls, machine: Machine, tiles: packed_predict.Tiles, limit: int) -> Candidate:
    m = amount(op.m)
    traffic = matmul_traffic(op)
    seconds, plan = tiles.fitting[0]
    blocks = packed_direct.columns(op, plan) * plan.splits * (math.ceil(limit / plan.rows) if plan.tiled else 1)
    if not isinstance(m, int):  # over few rows the weights dominate
        moved = sympy.sympify(traffic.bytes_read + traffic.bytes_written)
        seconds = seconds + (moved - moved.subs(m, limit)) / machine.memory_bandwidth
    details = (
        ("numerics", "16-bit activations"), ("rows", plan.rows), ("block_n", plan.block_n), ("block_k", plan.block_k),
        ("num_warps", plan.num_warps), ("num_stages", plan.num_stages),
        ("blocks", blocks), ("rejected tiles", "; ".join(tiles.rejected) or "none"),
        *_layout(op),
    )  # fmt: skip
    return Candidate(
        name="triton_packed",
        kernel=f"triton packed_{plan.label}",
        traffic=traffic,
        seconds=seconds,
        emit=functools.partial(emit, op, plan, machine.kind == "cuda" and not interpreted()),
        once=_zeroing(plan),
        valid=True if isinstance(m, int) else sympy.Le(m, limit),
        details=details,
    )


def _gemv_candidate(op: Matmuls, machine: Machine, plan: Plan) -> Candidate:
    programs = packed_predict.gemv_programs(op, plan, machine)
    shared = f"/{plan.splits}" if plan.splits > 1 else ""
    return Candidate(
        name="triton_packed_gemv",
        kernel=f"triton packed_gemv_n{plan.block_n}w{plan.num_warps}p{programs}{shared}",
        traffic=matmul_traffic(op),
        seconds=packed_predict.gemv_seconds(op, plan, machine),
        once=_zeroing(plan),
        emit=functools.partial(emit_gemv, op, plan, programs, machine.kind == "cuda" and not interpreted()),
        details=(
            ("numerics", "Q8_1 activations" if op.whole.q8_activations else FRACTIONS),
            ("folded norm", op.whole.norm.kind if op.whole.norm else "none"), ("results", len(op.parts)),
            ("block_n", plan.block_n), ("num_warps", plan.num_warps), ("blocks", programs), ("shares", plan.splits),
            *_layout(op),
        ),
    )  # fmt: skip


def _zeroing(plan: Plan) -> float:
    """What a graph pays once for the zeros that programs count in."""
    return predict.constants().zeroing if plan.splits > 1 else 0.0


def _layout(op: Matmuls) -> tuple[tuple[str, str], ...]:
    """What the user can do about how the weights lie."""
    unaligned = any(p.order == "halves" and p.block != 16 for part in op.parts for p in part.packed)
    return (("layout", UNALIGNED),) if unaligned else ()


def emit(op: Matmuls, plan: Plan, native: bool, builder: Builder, site: Site) -> Node | tuple[Node, ...]:
    """Adds the kernel of `plan` to the graph; returns the node in the shape of `site.output`, or one for each of
    several results."""
    k, known = int(op.whole.k), facts(op, plan)
    if plan.kind == "direct" or isinstance(op, MatmulGroup):
        source = PackedDirect(op, plan, known, native=native).write()
        x_stride, x = _aligned_rows(builder, site.operands[0], k, 8)
    else:
        source = (PackedSplit if plan.kind == "split" else PackedSwap)(op, plan, known, native=native).write()
        x_stride, x = rows_of(builder, site.operands[0], k)
    constants = {
        "x_stride": x_stride, "N": int(op.whole.n), "K": k, "BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k,
    }  # fmt: skip
    rows = {"M": op.m} if source.runtime_m else {}
    tiles = builder.ceil_div(op.m, plan.rows) if plan.kind == "tile" else 1
    programs = packed_direct.columns(op, plan) * plan.splits
    grid = tiles * programs if isinstance(tiles, int) else builder.call(operator.mul, tiles, programs)
    return _launched(op, plan, source, grid, x, {**rows, **constants}, builder, site)


def emit_gemv(
    op: Matmuls, plan: Plan, programs: int, native: bool, builder: Builder, site: Site
) -> Node | tuple[Node, ...]:
    """The same for the kernel for few rows, read eight bytes at a time; a node for each of several results."""
    x_stride, x = _aligned_rows(builder, site.operands[0], int(op.whole.k), 4)
    source = PackedGemv(op, plan, programs, x_stride, native=native).write()
    return _launched(op, plan, source, programs, x, {}, builder, site)


def _launched(
    op: Matmuls, plan: Plan, source: KernelSource, programs: int | Node, x: Node, rest: dict[str, Any],
    builder: Builder, site: Site,
) -> Node | tuple[Node, ...]:  # fmt: skip
    values = [output.meta["val"] for output in site.outputs]
    outs = [builder.empty(list(v.shape), p.out_dtype, v.device) for v, p in zip(values, op.parts, strict=True)]
    operands = [x]
    for name, node in zip(source.tensors[1:], site.operands[1:], strict=False):  # the outputs come last
        stored = name[0] in "wsz" and name[1:].isdigit()
        read = node if stored else builder.contiguous(node)
        operands.append(_aligned(builder, read) if stored or name.startswith("norm_") else read)
    written = ["partial"] if plan.splits > 1 else []
    if plan.splits > 1:
        blocks, device = packed_direct.columns(op, plan), values[0].device
        sums = blocks * plan.splits * op.whole.weights * plan.rows * plan.block_n
        counters = builder.zeros(max(blocks, predict.ARRIVALS), torch.int32, device)
        operands += [builder.empty([sums], torch.float32, device), counters]
    arguments = dict(zip(source.tensors, [*operands, *outs], strict=True))
    launched = builder.triton(
        load_kernel(source.text, source.name), [programs], {**arguments, **rest}, [*source.outputs, *written],
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    made = tuple(launched[name] for name in source.outputs)
    return made if len(made) > 1 else made[0]


def _aligned_rows(builder: Builder, node: Node, k: int, unit: int) -> tuple[int, Node]:
    """(distance between rows, node) of x, whose rows all begin where `unit` elements can be loaded at once."""
    x_stride, x = rows_of(builder, _aligned(builder, node), k)
    return (k, builder.contiguous(x)) if x_stride % unit else (x_stride, x)


def _aligned(builder: Builder, node: Node) -> Node:
    """`node`, copied where it does not begin on the boundary that loads of several elements need."""
    value = node.meta["val"]
    offset = value.storage_offset()
    if isinstance(offset, int) and offset * value.dtype.itemsize % 16 == 0:
        return node
    return builder.call(torch.ops.aten.clone.default, node)
