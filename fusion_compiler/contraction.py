"""Sums of products over one axis, however spelled: bmm, mm, baddbmm, addmm, and mul followed by sum.

Inductor turns a bmm with one row into mul and sum before any backend sees it, so both forms must be read alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Node

from . import axes

aten = torch.ops.aten


@dataclass(frozen=True)
class Operand:
    """One factor. `dims` gives for each dimension of the result the factor's own (None: it does not vary along it);
    `inner` is its summed dimension. Both count the dimensions of `node`."""

    node: Node
    dims: tuple[int | None, ...]
    inner: int


@dataclass(frozen=True)
class Contraction:
    """node = scale · Σ_inner left · right (+ `added`, a tensor)."""

    node: Node
    left: Operand
    right: Operand
    scale: float = 1.0
    added: Node | None = None


def contraction(node: Node) -> Contraction | None:
    """The node as a contraction, or None."""
    target: Any = node.target
    if target in (aten.bmm.default, aten.mm.default):
        return _matmul(node, cast(Node, node.args[0]), cast(Node, node.args[1]))
    if target in (aten.baddbmm.default, aten.addmm.default):
        added, a, b = (cast(Node, x) for x in node.args[:3])
        alpha, beta = (node.kwargs.get(k, 1) for k in ("alpha", "beta"))
        if not isinstance(alpha, (int, float)) or beta not in (0, 1):
            return None
        return _matmul(node, a, b, float(alpha), added if beta == 1 else None)
    if target is aten.sum.dim_IntList:
        return _sum_of_product(node)
    return None


def _matmul(node: Node, a: Node, b: Node, scale: float = 1.0, added: Node | None = None) -> Contraction:
    if len(axes.shape_of(node)) == 3:
        return Contraction(node, Operand(a, (0, 1, None), 2), Operand(b, (0, None, 2), 1), scale, added)
    return Contraction(node, Operand(a, (0, None), 1), Operand(b, (None, 1), 0), scale, added)


def _sum_of_product(node: Node) -> Contraction | None:
    dims = cast("list[int]", node.args[1])
    keepdim = bool(node.args[2]) if len(node.args) > 2 else False
    mul = cast(Node, node.args[0])
    while mul.target in axes.CASTS or mul.target in axes.COPIES:
        mul = cast(Node, mul.args[0])
    if mul.target is not aten.mul.Tensor or len(dims) != 1 or not all(isinstance(a, Node) for a in mul.args):
        return None
    rank = len(axes.shape_of(mul))
    summed = dims[0] % rank
    operands = []
    for factor in cast("tuple[Node, ...]", mul.args):
        shape = axes.shape_of(factor)
        if len(shape) != rank or shape[summed] == 1:
            return None
        kept = [None if n == 1 else d for d, n in enumerate(shape)]
        operands.append(Operand(factor, tuple(k for d, k in enumerate(kept) if keepdim or d != summed), summed))
    if keepdim:
        operands = [Operand(o.node, (*o.dims[:summed], None, *o.dims[summed + 1 :]), summed) for o in operands]
    left, right = operands
    return Contraction(node, left, right)
