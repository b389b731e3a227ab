"""Sums of products over one axis, however spelled: bmm, mm, baddbmm, addmm, and mul followed by sum.

Inductor turns a bmm with one row into mul and sum before any backend sees it, and pads others with zeros to aligned
sizes, slicing the result back; all these forms must be read alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.fx import Node

from . import axes

aten = torch.ops.aten

MATMULS = (aten.bmm.default, aten.mm.default)
# What Inductor puts around a matmul that it pads.
PADDING = (aten.constant_pad_nd.default, aten.slice.Tensor, *MATMULS)


@dataclass(frozen=True)
class Operand:
    """One factor. `dims` gives for each dimension of the result the factor's own (None: it does not vary along it);
    `inner` is its summed dimension. Both count the dimensions of `node`."""

    node: Node
    dims: tuple[int | None, ...]
    inner: int


@dataclass(frozen=True)
class Contraction:
    """node = scale · Σ_inner left · right (+ beta · `added`, a tensor)."""

    node: Node
    left: Operand
    right: Operand
    scale: float = 1.0
    added: Node | None = None
    beta: float = 1.0


def contraction(node: Node) -> Contraction | None:
    """The node as a contraction, or None."""
    target: Any = node.target
    if target in (*MATMULS, aten.slice.Tensor):
        return _perhaps_padded(node)
    if target in (aten.baddbmm.default, aten.addmm.default):
        added, a, b = (cast(Node, x) for x in node.args[:3])
        alpha, beta = (axes.scalar_of(node.kwargs.get(k, 1)) for k in ("alpha", "beta"))
        if alpha is None or beta is None:
            return None
        product = _matmul(node, a, b, alpha)
        return replace(product, added=added, beta=beta) if beta != 0 else product
    if target is aten.sum.dim_IntList:
        return _sum_of_product(node)
    return None


def _perhaps_padded(node: Node) -> Contraction | None:
    product = node
    while product.target is aten.slice.Tensor and _starts_at_zero(product):
        product = cast(Node, product.args[0])
    if product.target not in MATMULS:
        return None
    a, b = cast("tuple[Node, Node]", product.args[:2])
    bare = _matmul(node, _unpadded(a), _unpadded(b))
    if _has_its_shape(bare):
        return bare
    # the padded product itself is one too, unless it is only there to be sliced
    sliced = any(u.target is aten.slice.Tensor for u in node.users)
    return _matmul(node, a, b) if product is node and not sliced else None


def _starts_at_zero(node: Node) -> bool:
    start, stride = (node.args[i] if len(node.args) > i else default for i, default in ((2, 0), (4, 1)))
    return bool(start in (0, None) and stride == 1)


def _unpadded(node: Node) -> Node:
    """What is below zeros appended at the ends of dimensions."""
    if node.target is not aten.constant_pad_nd.default or (len(node.args) > 2 and node.args[2] != 0):
        return node
    widths = cast("list[int]", node.args[1])
    appended = all(isinstance(n, int) and (n == 0 if i % 2 == 0 else n >= 0) for i, n in enumerate(widths))
    return cast(Node, node.args[0]) if appended else node


def _has_its_shape(found: Contraction) -> bool:
    """Whether the result is as large as its factors make it: padding, where there was some, is sliced off again."""
    left, right = (axes.shape_of(o.node) for o in (found.left, found.right))
    fits: bool = axes.same(left[found.left.inner], right[found.right.inner])
    for dims, shape in ((found.left.dims, left), (found.right.dims, right)):
        pairs = zip(dims, axes.shape_of(found.node), strict=True)
        fits = fits and all(d is None or axes.same(shape[d], n) for d, n in pairs)
    return fits


def _matmul(node: Node, a: Node, b: Node, scale: float = 1.0) -> Contraction:
    if len(axes.shape_of(node)) == 3:
        return Contraction(node, Operand(a, (0, 1, None), 2), Operand(b, (0, None, 2), 1), scale)
    return Contraction(node, Operand(a, (0, None), 1), Operand(b, (None, 1), 0), scale)


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
