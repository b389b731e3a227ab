"""Matrix products with a weight, which bmm may repeat for every batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..algebra import Value
from ..norms import normalise_product
from ..shapes import TRANSPARENT_DTYPES, Features, Product, count, shape_of
from .registry import rule

if TYPE_CHECKING:
    from ..semantics import SemanticView

aten = torch.ops.aten


@rule(aten.mm.default)
def _mm(view: SemanticView, node: Node) -> Value | None:
    return _linear(view, node, node.args[0], node.args[1])


@rule(aten.bmm.default)
def _bmm(view: SemanticView, node: Node) -> Value | None:
    args: Any = node.args
    x, w = args
    if _has_one_weight(view, node, w):
        return _linear(view, node, x, w)
    if shape_of(x)[1] == shape_of(w)[2] == 1 and x.meta["val"].dtype in TRANSPARENT_DTYPES:  # rows times rows
        rows = normalise_product(view.algebra, [view.value(x), view.value(w)])
        return view.algebra.make("sum", rows, size=shape_of(x)[2])
    return None


@rule(aten.baddbmm.default)
def _baddbmm(view: SemanticView, node: Node) -> Value | None:
    return _addmm(view, node) if _has_one_weight(view, node, node.args[2]) else None


def _has_one_weight(view: SemanticView, bmm: Node, w: Any) -> bool:
    """Whether every batch of `bmm` is multiplied with the same matrix."""
    batch, k, n = shape_of(w)
    value = view.value(w)
    return batch == 1 or (value.op == "bcast" and value.attr("groups") == ((batch, False), (count((k, n)), True)))


def weight_value(view: SemanticView, w: Node) -> Value:
    """The one matrix that a product multiplies with."""
    value = view.value(w)
    return value.args[0] if value.op == "bcast" and len(shape_of(w)) == 3 else value


@rule(aten.addmm.default)
def _addmm(view: SemanticView, node: Node) -> Value | None:
    bias, x, w = node.args
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    shift = view.operand(bias, node)
    if shift is None or not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
        return None
    product = _linear(view, node, x, w)
    if product is None:
        return None
    algebra = view.algebra
    return algebra.add(algebra.mul(algebra.const(alpha), product), algebra.mul(algebra.const(beta), shift))


def _linear(view: SemanticView, node: Node, x: Any, w: Any) -> Value | None:
    if w.meta["val"].dtype not in TRANSPARENT_DTYPES or x.meta["val"].dtype != w.meta["val"].dtype:
        return None
    weight, kn = weight_value(view, w), True
    if weight.op == "permute" and weight.attr("order") == (1, 0):
        weight, kn = weight.args[0], False
    value = view.algebra.make("linear", view.value(x), weight, kn=kn)
    view.add_product(value, Product(node, x, w, Features(0, shape_of(w)[-1])))
    return value
