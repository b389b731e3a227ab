"""Decode attention as a candidate: few query rows per key/value head, keys split among programs.

Where the mask counts from a position on the device, time follows the keys that are visible and not those allocated.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import TYPE_CHECKING, Any

import sympy
import torch

from ....attention.operands import apart, arranged, named
from ....candidates import Candidate, Unavailable
from ....cost.amounts import amount
from ....fused import Attention, Codes, Layout, Pages, Site, Size, StoredAttention
from ....machine import Machine
from ....splice import load_kernel, same_sizes
from ..matmul import imprecise, interpreted
from . import predict
from .operands import Axes, KernelSource, Operand, Operands, Plan, Table, as_stored, query_rows, row_tiles
from .source import write

if TYPE_CHECKING:
    from torch.fx import Node

    from ....splice import Builder

aten = torch.ops.aten
MOST_ROWS = 128  # query rows per key/value head; with more, a kernel with tiles of queries is the better plan
WIDEST = 256
STORED_ONCE = "What is stored is dequantised or gathered once, in front of the kernel"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def candidates(asked: Attention | StoredAttention, machine: Machine) -> list[Candidate] | Unavailable:
    """The plan predicted fastest, or why there is none."""
    stored = as_stored(asked)
    op, codes = stored.attention, (stored.k, stored.v)
    refusal = _refusal(op, machine, stored=any(codes) or stored.pages is not None) or unreadable(codes, machine)
    if refusal is not None:
        return Unavailable(refusal)
    plan = predict.best_plan(stored, machine)
    if plan is None:
        return Unavailable(f"no tile of keys {op.head_dim} wide in {op.dtype} fits {machine.name} ({machine.arch})")
    keys = predict.expected_keys(op)
    return [
        Candidate(
            name="triton_decode",
            kernel=f"triton {plan.label}",
            traffic=predict.traffic(stored, plan, keys),
            seconds=predict.seconds(stored, plan, machine, keys),
            emit=functools.partial(emit, stored, plan, native=machine.kind == "cuda" and not interpreted()),
            details=(
                ("rows", plan.rows),
                ("block", plan.block),
                ("splits", plan.splits),
                ("num_warps", plan.num_warps),
                ("num_stages", plan.num_stages),
                ("keys expected", keys),
                ("mask tensor", op.mask.kind == "tensor"),
                ("pages", stored.pages.size if stored.pages is not None else 0),
                ("codes", ", ".join("none" if c is None else f"{c.packed} {c.dtype}".strip() for c in codes)),
            ),
        )  # fmt: skip
    ]


def _refusal(op: Attention, machine: Machine, *, stored: bool = False) -> str | None:
    if machine.kind == "cpu":
        return "Triton kernels are generated for GPUs; on a CPU attention is left to torch's kernels and Inductor"
    if machine.kind == "cuda" and machine.capability < 80:
        return f"Triton has no matrix instructions for {machine.name} ({machine.arch})"
    if op.dtype not in DTYPES:
        return f"decode kernels are generated for bfloat16, float16 and float32, not {op.dtype}"
    if op.dtype == torch.bfloat16 and op.dtype not in machine.flops:
        return f"{machine.name} ({machine.arch}) has no bfloat16 units; use float16 there"
    if reason := imprecise(op.dtype):
        return reason
    if op.dtype == torch.float32 and not interpreted():
        return "three products of TF32 came to twice the error of eager's float32; torch's kernels take it, or bfloat16"
    if op.dtype == torch.float32 and machine.kind != "cuda":
        return f"float32 is multiplied in three products of TF32, which Triton does not make for {machine.arch}"
    if not all(isinstance(amount(n), int) for n in (op.heads, op.kv_heads, op.q_len)):
        return "the numbers of heads and queries are symbolic: mark only batch and keys as dynamic"
    if query_rows(op) > MOST_ROWS:
        return (
            f"{query_rows(op)} query rows per key/value head are no decode step; the generated kernel takes {MOST_ROWS}"
            + (f". {STORED_ONCE}" if stored else "")
        )
    if op.scale_layout is not None:
        return "the scores of each row have a scale of their own, and the generated decode kernel takes one for all"
    if op.logarithm is not None:
        return "the logarithm of the sums is read too, which the generated decode kernel does not give"
    if max(op.head_dim, op.v_dim) > WIDEST:
        return f"head dimension {max(op.head_dim, op.v_dim)} exceeds {WIDEST}"
    return _mask_refusal(op)


def unreadable(codes: tuple[Codes | None, Codes | None], machine: Machine) -> str | None:
    narrow = {c.dtype for c in codes if c is not None and c.dtype.is_floating_point}
    if narrow and not (machine.kind == "cuda" and machine.capability >= 89):
        return f"{machine.name} ({machine.arch}) has no instructions that widen {narrow.pop()}"
    return None


def _mask_refusal(op: Attention) -> str | None:
    mask = op.mask
    if mask.kind in ("causal", "length"):
        offset = _expression(mask.offset)
        ahead = sympy.expand(offset - _expression(op.kv_len))
        if not offset.is_Integer and (mask.position or not ahead.is_Integer):
            return f"the offset of the mask, {mask.offset}, is neither a number nor counted from the last key"
    if mask.kind != "tensor":
        return None
    if mask.tensor == "none":
        return f"the mask would have to be read as one tensor, and there is none: {mask.proof}"
    if mask.tensor == "additive":
        if mask.empty_rows == "mean" and op.dtype == torch.float16:
            return f"a row that sees no key averages all values in eager's float16, not in float32: {mask.proof}"
        return None
    if mask.empty_rows in ("mean", "nan"):
        return f"a row that sees no key may not be NaN in eager, and such rows may exist: {mask.proof}"
    return None


def _expression(size: Any) -> sympy.Expr:
    return sympy.sympify(amount(size) if isinstance(size, torch.SymInt) else size)


# ---- emission -------------------------------------------------------------------------------------
def emit(asked: Attention | StoredAttention, plan: Plan, builder: Builder, site: Site, *, native: bool = False) -> Node:
    """Adds the kernel of `plan` to the graph, with NVIDIA's instructions if `native`; returns the node in the shape of
    `site.output`."""
    source, nodes, grid = prepared(asked, plan, builder, site, native=native)
    done = builder.triton(
        load_kernel(source.text, source.name), grid, nodes | source.sizes, source.outputs,
        num_warps=plan.num_warps, num_stages=source.num_stages,
    )  # fmt: skip
    return _shaped(builder, done["out"], as_stored(asked).attention.out)


def prepared(
    asked: Attention | StoredAttention, plan: Plan, builder: Builder, site: Site, *, native: bool = False
) -> tuple[KernelSource, dict[str, Node], tuple[Any, int]]:
    """The kernel, the tensors it is called with, and its grid.

    The mask tensor is read only where nothing better is known of it; otherwise the position alone keeps its nodes.
    """
    stored = as_stored(asked)
    op, codes = stored.attention, (stored.k, stored.v)
    own, beside = apart(stored, site)
    nodes = named(op, own) | beside
    layouts = dict(zip(("q", "k", "v", "mask"), op.layouts, strict=False))
    if op.mask.kind != "tensor":
        nodes.pop("mask", None)
    read: dict[str, Operand] = {}
    for name, held in zip("kv", codes, strict=True):
        if held is not None:
            first = stored.pages is not None and stored.pages.heads_first
            read[name] = coded(builder, nodes, name, held, layouts[name], heads_first=first)
        if stored.pages is not None:
            read[name] = _paged(nodes[name].meta["val"], stored.pages, read.get(name))
    for name in [n for n in ("q", "k", "v", "mask") if n in nodes and n not in read]:
        nodes[name], strides = _readable(builder, nodes[name], layouts[name])
        read[name] = Operand(nodes[name].meta["val"].dtype, strides)
    device = nodes["q"].meta["val"].device
    nodes["out"], out_strides = _empty(builder, op, device)
    operands = Operands(
        read["q"], read["k"], read["v"], Operand(op.out.dtype, out_strides), read.get("mask"),
        position=_dtype(nodes, "position"), lengths=_dtype(nodes, "lengths"), scale=_dtype(nodes, "scale"),
        table=_table(nodes), one_length="lengths" in nodes and same_sizes([nodes["lengths"].meta["val"].numel()], [1]),
    )  # fmt: skip
    tiles = _product(builder, op.batch, op.kv_heads, row_tiles(op, plan))
    if plan.splits > 1:
        slots = [_product(builder, op.batch, op.kv_heads), plan.splits, query_rows(op)]
        nodes["partial"] = builder.empty([*slots, op.v_dim], torch.float32, device)
        nodes["stats"] = builder.empty([*slots, 2], torch.float32, device)
        nodes["arrivals"] = builder.zeros(tiles, torch.int32, device)
    source = write(op, plan, operands, native=native)
    return source, {name: nodes[name] for name in source.tensors}, (tiles, plan.splits)


def coded(
    builder: Builder, nodes: dict[str, Node], name: str, codes: Codes, layout: Layout, *, heads_first: bool
) -> Operand:
    """Codes, scale and zero as the kernel reads them, through the layout of what they stand for."""
    shape = layout.split

    def strides(node: Node, columns: Size) -> Axes:
        with builder.fake_mode, torch.no_grad():
            view = node.meta["val"].expand(*shape[:-1], columns).permute(layout.order)
        return _spread(view)

    stored = int(shape[-1]) // (2 if codes.packed else 1)
    held = {}
    for what in ("scale", "zero"):
        node = nodes.get(f"{name}_{what}")
        if node is not None:
            value = node.meta["val"]
            held[what] = Operand(value.dtype, _beside(value, heads_first) if codes.in_pages else strides(node, 1))
    paged = "table" in nodes  # then these are the strides of something else
    own = (0, 0, 0, 0) if paged else strides(nodes[name], stored)
    return Operand(codes.dtype, own, codes, held.get("scale"), held.get("zero"))


def _beside(scales: torch.Tensor, heads_first: bool) -> Axes:
    """Strides of scales that lie in pages, along blocks, heads and positions."""
    blocks, rows, heads = scales.stride()[:3]
    return (blocks, rows, heads, 0) if heads_first else (blocks, heads, rows, 0)


def _paged(cache: torch.Tensor, pages: Pages, codes: Operand | None) -> Operand:
    """A cache of blocks as the kernel reads it."""
    blocks, rows, heads, columns = cache.stride()
    if pages.heads_first:
        rows, heads = heads, rows
    found = codes if codes is not None else Operand(cache.dtype, (0, 0, 0, 0))
    return dataclasses.replace(found, strides=(blocks, heads, rows, columns), page=pages.size)


def _table(nodes: dict[str, Node]) -> Table | None:
    if "table" not in nodes:
        return None
    table = nodes["table"].meta["val"]
    return Table(table.dtype, table.stride(), nodes["k"].meta["val"].shape[0])


def _dtype(nodes: dict[str, Node], name: str) -> torch.dtype | None:
    return nodes[name].meta["val"].dtype if name in nodes else None


def _product(builder: Builder, *factors: Any) -> Any:
    """A product of sizes as an entry of a grid or a shape: a number, or a node that holds it."""
    result: Any = 1
    for factor in factors:
        factor = builder.scalar(factor) if isinstance(factor, torch.SymInt) else factor
        known = isinstance(result, int) and isinstance(factor, int)
        if known or factor == 1:
            result = result * factor if known else result
        else:
            result = factor if result == 1 else builder.call(operator.mul, result, factor)
    return result


# ---- layouts: strides instead of nodes -------------------------------------------------------------
def _readable(builder: Builder, node: Node, layout: Layout) -> tuple[Node, Axes]:
    """(node, strides along the documented axes), the node copied only where no strides bring it into the layout."""
    strides = _strides(builder, node.meta["val"], layout)
    if strides is None:
        node = arranged(builder, node, dataclasses.replace(layout, dtype=node.meta["val"].dtype))
        strides = _spread(node.meta["val"])
    return node, strides


def _strides(builder: Builder, value: torch.Tensor, layout: Layout) -> Axes | None:
    with builder.fake_mode, torch.no_grad():
        view = value.reshape(layout.split).permute(layout.order).reshape(layout.merged).expand(layout.shape)
    if view.untyped_storage()._cdata != value.untyped_storage()._cdata:
        return None
    return _spread(view)


def _spread(view: torch.Tensor) -> Axes:
    """Strides, 0 where there is one index only, as in a mask that is broadcast."""
    strides: tuple[Any, ...] = view.stride()
    batch, heads, rows, columns = (
        0 if isinstance(size, int) and size == 1 else stride for size, stride in zip(view.shape, strides, strict=True)
    )
    return batch, heads, rows, columns


def _empty(builder: Builder, op: Attention, device: torch.device) -> tuple[Node, Axes]:
    """An empty tensor for the result, permuted as the site's output wants it where strides allow, and its strides."""
    layout, shape = op.out, (op.batch, op.heads, op.q_len, op.v_dim)
    inverse = [layout.order.index(d) for d in range(len(layout.order))]
    node = builder.empty([layout.split[d] for d in layout.order], layout.dtype, device)
    value = node.meta["val"]
    with builder.fake_mode, torch.no_grad():
        view = value.permute(inverse).reshape(shape)
    if view.untyped_storage()._cdata == value.untyped_storage()._cdata:
        return node, _spread(view)
    node = builder.empty(shape, layout.dtype, device)
    return node, _spread(node.meta["val"])


def _shaped(builder: Builder, node: Node, layout: Layout) -> Node:
    """What the kernel wrote into the tensor of `_empty`, in the shape of the site's output."""
    permuted = [layout.split[d] for d in layout.order]
    if not same_sizes(node.meta["val"].shape, permuted):
        node = builder.call(aten.permute.default, builder.reshape(node, layout.split), list(layout.order))
    node = builder.reshape(node, layout.merged)
    if same_sizes(node.meta["val"].shape, layout.shape):
        return node
    return builder.call(aten.expand.default, node, list(layout.shape))
