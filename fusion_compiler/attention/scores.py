"""Softmax and what it is taken of: the spellings between q·kᵀ and the probabilities.

scores = softcap( scale · (contraction) ) with masks added to it or filled in, in any order that means the same,
probabilities = softmax(scores) as `_softmax`, `_safe_softmax`, or exp(x − max)/sum written out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.fx import Node

from . import axes
from .axes import View
from .contraction import Contraction, contraction
from .masks import HIDDEN

aten = torch.ops.aten
prims = torch.ops.prims


@dataclass(frozen=True)
class Softmax:
    """`node` = softmax of factor · `scores` along `dim`. `total`: rows with nothing to see give 0 and not NaN."""

    node: Node
    scores: Node
    dim: int
    factor: float = 1.0  # what the scores are multiplied with after their maximum was subtracted
    total: bool = False


@dataclass(frozen=True)
class MaskSite:
    """A mask where it meets the scores, which there are the view `scores` of the contraction."""

    node: Node
    scores: View
    additive: bool = True
    keeps: bool = True
    fill: float = 0.0
    factor: float = 1.0  # of what is added


@dataclass(frozen=True)
class Scores:
    """A tensor computed from a contraction: the view that it is of the result, and what happened on the way."""

    contraction: Contraction
    view: View
    scale: float = 1.0
    softcap: float | None = None
    masks: tuple[MaskSite, ...] = ()
    factors: tuple[Node, ...] = ()  # further scales, as tensors of one element


@dataclass(frozen=True)
class Obstacle:
    """The node that stands between the softmax and a contraction."""

    node: Node
    reason: str


def uncast(node: Node) -> Node:
    """The node below casts and copies."""
    while node.target in axes.CASTS or node.target in axes.COPIES:
        node = cast(Node, node.args[0])
    return node


def softmax(node: Node) -> Softmax | None:
    """The node as a softmax, or None."""
    target: Any = node.target
    if target in (aten._softmax.default, aten.softmax.int, aten._safe_softmax.default):
        return Softmax(
            node, cast(Node, node.args[0]), cast(int, node.args[1]), total=target is aten._safe_softmax.default
        )
    if target is not aten.div.Tensor or not all(isinstance(a, Node) for a in node.args):
        return None
    top, bottom = (uncast(cast(Node, a)) for a in node.args)
    while bottom.target is aten.expand.default:
        bottom = cast(Node, bottom.args[0])
    if top.target is not aten.exp.default or bottom.target is not aten.sum.dim_IntList or not _keeps_dim(bottom):
        return None
    dims = cast("list[int]", bottom.args[1])
    if len(dims) != 1 or uncast(cast(Node, bottom.args[0])) is not top:
        return None
    exponent = uncast(cast(Node, top.args[0]))
    shifted = _exponent(exponent, dims[0])
    return Softmax(node, exponent, dims[0]) if shifted is None else Softmax(node, shifted[0], dims[0], shifted[1])


def _keeps_dim(reduction: Node) -> bool:
    return len(reduction.args) > 2 and reduction.args[2] is True


def _exponent(exponent: Node, dim: int) -> tuple[Node, float] | None:
    """(x, c) where the exponent is c · (x − max(x)) along `dim`, as Inductor rewrites softmax(c · x).

    From torch 2.13 on it keeps both forms and selects by whether all of c · x is finite, the same number either way.
    """
    if exponent.target is aten.where.self:
        stable, plain = (uncast(cast(Node, a)) for a in exponent.args[1:])
        found, original = _exponent(stable, dim), _exponent(plain, dim)
        if found is None or original is None:
            return None
        (a, c), (b, d) = (_unscaled(*f) for f in (found, original))
        return original if a is b and math.isclose(c, d, rel_tol=1e-6) else None
    factor, scaled = 1.0, axes.scaling(exponent)
    if scaled is not None:
        exponent, factor = uncast(scaled[0]), scaled[1]
    x = _shifted(exponent, dim)
    return (x, factor) if x is not None and factor > 0 else None


def _unscaled(x: Node, factor: float) -> tuple[Node, float]:
    """The tensor below all products with numbers, and their product."""
    x = uncast(x)
    while (scaled := axes.scaling(x)) is not None:
        x, factor = uncast(scaled[0]), factor * scaled[1]
    return x, factor


def _shifted(exponent: Node, dim: int) -> Node | None:
    """x where the exponent is x − max(x) along `dim`."""
    if exponent.target is not aten.sub.Tensor or not all(isinstance(a, Node) for a in exponent.args):
        return None
    x, shift = cast(Node, exponent.args[0]), uncast(cast(Node, exponent.args[1]))
    while shift.target is aten.expand.default:
        shift = cast(Node, shift.args[0])
    if shift.target is not aten.amax.default or not _keeps_dim(shift):
        return None
    rank = len(axes.shape_of(x))
    if [d % rank for d in cast("list[int]", shift.args[1])] != [dim % rank]:
        return None
    return x if uncast(cast(Node, shift.args[0])) is uncast(x) else None


def scores(node: Node) -> Scores | Obstacle:
    """The node as scores of a contraction, or what it is that cannot be seen through."""
    product = contraction(node)
    if product is not None:
        found = Scores(product, View.of(node), product.scale)
        return found if product.added is None else _masked(found, MaskSite(product.added, found.view), node)
    target: Any = node.target
    below = axes.step(node)
    if below is None and target in axes.CASTS:
        below = View.of(cast(Node, node.args[0]))
    if below is not None:
        inner = scores(below.source)
        if isinstance(inner, Obstacle):
            return inner
        view = below.through(inner.view)
        return replace(inner, view=view) if view is not None else Obstacle(node, "it cuts across their axes")
    product_with_number = axes.scaling(node)
    if product_with_number is not None:
        return _scaled(node, *product_with_number)
    if target is aten.mul.Tensor and (one := _scalar_tensor(node)) is not None:
        x, factor = one
        inner = scores(x)
        if isinstance(inner, Obstacle):
            return inner
        if inner.masks or inner.softcap is not None:
            return Obstacle(node, f"masked or capped scores are multiplied with {factor.name}, whose sign is unknown")
        return replace(inner, factors=(*inner.factors, factor))
    if target is aten.tanh.default:
        inner = scores(cast(Node, node.args[0]))
        if isinstance(inner, Obstacle) or (inner.softcap is None and not inner.masks):
            return inner if isinstance(inner, Obstacle) else replace(inner, softcap=1.0)
        return Obstacle(node, "tanh is taken of scores that are already masked or capped")
    if target in (aten.add.Tensor, aten.sub.Tensor) and len(node.args) == 2 and not node.kwargs:
        return _sum(node)
    if target is aten.where.self:
        condition, yes, no = node.args
        for keeps, kept, filled in ((True, yes, no), (False, no, yes)):
            fill = axes.scalar_of(filled)
            if isinstance(kept, Node) and fill is not None:
                return _filled(node, kept, cast(Node, condition), keeps, fill)
    if target is aten.masked_fill.Scalar:
        x, condition = (cast(Node, a) for a in node.args[:2])
        return _filled(node, x, condition, False, float(cast(float, node.args[2])))
    if target in (aten.maximum.default, aten.clamp_min.default, aten.clamp.default):
        floor = axes.scalar_of(node.args[1])
        if floor is not None and floor <= HIDDEN and len(node.args) == 2:
            return scores(cast(Node, node.args[0]))
    return Obstacle(node, f"it is neither a scale, a mask, a view nor a product of queries and keys ({target})")


def _scalar_tensor(node: Node) -> tuple[Node, Node] | None:
    """(x, t) where the node is x · t for a tensor t without dimensions."""
    for x, factor in (node.args, node.args[::-1]):
        if isinstance(x, Node) and isinstance(factor, Node) and axes.shape_of(factor) == ():
            return x, factor
    return None


def _scaled(node: Node, x: Node, factor: float) -> Scores | Obstacle:
    inner = scores(x)
    return inner if isinstance(inner, Obstacle) else scaled(inner, factor, node)


def scaled(inner: Scores, factor: float, node: Node) -> Scores | Obstacle:
    """The scores times a number, at `node`."""
    if inner.softcap is not None and inner.masks:
        return Obstacle(node, "capped and masked scores are scaled again")
    if inner.masks and factor < 0:
        return Obstacle(node, "masked scores are negated")
    masks = tuple(replace(m, factor=m.factor * factor, fill=m.fill * factor) for m in inner.masks)
    if inner.softcap is None:
        return replace(inner, scale=inner.scale * factor, masks=masks)
    if factor <= 0:
        return Obstacle(node, "the cap of the scores is not positive")
    # scale · x / cap inside, cap outside: the scale itself is their product
    return replace(inner, scale=inner.scale * factor, softcap=inner.softcap * factor)


def _sum(node: Node) -> Scores | Obstacle:
    a, b = node.args
    subtracts = node.target is aten.sub.Tensor
    first: Obstacle | None = None
    for x, other in ((a, b),) if subtracts else ((a, b), (b, a)):
        if not isinstance(x, Node) or not axes.same_shape(axes.shape_of(x), axes.shape_of(node)):
            continue
        inner = scores(x)
        if isinstance(inner, Obstacle):
            first = first or inner
        elif isinstance(other, Node):
            return _masked(inner, MaskSite(other, inner.view, factor=-1.0 if subtracts else 1.0), node)
        else:
            return inner  # the same number added to every score changes no softmax
    return first or Obstacle(node, "the mask has more elements than the scores")


def _filled(node: Node, x: Node, condition: Node, keeps: bool, fill: float) -> Scores | Obstacle:
    if not axes.same_shape(axes.shape_of(x), axes.shape_of(node)):
        return Obstacle(node, "the mask has more elements than the scores")
    inner = scores(x)
    if isinstance(inner, Obstacle):
        return inner
    return _masked(inner, MaskSite(condition, inner.view, additive=False, keeps=keeps, fill=fill), node)


def _masked(inner: Scores, mask: MaskSite, node: Node) -> Scores | Obstacle:
    if len(axes.shape_of(mask.node)) > len(axes.shape_of(node)):
        return Obstacle(node, "the mask has more dimensions than the scores")
    return replace(inner, masks=(*inner.masks, mask))
