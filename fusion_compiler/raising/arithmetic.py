"""Pointwise arithmetic, and reductions of the innermost axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..algebra import Value
from ..norms import normalise_product, normalise_sum, shift_of
from ..shapes import TRANSPARENT_DTYPES, count, shape_of
from .registry import Rule, rule

if TYPE_CHECKING:
    from ..semantics import SemanticView

aten = torch.ops.aten


def _is_float(node: Node) -> bool:
    return node.meta["val"].dtype in TRANSPARENT_DTYPES


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor)
def _add(view: SemanticView, node: Node) -> Value | None:
    if not _is_float(node):
        return None
    algebra = view.algebra
    a, b = node.args[0], node.args[1]
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    if not isinstance(alpha, (int, float)):
        return None
    if node.target in (aten.rsub.Scalar, aten.rsub.Tensor):
        a, b = b, a
    sign = 1.0 if node.target in (aten.add.Tensor, aten.add.Scalar) else -1.0
    left, right = view.operand(a, node), view.operand(b, node)
    if left is None or right is None:
        return None
    scaled = algebra.mul(algebra.const(sign * alpha), *view.flat("mul", right, b)) if sign * alpha != 1 else right
    terms = view.flat("add", left, a) + (view.flat("add", right, b) if scaled is right else [scaled])
    return None if _cancel(terms) else normalise_sum(algebra, terms)


def _cancel(terms: Sequence[Value]) -> bool:
    """Whether two of the terms are opposites: what is left of them, as of x and x rounded, lies in the casts alone."""
    factors: dict[tuple[Value, ...], float] = {}
    for term in terms:
        held = term.args if term.op == "mul" else (term,)
        rest = tuple(sorted((v for v in held if v.op != "const"), key=lambda v: v.serial))
        scale = math.prod(v.attr("value") for v in held if v.op == "const")
        if rest and math.isclose(factors.get(rest, math.nan), -scale, rel_tol=1e-6):
            return True
        factors[rest] = scale
    return False


@rule(aten.mul.Tensor, aten.mul.Scalar)
def _mul(view: SemanticView, node: Node) -> Value | None:
    if not _is_float(node):
        return None
    a, b = node.args[0], node.args[1]
    left, right = view.operand(a, node), view.operand(b, node)
    if left is None or right is None:
        return None
    return normalise_product(view.algebra, view.flat("mul", left, a) + view.flat("mul", right, b))


@rule(aten.div.Tensor, aten.div.Scalar)
def _div(view: SemanticView, node: Node) -> Value | None:
    if not _is_float(node):
        return None
    left, right = view.operand(node.args[0], node), view.operand(node.args[1], node)
    if left is None or right is None:
        return None
    inverse = view.algebra.pow(right, -1.0)
    return normalise_product(view.algebra, [*view.flat("mul", left, node.args[0]), inverse])


@rule(aten.addcmul.default, aten.addcdiv.default)
def _addc(view: SemanticView, node: Node) -> Value | None:
    a, b, c = (view.operand(argument, node) for argument in node.args[:3])
    factor = node.kwargs.get("value", 1)
    if not _is_float(node) or a is None or b is None or c is None or not isinstance(factor, (int, float)):
        return None
    c = view.algebra.pow(c, -1.0) if node.target is aten.addcdiv.default else c
    return normalise_sum(view.algebra, [a, normalise_product(view.algebra, [view.algebra.const(factor), b, c])])


@rule(aten.neg.default)
def _neg(view: SemanticView, node: Node) -> Value | None:
    value = view.value(node.all_input_nodes[0])
    factors = view.flat("mul", value, node.args[0])
    return normalise_product(view.algebra, [view.algebra.const(-1.0), *factors]) if _is_float(node) else None


@rule(aten.pow.Tensor_Scalar)
def _pow(view: SemanticView, node: Node) -> Value | None:
    exponent = node.args[1]
    if not _is_float(node) or not isinstance(exponent, (int, float)):
        return None
    return view.algebra.pow(view.value(node.all_input_nodes[0]), float(exponent))


def _fixed_power(exponent: float) -> Rule:
    def rule(view: SemanticView, node: Node) -> Value | None:
        if not _is_float(node):
            return None
        return view.algebra.pow(view.value(node.all_input_nodes[0]), exponent)

    return rule


rule(aten.rsqrt.default)(_fixed_power(-0.5))
rule(aten.sqrt.default)(_fixed_power(0.5))
rule(aten.reciprocal.default)(_fixed_power(-1.0))
if hasattr(aten, "square"):
    rule(aten.square.default)(_fixed_power(2.0))


def _unary(name: str) -> Rule:
    def rule(view: SemanticView, node: Node) -> Value | None:
        if not _is_float(node):
            return None
        return view.algebra.unary(name, view.value(node.all_input_nodes[0]))

    return rule


for _name in (
    "exp", "expm1", "log", "log1p", "log2", "sin", "cos", "tanh", "erf", "abs", "sigmoid", "silu", "relu",
):  # fmt: skip
    rule(getattr(aten, _name).default)(_unary(_name))


@rule(aten.exp2.default)
def _exp2(view: SemanticView, node: Node) -> Value | None:
    value = view.value(node.all_input_nodes[0])
    if _is_float(node) and shift_of(view.algebra, value) is not None:  # a softmax in base two is one of x·ln 2
        scaled = normalise_product(view.algebra, [view.algebra.const(math.log(2.0)), value])
        return view.algebra.unary("exp", scaled)
    return _unary("exp2")(view, node)


@rule(aten.gelu.default)
def _gelu(view: SemanticView, node: Node) -> Value | None:
    name = "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu_erf"
    return _unary(name)(view, node)


@rule(aten.maximum.default, aten.minimum.default)
def _extremum(view: SemanticView, node: Node) -> Value | None:
    left, right = view.operand(node.args[0], node), view.operand(node.args[1], node)
    if not _is_float(node) or left is None or right is None:
        return None
    return view.algebra.binary("maximum" if node.target is aten.maximum.default else "minimum", left, right)


@rule(aten.clamp_min.default, aten.clamp_max.default, aten.clamp.default)
def _clamp(view: SemanticView, node: Node) -> Value | None:
    low: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    high: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    if node.target is aten.clamp_max.default:
        low, high = None, low
    value = view.value(node.all_input_nodes[0])
    if not _is_float(node) or not all(b is None or isinstance(b, (int, float)) for b in (low, high)):
        return None
    if low is not None:
        value = view.algebra.binary("maximum", view.algebra.const(low), value)
    if high is not None:
        value = view.algebra.binary("minimum", view.algebra.const(high), value)
    return value


# ---- reductions of the innermost axis ---------------------------------------------------------
def innermost(node: Node) -> Any | None:
    """How many elements a reduction node folds into one, if these are the innermost axes."""
    source: Any = node.args[0]
    shape = shape_of(source)
    dims: Any = node.args[1] if len(node.args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims
    if not shape or not dims:
        return None
    first = len(shape) - len(dims)
    return count(shape[first:]) if sorted(d % len(shape) for d in dims) == [*range(first, len(shape))] else None


def _reduction(name: str) -> Rule:
    def rule(view: SemanticView, node: Node) -> Value | None:
        size = innermost(node)
        if size is None or not _is_float(node):
            return None
        return view.algebra.make(name, view.value(node.all_input_nodes[0]), size=size)

    return rule


rule(aten.mean.dim)(_reduction("mean"))
rule(aten.sum.dim_IntList)(_reduction("sum"))
rule(aten.amax.default)(_reduction("amax"))


@rule(aten.var.correction)
def _var(view: SemanticView, node: Node) -> Value | None:
    return _reduction("var")(view, node) if node.kwargs.get("correction", 1) == 0 else None
