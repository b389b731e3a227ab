"""The operands of a found attention as nodes of the shapes that `fused.Attention` documents."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..cost.amounts import amount
from ..fused import Attention, Layout, Site, StoredAttention
from ..splice import Builder

aten = torch.ops.aten


def named(op: Attention, site: Site) -> dict[str, Node]:
    """The site's operands as `Attention` documents them; those of its modification behind "modification."."""
    names = [
        *("q", "k", "v"),
        *(["mask"] if op.mask.tensor != "none" else []),
        *(["position"] if op.mask.position else []),
        *(["lengths"] if op.mask.padding is not None else []),
        *([f"modification.{name}" for name in op.modification.reads] if op.modification is not None else []),
        *(["scale"] if op.scale_operand else []),
    ]
    return dict(zip(names, site.operands, strict=True))


def apart(stored: StoredAttention, site: Site) -> tuple[Site, dict[str, Node]]:
    """The site with the operands of the attention alone, and by name what else is read of what is stored."""
    names = [
        f"{side}_{what}"
        for side, codes in (("k", stored.k), ("v", stored.v))
        if codes is not None
        for what in ("scale", *(["zero"] if codes.has_zero else []))
    ]
    names += ["table"] if stored.pages is not None else []
    own = len(site.operands) - len(names)
    beside = dict(zip(names, site.operands[own:], strict=True))
    return replace(site, operands=site.operands[:own]), beside


def scaled_queries(op: Attention, builder: Builder, site: Site, q: Node) -> Node:
    """The queries with what scales the scores, where that is a tensor."""
    if not op.scale_operand:
        return q
    scale = named(op, site)["scale"]
    if op.scale_layout is not None:
        scale = arranged(builder, scale, op.scale_layout)
    scaled = builder.call(aten.div.Tensor if op.scale_divides else aten.mul.Tensor, q, scale)
    same = scaled.meta["val"].dtype == op.dtype
    return scaled if same else builder.call(torch.ops.prims.convert_element_type.default, scaled, op.dtype)


def queries_keys_values(op: Attention, builder: Builder, site: Site) -> tuple[Node, ...]:
    """q, k and v as kernels take them: in their layouts, a tensor scale multiplied in, rows dense."""
    q, k, v = (arranged(builder, node, layout) for node, layout in zip(site.operands[:3], op.layouts[:3], strict=True))
    return tuple(rows_in_one_piece(builder, node) for node in (scaled_queries(op, builder, site, q), k, v))


def rows_in_one_piece(builder: Builder, node: Node) -> Node:
    """`node` with its last dimension dense. Kernels take that for granted; torch's own dispatcher checks it."""
    value = node.meta["val"]
    dense = statically_known_true(value.shape[-1] == 1) or statically_known_true(value.stride(-1) == 1)
    return node if dense else builder.contiguous(node)


def added_mask(op: Attention, builder: Builder, site: Site) -> Node:
    """The mask tensor as what is added to scores, in the dtype of q, four-dimensional.

    Where rows that see nothing average, the least number hides and not −∞: such rows stay equal, as in eager.
    """
    node = arranged(builder, named(op, site)["mask"], op.layouts[3])
    if op.mask.tensor == "additive":
        return node
    hides = torch.finfo(op.dtype).min if op.mask.empty_rows == "mean" else float("-inf")
    zero, hiding = (number(builder, value, op.dtype, like=node) for value in (0.0, hides))
    kept, dropped = (zero, hiding) if op.mask.tensor == "visible" else (hiding, zero)
    return builder.call(aten.where.self, node, kept, dropped)


def number(builder: Builder, value: float, dtype: torch.dtype, *, like: Node) -> Node:
    """A scalar tensor on the device of `like`."""
    return builder.call(aten.full.default, [], value, dtype=dtype, device=like.meta["val"].device, pin_memory=False)


def arranged(builder: Builder, node: Node, layout: Layout) -> Node:
    """`node` brought into a layout."""
    if list(layout.order) != sorted(layout.order):
        node = builder.reshape(node, layout.split)
        node = builder.call(aten.permute.default, node, list(layout.order))
    node = expanded(builder, builder.reshape(node, layout.merged), layout.shape)
    if node.meta["val"].dtype != layout.dtype:
        node = builder.call(torch.ops.prims.convert_element_type.default, node, layout.dtype)
    return node


def expanded(builder: Builder, node: Node, shape: tuple[int | torch.SymInt, ...]) -> Node:
    """`node` broadcast to `shape`; the node itself where it has that shape."""
    have = node.meta["val"].shape
    if all(a is b or _same(a, b) for a, b in zip(have, shape, strict=True)):
        return node
    return builder.call(aten.expand.default, node, list(shape))


def _same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    return bool(sympy.Eq(amount(a), amount(b)) == sympy.true)
