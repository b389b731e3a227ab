"""What a softmax is taken of: the spellings between q·kᵀ and the probabilities.

scores = softcap( scale · (contraction) ) with masks added to it or filled in, in any order that means the same.
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
from .softmax import Scale, scale_tensor

aten = torch.ops.aten
prims = torch.ops.prims


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
    factors: tuple[Scale, ...] = ()  # further scales, as tensors


@dataclass(frozen=True)
class Obstacle:
    """The node that stands between the softmax and a contraction."""

    node: Node
    reason: str


def scores(node: Node) -> Scores | Obstacle:
    """The node as scores of a contraction, or what it is that cannot be seen through."""
    product = contraction(node)
    if product is not None:
        found = Scores(product, View.of(node), product.scale)
        if product.added is None:
            return found
        return _masked(found, MaskSite(product.added, found.view, factor=product.beta), node)
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
    if (by_tensor := scale_tensor(node)) is not None:
        inner = scores(by_tensor[0])
        return inner if isinstance(inner, Obstacle) else scaled_by(inner, by_tensor[1], node)
    if target is aten.tanh.default:
        inner = scores(cast(Node, node.args[0]))
        if isinstance(inner, Obstacle) or (inner.softcap is None and not inner.masks):
            return inner if isinstance(inner, Obstacle) else replace(inner, softcap=1.0)
        return Obstacle(
            node, "tanh is taken of scores that are already masked or capped; a cap belongs before the mask"
        )
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
    if target is aten.cat.default:
        return Obstacle(
            node,
            "it puts further columns beside the scores; kernels take one (an attention sink) whose probability nobody "
            "reads, softmax(cat([scores, sink], -1))[..., :-1], and none that is a key: keys belong together before "
            "the product",
        )
    cure = "; flex_attention's score_mod takes any function of a score" if _is_pointwise(node) else ""
    return Obstacle(node, f"it is neither a scale, a mask, a view nor a product of queries and keys ({target}){cure}")


def _is_pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def scaled_by(inner: Scores, factor: Scale, node: Node) -> Scores | Obstacle:
    """The scores times a tensor, at `node`."""
    if inner.masks or inner.softcap is not None:
        return Obstacle(
            node,
            f"masked or capped scores are scaled by {factor.node.name}, whose sign is unknown; a scale belongs before "
            "the mask and the cap",
        )
    return replace(inner, factors=(*inner.factors, replace(factor, over=inner.view)))


def _scaled(node: Node, x: Node, factor: float) -> Scores | Obstacle:
    inner = scores(x)
    return inner if isinstance(inner, Obstacle) else scaled(inner, factor, node)


def scaled(inner: Scores, factor: float, node: Node) -> Scores | Obstacle:
    """The scores times a number, at `node`."""
    if inner.softcap is not None and inner.masks:
        return Obstacle(node, "capped and masked scores are scaled again; a scale belongs before the cap")
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
        elif isinstance(other, (int, float)) and math.isfinite(other):
            return inner  # the same number added to every score changes no softmax
        else:
            first = Obstacle(node, f"{other} is added to every score")
    return first or Obstacle(
        node, "the mask has more elements than the scores, which it repeats; so must the queries be"
    )


def _filled(node: Node, x: Node, condition: Node, keeps: bool, fill: float) -> Scores | Obstacle:
    if not axes.same_shape(axes.shape_of(x), axes.shape_of(node)):
        return Obstacle(node, "the mask has more elements than the scores, which it repeats; so must the queries be")
    inner = scores(x)
    if isinstance(inner, Obstacle):
        return inner
    return _masked(inner, MaskSite(condition, inner.view, additive=False, keeps=keeps, fill=fill), node)


def _masked(inner: Scores, mask: MaskSite, node: Node) -> Scores | Obstacle:
    if len(axes.shape_of(mask.node)) > len(axes.shape_of(node)):
        return Obstacle(node, "the mask has more dimensions than the scores; squeeze those of size 1")
    return replace(inner, masks=(*inner.masks, mask))
