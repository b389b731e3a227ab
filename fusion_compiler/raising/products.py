"""Matrix products with a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..algebra import Value
from ..shapes import TRANSPARENT_DTYPES, Product, shape_of
from .registry import rule

if TYPE_CHECKING:
    from ..semantics import SemanticView

aten = torch.ops.aten


@rule(aten.mm.default)
def _mm(view: SemanticView, node: Node) -> Value | None:
    return _linear(view, node, node.args[0], node.args[1])


@rule(aten.bmm.default)
def _bmm(view: SemanticView, node: Node) -> Value | None:
    return _linear(view, node, node.args[0], node.args[1]) if shape_of(node)[0] == 1 else None


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
    weight, kn = view.value(w), True
    if weight.op == "permute" and weight.attr("order") == (1, 0):
        weight, kn = weight.args[0], False
    value = view.algebra.make("linear", view.value(x), weight, kn=kn)
    view.add_product(value, Product(node, x, w, (0, shape_of(w)[-1])))
    return value
