"""Views that keep the elements, casts, transposes and constants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..algebra import Value
from ..shapes import TRANSPARENT_DTYPES, shape_of
from .registry import rule

if TYPE_CHECKING:
    from ..semantics import SemanticView

aten = torch.ops.aten
prims = torch.ops.prims


@rule(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.clone.default, aten.alias.default,
    aten.detach.default, aten.contiguous.default, aten.lift_fresh_copy.default,
)  # fmt: skip
def _same_elements(view: SemanticView, node: Node) -> Value | None:
    return view.value(node.all_input_nodes[0])


@rule(prims.convert_element_type.default, aten._to_copy.default)
def _cast(view: SemanticView, node: Node) -> Value | None:
    source: Any = node.args[0]
    before, after = source.meta["val"], node.meta["val"]
    value = view.value(source)
    if before.dtype == after.dtype or {before.dtype, after.dtype} <= TRANSPARENT_DTYPES:
        return value if before.device == after.device else None
    if value.op == "const" and after.dtype in TRANSPARENT_DTYPES:
        return value
    return view.algebra.make("cast", value, source=before.dtype, dtype=after.dtype)


@rule(aten.expand.default)
def _expand(view: SemanticView, node: Node) -> Value | None:
    return view.operand(node.args[0], node)


@rule(aten.permute.default, aten.transpose.int, aten.t.default)
def _permute(view: SemanticView, node: Node) -> Value | None:
    args: Any = node.args
    source = args[0]
    shape = shape_of(source)
    order = list(range(len(shape)))
    if node.target is aten.permute.default:
        order = [d % len(shape) for d in args[1]]
    elif len(shape) > 1:
        a, b = (d % len(shape) for d in (args[1:3] or (0, 1)))
        order[a], order[b] = order[b], order[a]
    kept = [d for d in range(len(shape)) if shape[d] != 1]
    order = [kept.index(d) for d in order if d in kept]
    value = view.value(source)
    sizes = tuple(shape[d] for d in kept)
    if value.op == "permute" and tuple(value.attr("shape")[d] for d in value.attr("order")) == sizes:
        order = [value.attr("order")[d] for d in order]
        sizes, value = value.attr("shape"), value.args[0]
    if order == sorted(order):
        return value
    return view.algebra.make("permute", value, order=tuple(order), shape=sizes)


@rule(aten.full.default, aten.full_like.default, aten.scalar_tensor.default)
def _full(view: SemanticView, node: Node) -> Value | None:
    fill = node.args[0] if node.target is aten.scalar_tensor.default else node.args[1]
    return view.algebra.const(fill) if isinstance(fill, (bool, int, float)) else None
