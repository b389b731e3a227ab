"""Recognising RMSNorm and LayerNorm in sums and products, however they were spelled.

    rms_norm(x):   x · (mean(x²) + eps)^−½
    layer_norm(x): (x − mean(x)) · (var(x) + eps)^−½
then a factor that repeats along the rows is the weight (1 + w is a weight w with offset 1), and for layer_norm a
term that does so is the bias. In the normal form of `algebra` every spelling of these arrives as one product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .algebra import Algebra, Value

NORMS = ("rms_norm", "layer_norm")


def normalise_product(algebra: Algebra, factors: Sequence[Value]) -> Value:
    """The product of `factors`, with means and norms recognised in it."""
    factors = _mean_of_sum(algebra, list(factors))
    for recognise in (_norm, _weight):
        found = recognise(algebra, factors)
        if found is not None:
            factors = found
    return algebra.mul(*factors)


def normalise_sum(algebra: Algebra, terms: Sequence[Value]) -> Value:
    """The sum of `terms`, with a layer norm's bias taken into it."""
    if len(terms) == 2:
        for norm, other in (terms, terms[::-1]):
            if norm.op != "layer_norm" or len(norm.args) != 2:
                continue
            bias = _per_column(other, norm)
            if bias is not None:
                return algebra.make("layer_norm", *norm.args, bias, **dict(norm.attrs))
    return algebra.add(*terms)


def _constant(factors: Sequence[Value]) -> float:
    return float(math.prod(f.attr("value") for f in factors if f.op == "const"))


def _mean_of_sum(algebra: Algebra, factors: list[Value]) -> list[Value]:
    """sum(x)/n with the axis' own n is mean(x)."""
    for f in factors:
        total = f.args[0] if f.op == "bcast" else f
        size = total.attr("size")
        if (
            total.op != "sum"
            or not isinstance(size, int)
            or not math.isclose(_constant(factors) * size, 1.0, rel_tol=1e-6)
        ):
            continue
        mean = algebra.make("mean", total.args[0], size=size)
        mean = algebra.bcast(mean, f.attr("groups")) if f.op == "bcast" else mean
        return [mean if g is f else g for g in factors if g.op != "const"]
    return factors


def _norm(algebra: Algebra, factors: list[Value]) -> list[Value] | None:
    for scale in factors:
        inverse = scale.args[0] if scale.op == "bcast" else scale
        if inverse.op != "pow" or inverse.attr("exponent") != -0.5:
            continue
        eps, statistic = _shifted(inverse.args[0])
        rest = [f for f in factors if f is not scale]
        if statistic.op == "mean" and statistic.args[0].op == "pow" and statistic.args[0].attr("exponent") == 2.0:
            inner = statistic.args[0].args[0]
            mean, x = _centred(inner)
            if mean is not None and mean.attr("size") == statistic.attr("size"):
                statistic = algebra.make("var", x, size=statistic.attr("size"))  # mean((x − mean x)²)
            else:
                left = _divide(rest, inner)
                if left is not None:
                    return [*left, _unweighted(algebra, "rms_norm", inner, eps, statistic, scale)]
        if statistic.op == "var":
            for f in rest:
                mean, x = _centred(f)
                if mean is not None and x is statistic.args[0] and mean.attr("size") == statistic.attr("size"):
                    return [
                        *(g for g in rest if g is not f),
                        _unweighted(algebra, "layer_norm", x, eps, statistic, scale),
                    ]
    return None


def _unweighted(algebra: Algebra, op: str, x: Value, eps: float, statistic: Value, scale: Value) -> Value:
    """The norm without weight. `single` says that x is one row: then a weight fills x without being repeated."""
    size = statistic.attr("size")
    single = scale.op == "bcast" and scale.attr("groups") == ((size, False),)
    return algebra.make(op, x, eps=eps, size=size, offset=0.0, single=single)


def _shifted(value: Value) -> tuple[float, Value]:
    """(eps, statistic) of `statistic + eps`."""
    if value.op == "add" and len(value.args) == 2 and value.args[0].op == "const":
        return value.args[0].attr("value"), value.args[1]
    return 0.0, value


def _centred(value: Value) -> tuple[Value | None, Value]:
    """(mean(x), x) where `value` is x − mean(x), else (None, value)."""
    if value.op == "add" and len(value.args) == 2:
        for x, shift in (value.args, value.args[::-1]):
            if shift.op == "mul" and len(shift.args) == 2 and shift.args[0].op == "const":
                mean = shift.args[1].args[0] if shift.args[1].op == "bcast" else shift.args[1]
                if shift.args[0].attr("value") == -1.0 and mean.op == "mean" and mean.args[0] is x:
                    return mean, x
    return None, value


def _divide(factors: list[Value], x: Value) -> list[Value] | None:
    """`factors` without those of x, or None."""
    left = list(factors)
    for wanted in x.args if x.op == "mul" and x not in left else (x,):
        if wanted not in left:
            return None
        left.remove(wanted)
    return left


def _weight(algebra: Algebra, factors: list[Value]) -> list[Value] | None:
    """norm · w with w repeated along the rows: the weight joins the norm."""
    norm = next((f for f in factors if f.op in NORMS and len(f.args) == 1), None)
    if norm is None:
        return None
    for f in factors:
        weight = None if f is norm else _per_column(f, norm)
        if weight is None:
            continue
        offset = 0.0
        if weight.op == "add" and len(weight.args) == 2 and weight.args[0].op == "const":
            offset, weight = weight.args[0].attr("value"), weight.args[1]
        attrs = {**dict(norm.attrs), "offset": offset}
        return [
            *(g for g in factors if g is not f and g is not norm),
            algebra.make(norm.op, norm.args[0], weight, **attrs),
        ]
    return None


def _per_column(value: Value, norm: Value) -> Value | None:
    """v where `value` is v [N] repeated along the rows of the norm's result [M, N]."""
    if value.op == "bcast" and [kept for _, kept in value.attr("groups")] == [False, True]:
        return value.args[0]
    if norm.attr("single") and value.op in ("leaf", "add") and all(a.op in ("leaf", "const") for a in value.args):
        return value
    return None
