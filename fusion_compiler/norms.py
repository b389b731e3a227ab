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
    shifted = _scaled_shift(algebra, factors)
    if shifted is not None:
        return shifted
    for recognise in (_norm, _weight):
        found = recognise(algebra, factors)
        if found is not None:
            factors = found
    return algebra.mul(*factors)


def normalise_sum(algebra: Algebra, terms: Sequence[Value]) -> Value:
    """The sum of `terms`, with variances recognised in it and a layer norm's bias taken into it."""
    terms = _variance_of_moments(algebra, list(terms))
    if len(terms) == 2:
        for norm, other in (terms, terms[::-1]):
            if norm.op in NORMS and len(norm.args) == 1 and (other.op, len(other.args)) == (norm.op, 2):
                x, weight = norm.args[0], other.args[1]
                if other is algebra.make(norm.op, x, weight, **dict(norm.attrs)):  # norm(x) + norm(x)·w
                    return algebra.make(norm.op, x, weight, **{**dict(norm.attrs), "offset": 1.0})
            if norm.op != "layer_norm" or len(norm.args) != 2:
                continue
            bias = _per_column(other, norm)
            if bias is not None:
                return algebra.make("layer_norm", *norm.args, bias, **dict(norm.attrs))
    return algebra.add(*terms)


def _scaled_shift(algebra: Algebra, factors: Sequence[Value]) -> Value | None:
    """c·(x − max x) as c·x − max(c·x), which it is for c > 0: Inductor turns the second into the first in softmax."""
    scale, *others = sorted(factors, key=lambda f: f.op != "const")
    maximum = shift_of(algebra, others[0]) if len(others) == 1 and scale.op == "const" else None
    if maximum is None or scale.attr("value") <= 0:
        return None
    x = maximum.args[0].args[0] if maximum.op == "bcast" else maximum.args[0]
    scaled = normalise_product(algebra, [scale, *(x.args if x.op == "mul" else [x])])
    largest = algebra.make("amax", scaled, size=(maximum.args[0] if maximum.op == "bcast" else maximum).attr("size"))
    repeated = algebra.bcast(largest, maximum.attr("groups")) if maximum.op == "bcast" else largest
    return algebra.add(scaled, algebra.neg(repeated))


def shift_of(algebra: Algebra, value: Value) -> Value | None:
    """The repeated max(x) where `value` is x − max(x)."""
    if value.op != "add":
        return None
    for term in value.args:
        if term.op == "mul" and len(term.args) == 2 and term.args[0].op == "const" and term.args[0].attr("value") == -1:
            repeated = term.args[1]
            largest = repeated.args[0] if repeated.op == "bcast" else repeated
            rest = [t for t in value.args if t is not term]
            if largest.op == "amax" and (rest[0] if len(rest) == 1 else algebra.add(*rest)) is largest.args[0]:
                return repeated
    return None


RESEMBLES = (
    "rows are divided by a statistic of their squares, as a norm does, but this is no norm: that is x · rsqrt(mean(x²) "
    "+ eps), or the same of x − mean(x), with the mean over the last axis; written so, it is found"
)


def resembles(value: Value) -> bool:
    """Whether `value` divides rows by a statistic of their squares and yet is no norm."""
    if value.op != "mul":
        return False
    repeated = [f.args[0] for f in value.args if f.op == "bcast" and f.args[0].op == "pow"]
    return any(f.attr("exponent") < 0 and _of_squares(f.args[0]) for f in repeated)


def nearly(value: Value, steps: int = 5) -> bool:
    """Whether `value` is computed in a few steps from something that resembles a norm, or is one."""
    if value.op in NORMS or resembles(value):
        return True
    return (
        steps > 0
        and value.op in ("add", "mul", "bcast", "cast", "slice", "permute")
        and any(nearly(a, steps - 1) for a in value.args)
    )


def _of_squares(value: Value, steps: int = 5) -> bool:
    if value.op in ("mean", "sum", "var"):
        return value.op == "var" or (value.args[0].op == "pow" and value.args[0].attr("exponent") == 2.0)
    inner = value.op in ("add", "mul", "pow", "maximum") and steps > 0
    return inner and any(_of_squares(a, steps - 1) for a in value.args)


def _variance_of_moments(algebra: Algebra, terms: list[Value]) -> list[Value]:
    """mean(x²) − mean(x)² is var(x)."""
    for square in terms:
        if square.op != "mean" or square.args[0].op != "pow" or square.args[0].attr("exponent") != 2.0:
            continue
        x, size = square.args[0].args[0], square.attr("size")
        subtracted = algebra.neg(algebra.pow(algebra.make("mean", x, size=size), 2.0))
        if subtracted in terms:
            rest = [t for t in terms if t is not square and t is not subtracted]
            return [*rest, algebra.make("var", x, size=size)]
    return terms


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
        eps, statistic = _shifted(algebra, inverse.args[0])
        rest = [f for f in factors if f is not scale]
        if statistic.op == "sum" and math.isclose(_constant(rest) ** 2, statistic.attr("size"), rel_tol=1e-6):
            # √n·(Σ + c)^−½ is (Σ/n + c/n)^−½
            eps, statistic = (
                eps / statistic.attr("size"),
                algebra.make("mean", *statistic.args, **dict(statistic.attrs)),
            )
            rest = [f for f in rest if f.op != "const"]
        if not _repeats_along_rows(scale, statistic.attr("size")):
            continue
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
            mean, x = _centred(statistic.args[0])
            if mean is not None and mean.attr("size") == statistic.attr("size"):
                statistic = algebra.make("var", x, size=statistic.attr("size"))  # shifting x leaves its variance
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


def _shifted(algebra: Algebra, value: Value) -> tuple[float, Value]:
    """(eps, statistic) of `statistic + eps`."""
    eps, statistic = 0.0, value
    if value.op == "add" and len(value.args) == 2 and value.args[0].op == "const":
        eps, statistic = value.args[0].attr("value"), value.args[1]
    if statistic.op == "mul":
        statistic = algebra.mul(*_mean_of_sum(algebra, list(statistic.args)))
    return eps, statistic


def _centred(value: Value) -> tuple[Value | None, Value]:
    """(mean(x), x) where `value` is x − mean(x), else (None, value)."""
    if value.op == "add" and len(value.args) == 2:
        for x, shift in (value.args, value.args[::-1]):
            if shift.op == "mul" and len(shift.args) == 2 and shift.args[0].op == "const":
                repeated = shift.args[1]
                mean = repeated.args[0] if repeated.op == "bcast" else repeated
                if shift.args[0].attr("value") != -1.0 or mean.op != "mean" or mean.args[0] is not x:
                    continue
                if _repeats_along_rows(repeated, mean.attr("size")):
                    return mean, x
    return None, value


def _repeats_along_rows(value: Value, size: object) -> bool:
    """Whether `value` gives each row of `size` elements one number, and not, in a square matrix, each column."""
    if value.op != "bcast":
        return size == 1
    groups = value.attr("groups")
    return groups == ((size, False),) or ([k for _, k in groups] == [True, False] and groups[-1][0] == size)


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
    if value.op == "bcast":
        groups = value.attr("groups")
        fits = [kept for _, kept in groups] == [False, True] and groups[-1][0] == norm.attr("size")
        return value.args[0] if fits else None
    if norm.attr("single") and value.op in ("leaf", "add") and all(a.op in ("leaf", "const") for a in value.args):
        return value
    return None
