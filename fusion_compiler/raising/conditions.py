"""Comparisons, logic, and what is chosen by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from ..algebra import Value
from ..norms import shift_of
from ..shapes import TRANSPARENT_DTYPES
from .registry import Rule, rule

if TYPE_CHECKING:
    from ..semantics import SemanticView

aten = torch.ops.aten


def _binary(name: str, dtypes: frozenset[torch.dtype]) -> Rule:
    def rule(view: SemanticView, node: Node) -> Value | None:
        if not all(n.meta["val"].dtype in dtypes for n in node.all_input_nodes):
            return None  # integers are compared exactly, which float32 could not
        left, right = view.operand(node.args[0], node), view.operand(node.args[1], node)
        if left is None or right is None or (left is right and node.args[0] is not node.args[1]):
            return None  # what tells x from x rounded lies in the casts
        return view.algebra.binary(name, left, right)

    return rule


for _name in ("le", "lt", "ge", "gt", "eq", "ne"):
    rule(getattr(aten, _name).Tensor, getattr(aten, _name).Scalar)(_binary(_name, TRANSPARENT_DTYPES))
for _name in ("logical_and", "logical_or"):
    rule(getattr(aten, _name).default)(_binary(_name, frozenset({torch.bool})))
rule(aten.bitwise_and.Tensor)(_binary("logical_and", frozenset({torch.bool})))
rule(aten.bitwise_or.Tensor)(_binary("logical_or", frozenset({torch.bool})))


@rule(aten.logical_not.default, aten.bitwise_not.default)
def _not(view: SemanticView, node: Node) -> Value | None:
    [source] = node.all_input_nodes
    return view.algebra.unary("logical_not", view.value(source)) if source.meta["val"].dtype == torch.bool else None


@rule(aten.where.self)
def _where(view: SemanticView, node: Node) -> Value | None:
    if node.meta["val"].dtype not in TRANSPARENT_DTYPES:
        return None
    condition, a, b = (view.operand(argument, node) for argument in node.args)
    if a is not None and a is b and shift_of(view.algebra, a) is not None:
        return a  # Inductor computes the exponents of a scaled softmax in two ways and takes the finite one
    return None if condition is None or a is None or b is None else view.algebra.where(condition, a, b)
