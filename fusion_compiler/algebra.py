"""The closed vocabulary in which graphs, patterns and epilogues are written, in one normal form.

A `Value` is a hash-consed expression: inside one `Algebra`, equal expressions are the same object,
so comparing is `is`. Constructors normalise, so that spellings meet:

* shapes are left out: a reshape of contiguous data is the same value, seen flat;
* casts between floating dtypes are left out: a fused kernel computes in float32;
* sums and products are n-ary and sorted, constants folded, `a - b`, `a / b`, `-a` written with them;
* `sqrt`, `rsqrt`, reciprocal and integer powers are all `pow` with a constant exponent;
* `sigmoid`, `silu` and `gelu` are recognised from their formulas as they are built;
* broadcasting is explicit: `bcast(x)` with the groups of kept and repeated axes, outermost first.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

# Pointwise operations of one argument that keep their name. Everything else is normalised away.
UNARY = (
    "exp", "exp2", "expm1", "log", "log1p", "log2", "sin", "cos", "tanh", "erf", "abs", "sign", "floor", "ceil",
    "round", "trunc", "sigmoid", "silu", "gelu_erf", "gelu_tanh", "relu", "logical_not",
)  # fmt: skip
BINARY = ("maximum", "minimum", "le", "lt", "ge", "gt", "eq", "ne", "logical_and", "logical_or", "remainder")
POINTWISE = frozenset((*UNARY, *BINARY, "add", "mul", "pow", "where", "const", "cast"))


@dataclass(frozen=True, eq=False)
class Value:
    """One expression. `op` is a name of the vocabulary, `attrs` its sorted static parameters."""

    op: str
    args: tuple[Value, ...] = ()
    attrs: tuple[tuple[str, Any], ...] = ()
    serial: int = 0  # order of creation: gives commutative operands one order

    def attr(self, name: str, default: Any = None) -> Any:
        return next((v for k, v in self.attrs if k == name), default)

    def walk(self) -> Iterable[Value]:
        """Every value below and including this one, operands first, each once."""
        seen: set[int] = set()
        stack: list[tuple[Value, bool]] = [(self, False)]
        while stack:
            value, expanded = stack.pop()
            if expanded:
                yield value
            elif id(value) not in seen:
                seen.add(id(value))
                stack.append((value, True))
                stack.extend((a, False) for a in value.args)

    def __repr__(self) -> str:
        inner = [repr(a) for a in self.args] + [f"{k}={v}" for k, v in self.attrs]
        return f"{self.op}({', '.join(inner)})"


class Algebra:
    """Builds values and keeps one copy of each."""

    def __init__(self) -> None:
        self._table: dict[tuple[Any, ...], Value] = {}

    def make(self, op: str, *args: Value, **attrs: Any) -> Value:
        """The value `op(*args, **attrs)` as it stands, without normalising."""
        items = tuple(sorted(attrs.items()))
        key = (op, tuple(id(a) for a in args), tuple((k, type(v), v) for k, v in items))
        found = self._table.get(key)
        if found is None:
            found = self._table[key] = Value(op, args, items, len(self._table))
        return found

    def const(self, value: float | int | bool) -> Value:
        return self.make("const", value=float(value))

    # ---- sums and products ------------------------------------------------------------------
    def add(self, *terms: Value) -> Value:
        """Sum; numeric constants are gathered into at most one, and `1 − sigmoid(x)` is sigmoid(−x)."""
        total = self._nary("add", terms, 0.0, operator.add)
        if total.op == "add" and len(total.args) == 2 and _is_one(total.args[0]) and total.args[1].op == "mul":
            sign, *gate = total.args[1].args
            if sign is self.const(-1.0) and len(gate) == 1 and gate[0].op == "sigmoid":
                return self.unary("sigmoid", self.neg(gate[0].args[0]))
        return total

    def mul(self, *factors: Value) -> Value:
        """Product; `x·x` is pow(x, 2), `x·sigmoid(x)` silu(x), `½·x·(1+erf(x/√2))` and its tanh form gelu."""
        product = self._activation(self._nary("mul", factors, 1.0, operator.mul))
        if product.op != "mul" or len(set(product.args)) == len(product.args):
            return product
        powers = [self.pow(f, float(n)) for f, n in Counter(product.args).items()]
        return self._nary("mul", powers, 1.0, operator.mul)

    def sub(self, a: Value, b: Value) -> Value:
        return self.add(a, self.neg(b))

    def neg(self, a: Value) -> Value:
        return self.mul(self.const(-1.0), a)

    def div(self, a: Value, b: Value) -> Value:
        return self.mul(a, self.pow(b, -1.0))

    def _nary(self, op: str, args: Iterable[Value], unit: float, fold: Callable[[float, float], float]) -> Value:
        args = list(args)
        if sum(a.op != "const" for a in args) == 1:
            # a constant beside one sum (product) joins it: c + (a + b) is one sum
            args = [inner for a in args for inner in (a.args if a.op == op else (a,))]
        constant, rest = unit, []
        for a in args:
            if a.op == "const":
                constant = fold(constant, a.attr("value"))
            else:
                rest.append(a)
        if not rest:
            return self.const(constant)
        rest.sort(key=lambda v: v.serial)
        if not math.isclose(constant, unit, rel_tol=1e-12):
            rest.insert(0, self.const(constant))
        return rest[0] if len(rest) == 1 else self.make(op, *rest)

    # ---- powers and functions ---------------------------------------------------------------
    def pow(self, base: Value, exponent: float) -> Value:
        """`base ** exponent`; square roots, reciprocals and squares meet here."""
        if exponent == 1.0:
            return base
        if base.op == "const" and not (base.attr("value") == 0 and exponent < 0):
            with contextlib.suppress(OverflowError):
                folded = base.attr("value") ** exponent
                if isinstance(folded, float):
                    return self.const(folded)
        if base.op == "pow" and (base.attr("exponent") == 0.5 or base.attr("exponent") == -1.0):
            # √x to any power and (1/x) to any power keep x's domain, so the exponents multiply
            return self.pow(base.args[0], base.attr("exponent") * exponent)
        if base.op == "mul" and len(base.args) == 2 and base.args[1].op == "pow" and exponent == 2.0:
            return self.mul(*(self.pow(factor, exponent) for factor in base.args))  # (√x/c)²
        if base.op == "bcast":
            return self.bcast(self.pow(base.args[0], exponent), base.attr("groups"))
        if base.op == "abs" and exponent == 2.0:
            return self.pow(base.args[0], exponent)
        if base.op == "exp" and exponent == -1.0:
            return self.unary("exp", self.neg(base.args[0]))
        if exponent == -1.0:
            gate = self._sigmoid_argument(base)
            if gate is not None:
                return self.unary("sigmoid", gate)
        return self.make("pow", base, exponent=float(exponent))

    def _sigmoid_argument(self, base: Value) -> Value | None:
        """x where `base` is 1 + exp(−x)."""
        if base.op == "add" and len(base.args) == 2 and base.args[0].op == "const":
            one, other = base.args
            if _is_one(one) and other.op == "exp":
                return self.neg(other.args[0])
        return None

    def unary(self, op: str, x: Value) -> Value:
        if x.op == "bcast":
            return self.bcast(self.unary(op, x.args[0]), x.attr("groups"))
        if op == "exp2" and x.op == "mul" and x.args[0].op == "const":
            sign = round(x.args[0].attr("value") * math.log(2.0))
            if abs(sign) == 1 and math.isclose(x.args[0].attr("value") * math.log(2.0), sign, rel_tol=1e-6):
                return self.unary("exp", self.mul(self.const(sign), *x.args[1:]))
        return self.make(op, x)

    def binary(self, op: str, a: Value, b: Value) -> Value:
        """A non-arithmetic operation of two arguments (comparison, maximum, logic)."""
        if op in ("ge", "gt"):
            op, a, b = {"ge": "le", "gt": "lt"}[op], b, a
        if op in ("maximum", "minimum", "eq", "ne", "logical_and", "logical_or") and b.serial < a.serial:
            a, b = b, a
        if op == "maximum":
            zero = next((v for v in (a, b) if v.op == "const" and v.attr("value") == 0.0), None)
            if zero is not None:
                return self.unary("relu", b if zero is a else a)
        return self.make(op, a, b)

    def where(self, condition: Value, a: Value, b: Value) -> Value:
        zero = self.const(0.0)
        if a is zero and condition.op == "le" and condition.args == (b, zero):
            return self.unary("relu", b)  # unlike where(b > 0, b, 0), it passes on what is not a number
        return self.make("where", condition, a, b)

    def bcast(self, x: Value, groups: tuple[tuple[Any, bool], ...]) -> Value:
        """`x` repeated: `groups` lists (size, kept) for the axes of the result, outermost first."""
        if x.op == "const" or all(kept for _, kept in groups):
            return x
        if x.op == "bcast" and len(x.attr("groups")) == 1:
            x = x.args[0]  # a scalar repeated twice is repeated once
            groups = ((math.prod(size for size, _ in groups), False),)
        return self.make("bcast", x, groups=groups)

    # ---- activations ------------------------------------------------------------------------
    def _activation(self, product: Value) -> Value:
        if product.op != "mul":
            return product
        for step in product.args:
            if step.op == "add" and len(step.args) == 2 and _is_one(step.args[0]) and step.args[1].op == "tanh":
                # 1 + tanh(x) as a factor is 2·sigmoid(2x)
                two = self.const(2.0)
                gate = self.unary("sigmoid", self.mul(two, step.args[1].args[0]))
                return self.mul(*self._without(list(product.args), step), two, gate)
        factors = list(product.args)
        for gate in [f for f in factors if f.op == "sigmoid"]:
            rest = self._without(factors, gate)
            growth = self.unary("exp", self.neg(gate.args[0]))
            if growth in rest:  # exp(x)·sigmoid(−x) is sigmoid(x)
                turned = self.unary("sigmoid", self.neg(gate.args[0]))
                return self.mul(*self._without(rest, growth), turned)
            for name, x in self._gated_by(gate):
                others = self._take(rest, x)
                if others is not None:
                    return self._nary("mul", (*others, self.make(name, x)), 1.0, operator.mul)
        for gate in [f for f in factors if f.op == "add"]:
            argument = self._gelu(gate)
            others = None if argument is None else self._take(self._without(factors, gate), argument)
            if argument is not None and others is not None:
                coefficient = self.const(2.0)  # ½ is the formula's own; whatever is left stays a factor
                return self._nary("mul", (*others, coefficient, self.make("gelu_erf", argument)), 1.0, operator.mul)
        return product

    @staticmethod
    def _without(values: list[Value], gone: Value) -> list[Value]:
        kept = list(values)
        kept.remove(gone)
        return kept

    def _take(self, factors: list[Value], x: Value) -> list[Value] | None:
        """`factors` divided by x, or None; x may itself be a product."""
        wanted = list(x.args) if x.op == "mul" else [x]
        left, constant = list(factors), 1.0
        for w in wanted:
            if w.op == "const" and w.attr("value") != 0.0:
                constant /= w.attr("value")
            elif any(f is w for f in left):
                left = self._without(left, w)
            else:
                return None
        return left if constant == 1.0 else [*left, self.const(constant)]

    def _gated_by(self, gate: Value) -> Iterator[tuple[str, Value]]:
        """(name, x) of the activations x·`gate`, a sigmoid: silu, or tanh gelu of a cubic."""
        yield "silu", gate.args[0]
        if gate.args[0].op in ("add", "mul"):
            for x in gate.args[0].walk():
                if x.op != "const" and self._is_gelu_tanh_argument(gate.args[0], x):
                    yield "gelu_tanh", x

    def _gelu(self, gate: Value) -> Value | None:
        """The argument of gelu where `gate` is 1 + erf(x/√2)."""
        if len(gate.args) != 2 or not _is_one(gate.args[0]) or gate.args[1].op != "erf":
            return None
        return self._round_unit(self.mul(self.const(math.sqrt(2.0)), gate.args[1].args[0]))

    def _round_unit(self, x: Value) -> Value:
        """Drop a constant factor that is 1 up to rounding."""
        if x.op == "mul" and x.args[0].op == "const" and abs(x.args[0].attr("value") - 1.0) < 1e-6:
            return self.mul(*x.args[1:])
        return x

    def _is_gelu_tanh_argument(self, argument: Value, x: Value) -> bool:
        """Whether `argument`, a polynomial in x, is 2√(2/π)·x + 2√(2/π)·0.044715·x³."""
        polynomial = _polynomial(argument, x)
        if polynomial is None or set(polynomial) != {1, 3}:
            return False
        c = 2.0 * math.sqrt(2.0 / math.pi)
        return math.isclose(polynomial[1], c, rel_tol=1e-4) and math.isclose(polynomial[3], 0.044715 * c, rel_tol=1e-4)


def _is_one(value: Value) -> bool:
    return value.op == "const" and value.attr("value") == 1.0


def _polynomial(value: Value, x: Value) -> dict[int, float] | None:
    """Coefficients by degree of `value` as a polynomial in `x`, or None if it is not one."""
    if value is x:
        return {1: 1.0}
    if value.op == "const":
        return {0: value.attr("value")}
    if value.op == "pow" and value.attr("exponent") == int(value.attr("exponent")) and 0 < value.attr("exponent") <= 3:
        factors = [value.args[0]] * int(value.attr("exponent"))
    elif value.op == "mul":
        factors = list(value.args)
    elif value.op == "add":
        total: dict[int, float] = {}
        for term in value.args:
            part = _polynomial(term, x)
            if part is None:
                return None
            for degree, c in part.items():
                total[degree] = total.get(degree, 0.0) + c
        return total
    else:
        return None
    product = {0: 1.0}
    for factor in factors:
        part = _polynomial(factor, x)
        if part is None:
            return None
        product = _times(product, part)
    return {d: c for d, c in product.items() if c != 0.0}


def _times(a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
    out: dict[int, float] = {}
    for da, ca in a.items():
        for db, cb in b.items():
            out[da + db] = out.get(da + db, 0.0) + ca * cb
    return out
