"""Softmax in every spelling: probabilities p = exp(x) / Σ exp(x) along one dimension.

`_softmax`, `_safe_softmax` and the exponentials written out: with the maximum subtracted or not, divided by their sum
or multiplied with its reciprocal, as exp(x − logsumexp(x)), as exp(log_softmax(x)). What is subtracted may be the
maximum of x, which changes nothing; whatever else is subtracted belongs to the scores.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.fx import Node

from . import axes

aten = torch.ops.aten

# What only puts a reduced dimension back, or repeats along it.
_REDUCED_VIEWS = axes.RESHAPES | axes.COPIES | {aten.expand.default}


@dataclass(frozen=True)
class Softmax:
    """`node` = softmax of factor · `scores` along `dim`, the exponentials of which are `exponentials`.

    `by` is a further factor, a tensor. `total`: rows with nothing to see give 0 and not NaN."""

    node: Node
    scores: Node
    dim: int
    factor: float = 1.0  # what the scores are multiplied with after their maximum was subtracted
    by: Scale | None = None
    total: bool = False


@dataclass(frozen=True)
class Scale:
    """A tensor that scores are multiplied with, or divided by."""

    node: Node
    divides: bool = False
    over: axes.View | None = None  # what the scores are of their product where it meets them


def uncast(node: Node) -> Node:
    """The node below casts and copies."""
    while node.target in axes.CASTS or node.target in axes.COPIES:
        node = cast(Node, node.args[0])
    return node


def softmax(node: Node) -> Softmax | None:
    """The node as a softmax, or None."""
    target: Any = node.target
    if target in (aten._softmax.default, aten.softmax.int, aten._safe_softmax.default):
        x, dim = cast(Node, node.args[0]), cast(int, node.args[1])
        return Softmax(node, x, dim, total=target is aten._safe_softmax.default)
    if target is aten.exp.default:
        return _less_its_logarithm(node)
    if target is aten.where.self:
        return _zero_where_all_is_hidden(node)
    parts = fraction(node)
    if parts is None:
        return None
    top, bottom = uncast(parts[0]), sum_of(parts[1])
    if bottom is None or uncast(cast(Node, bottom.args[0])) is not top:
        return None
    along = _along(bottom, parts[1], top)
    return None if along is None else of_exponentials(top, along, node)


def fraction(node: Node) -> tuple[Node, Node] | None:
    """(a, b) where the node is a / b, or a · 1/b."""
    if node.target not in (aten.div.Tensor, aten.mul.Tensor) or len(node.args) != 2:
        return None
    if not all(isinstance(a, Node) for a in node.args):
        return None
    a, b = cast("tuple[Node, Node]", node.args)
    if node.target is aten.div.Tensor:
        return a, b
    for top, inverse in ((a, b), (b, a)):
        below = _unexpanded(inverse)
        inverted = below.target is aten.pow.Tensor_Scalar and below.args[1] == -1
        if below.target is aten.reciprocal.default or inverted:
            return top, cast(Node, below.args[0])
    return None


def more_than_their_sum(node: Node) -> bool:
    """Whether the node divides exponentials by their sum plus something, such as 1."""
    parts = fraction(node)
    if parts is None or exponent_of(top := uncast(parts[0])) is None:
        return False
    bottom = _reduced(parts[1])
    if bottom.target not in (aten.add.Tensor, aten.add.Scalar):
        return False
    sums = [sum_of(a) for a in bottom.args if isinstance(a, Node)]
    return any(s is not None and uncast(cast(Node, s.args[0])) is top for s in sums)


def sum_of(node: Node) -> Node | None:
    """The sum over one dimension that the node is a view of."""
    below = _reduced(node)
    return below if below.target is aten.sum.dim_IntList and _dims(below) is not None else None


def _unexpanded(node: Node) -> Node:
    node = uncast(node)
    while node.target is aten.expand.default:
        node = uncast(cast(Node, node.args[0]))
    return node


def _reduced(node: Node) -> Node:
    """What is below views and casts of the result of a reduction."""
    while node.target in axes.CASTS or node.target in _REDUCED_VIEWS:
        node = cast(Node, node.args[0])
    return node


def _dims(reduction: Node) -> list[int] | None:
    """The single dimension that a reduction runs over, or None."""
    dims = reduction.args[1] if len(reduction.args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims
    return cast("list[int]", dims) if dims and len(cast("list[int]", dims)) == 1 else None


def _along(reduction: Node, shown: Node, x: Node) -> int | None:
    """The dimension of x that `reduction` runs over where `shown`, a view of it, meets x there with one element."""
    dims, shape = _dims(reduction), axes.shape_of(x)
    if dims is None:
        return None
    dim = dims[0] % len(shape)
    kept = (*shape[:dim], axes.ONE, *shape[dim + 1 :])
    return dim if axes.same_shape(axes.shape_of(_unexpanded(shown)), kept) else None


def exponent_of(node: Node) -> tuple[Node, float] | None:
    """(x, c) where the node is exp(c · x), as exp, exp2 or a power of a number greater than 1."""
    if node.target in (aten.exp.default, aten.exp2.default):
        return cast(Node, node.args[0]), 1.0 if node.target is aten.exp.default else math.log(2)
    if node.target is aten.pow.Scalar and isinstance(base := node.args[0], (int, float)) and 1 < base < math.inf:
        return cast(Node, node.args[1]), math.log(base)
    return None


def of_exponentials(exponentials: Node, dim: int, node: Node) -> Softmax | None:
    """`node` as the softmax along `dim` whose numerators are `exponentials`; None where these are none."""
    parts = exponent_of(exponentials)
    return None if parts is None else _of_exponent(uncast(parts[0]), dim, node, parts[1])


def _of_exponent(exponent: Node, dim: int, node: Node, factor: float = 1.0) -> Softmax:
    """The softmax whose exponentials are exp(factor · exponent)."""
    found = _stable(exponent, dim, node) or Softmax(node, exponent, dim)
    return replace(found, factor=found.factor * factor)


def _stable(exponent: Node, dim: int, node: Node) -> Softmax | None:
    """The softmax of c · x where the exponent is c · (x − max(x)), as Inductor rewrites it; c is a number or a tensor.

    From torch 2.13 on it keeps both forms and selects by whether all of c · x is finite, the same number either way.
    """
    if exponent.target is aten.where.self:
        stable, plain = (uncast(cast(Node, a)) for a in exponent.args[1:])
        found, original = _stable(stable, dim, node), _stable(plain, dim, node)
        if found is None or original is None:
            return None
        return original if same_scores(found, original) else None
    x = less_maximum(exponent, dim)
    if x is not None:
        return Softmax(node, x, dim)
    scaled = axes.scaling(exponent)
    if scaled is not None:
        x = less_maximum(uncast(scaled[0]), dim)
        return Softmax(node, x, dim, scaled[1]) if x is not None and scaled[1] > 0 else None
    return _signed(exponent, dim, node)


def same_scores(a: Softmax, b: Softmax) -> bool:
    """Whether two softmaxes are those of the same numbers."""
    (x, c, s), (y, d, t) = (unscaled(f) for f in (a, b))
    return x is y and s == t and math.isclose(c, d, rel_tol=1e-6)


def unscaled(found: Softmax) -> tuple[Node, float, Scale | None]:
    """The tensor below all products, the product of the numbers among its factors, and the tensor among them."""
    x, factor, by = uncast(found.scores), found.factor, found.by
    while True:
        scaled = axes.scaling(x)
        by_tensor = scale_tensor(x) if scaled is None and by is None else None
        if scaled is not None:
            x, factor = uncast(scaled[0]), factor * scaled[1]
        elif by_tensor is not None:
            x, by = uncast(by_tensor[0]), by_tensor[1]
        else:
            return x, factor, by


def _signed(exponent: Node, dim: int, node: Node) -> Softmax | None:
    """The softmax of x · t where the exponent is (x·s − max(x·s)) · (s·t), s the sign of the tensor t; or x / t."""
    if exponent.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    shifted, magnitude = (cast(Node, a) for a in exponent.args[:2])
    if not all(isinstance(a, Node) for a in (shifted, magnitude)):
        return None
    signed = less_maximum(uncast(shifted), dim)
    if signed is None or signed.target is not aten.mul.Tensor or magnitude.target is not aten.mul.Tensor:
        return None
    x, sign = signed.args
    if not isinstance(x, Node) or not isinstance(sign, Node) or magnitude.args[0] is not sign:
        return None
    tensor = magnitude.args[1]
    if not isinstance(tensor, Node) or not _is_sign(sign, tensor):
        return None
    return Softmax(node, x, dim, by=Scale(tensor, exponent.target is aten.div.Tensor))


def _is_sign(sign: Node, tensor: Node) -> bool:
    if sign.target is not aten.where.self:
        return False
    condition, yes, no = sign.args
    asked = isinstance(condition, Node) and condition.target is aten.ge.Scalar and condition.args == (tensor, 0)
    return asked and axes.scalar_of(yes) == 1.0 and axes.scalar_of(no) == -1.0


def scale_tensor(node: Node) -> tuple[Node, Scale] | None:
    """(x, t) where the node is x · t or x / t for a tensor t that broadcasts to x."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or len(node.args) != 2:
        return None
    if not all(isinstance(a, Node) for a in node.args):
        return None
    a, b = cast("tuple[Node, Node]", node.args)
    divides, shape = node.target is aten.div.Tensor, axes.shape_of(node)
    for x, t in ((a, b),) if divides else ((a, b), (b, a)):
        if axes.same_shape(axes.shape_of(x), shape):
            return x, Scale(t, divides)
    return None


def less_maximum(exponent: Node, dim: int) -> Node | None:
    """x where the exponent is x − max(x) along `dim`."""
    if exponent.target is not aten.sub.Tensor or not all(isinstance(a, Node) for a in exponent.args):
        return None
    x, shift = (cast(Node, a) for a in exponent.args)
    return x if _is_maximum(shift, x, dim) else None


def _is_maximum(shift: Node, x: Node, dim: int) -> bool:
    """Whether `shift` is the maximum of x along `dim`, or that with 0 for infinite ones, as logsumexp has it."""
    below = _reduced(shift)
    if below.target is aten.where.self:
        condition, zero, maximum = below.args
        asked = isinstance(condition, Node) and condition.target is aten.eq.Scalar
        infinite = asked and axes.scalar_of(cast(Node, condition).args[1]) == math.inf
        return infinite and axes.scalar_of(zero) == 0.0 and _is_maximum(cast(Node, maximum), x, dim)
    if below.target is operator.getitem and below.args[1] == 0:
        below = cast(Node, below.args[0])
        if below.target is not aten.max.dim:
            return False
    elif below.target is not aten.amax.default:
        return False
    if uncast(cast(Node, below.args[0])) is not uncast(x):
        return False
    return _along(below, shift, x) == dim % len(axes.shape_of(x))


def _less_its_logarithm(node: Node) -> Softmax | None:
    """softmax(x) where the node is exp(x − log Σ exp(x))."""
    exponent = uncast(cast(Node, node.args[0]))
    if exponent.target is not aten.sub.Tensor or not all(isinstance(a, Node) for a in exponent.args):
        return None
    x, subtracted = (cast(Node, a) for a in exponent.args)
    logarithm = _reduced(subtracted)
    found = logarithm_of_sum(logarithm)
    dim = _along(found[1], subtracted, x) if found is not None else None
    if found is None or dim is None or uncast(found[0]) is not uncast(x):
        return None
    # log_softmax: x is shifted already
    return _of_exponent(uncast(x), dim, node) if logarithm.target is aten.log.default else Softmax(node, x, dim)


def logarithm_of_sum(node: Node) -> tuple[Node, Node] | None:
    """x and the sum where the node is log Σ exp(x) along one dimension, in one of the ways it is stabilised."""
    logarithm, shift = node, None
    if node.target is aten.add.Tensor and all(isinstance(a, Node) for a in node.args):
        a, b = (_reduced(cast(Node, a)) for a in node.args)
        logarithm, shift = (a, b) if a.target is aten.log.default else (b, a)
    if logarithm.target is not aten.log.default:
        return None
    total = sum_of(cast(Node, logarithm.args[0]))
    if total is None:
        return None
    exponential = uncast(cast(Node, total.args[0]))
    if exponential.target is not aten.exp.default:
        return None
    summed = uncast(cast(Node, exponential.args[0]))
    if shift is None:
        return summed, total
    unshifted = less_maximum(summed, cast("list[int]", _dims(total))[0])
    same = unshifted is not None and _reduced(cast(Node, summed.args[1])) is shift
    return (cast(Node, unshifted), total) if same else None


def _zero_where_all_is_hidden(node: Node) -> Softmax | None:
    """`_safe_softmax` taken apart: where(not any(x ≠ −∞), 0, softmax(x))."""
    condition, zero, probabilities = node.args
    found = softmax(uncast(probabilities)) if isinstance(probabilities, Node) else None
    if found is None or found.total or axes.scalar_of(zero) != 0.0:
        return None
    chain = [aten.logical_not.default, aten.any.dim, aten.logical_not.default, aten.eq.Scalar]
    below: Any = condition
    for target in chain:
        if not isinstance(below, Node) or below.target is not target:
            return None
        last, below = below, below.args[0]
    hidden = last.args[1] == -math.inf and uncast(cast(Node, below)) is uncast(found.scores)
    return replace(found, node=node, total=True) if hidden else None
