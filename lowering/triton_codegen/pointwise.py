"""Prints a pointwise `Value` as Triton statements in float32.

Every value is computed once and named; booleans become 0/1 where arithmetic meets them. NaN propagates
as in torch (`relu`, `maximum`, `minimum`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ...algebra import Value

TYPES = {
    torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16", torch.float32: "tl.float32",
    torch.float8_e4m3fn: "tl.float8e4nv", torch.float8_e5m2: "tl.float8e5",
}  # fmt: skip
_COMPARISON = {"le": "<=", "lt": "<", "ge": ">=", "gt": ">", "eq": "==", "ne": "!="}
_LOGICAL = {"logical_and": "&", "logical_or": "|"}
_FUNCTION = {
    name: f"tl.{name}"
    for name in ("exp", "exp2", "log", "log2", "sin", "cos", "erf", "abs", "floor", "ceil", "sigmoid")
}
# Operations written out; `{a}` and `{b}` are names, never expressions, so they may repeat.
_FORMULA = {
    "silu": "{a} * tl.sigmoid({a})",
    "gelu_erf": "0.5 * {a} * (1.0 + tl.erf({a} * 0.7071067811865476))",
    # 1 + tanh(u) = 2·sigmoid(2u), which needs no tanh and loses nothing near zero
    "gelu_tanh": "{a} * tl.sigmoid(1.5957691216057308 * ({a} + 0.044715 * {a} * {a} * {a}))",
    # near zero the difference would keep no digits: a polynomial there (Cephes)
    "tanh": "tl.where(tl.abs({a}) < 0.625, {a} + {a} * ({a} * {a}) * (-3.33332819422e-1 + ({a} * {a}) * "
    "(1.33314422036e-1 + ({a} * {a}) * (-5.37397155531e-2 + ({a} * {a}) * (2.06390887954e-2 - 5.70498872745e-3 * "
    "({a} * {a}))))), 2.0 * tl.sigmoid(2.0 * {a}) - 1.0)",
    # Kahan: the rounding of 1 + a cancels in the quotient
    "log1p": "tl.where((1.0 + {a} == 1.0) | ({a} == float('inf')), {a}, "
    "tl.log(1.0 + {a}) * ({a} / ((1.0 + {a}) - 1.0)))",
    "expm1": "tl.where(tl.abs({a}) > 0.5, tl.exp({a}) - 1.0, tl.where(tl.exp({a}) == 1.0, {a}, "
    "(tl.exp({a}) - 1.0) * ({a} / tl.log(tl.exp({a})))))",
    "relu": "tl.where({a} < 0.0, 0.0, {a})",
    "sign": "tl.where({a} > 0.0, 1.0, tl.where({a} < 0.0, -1.0, {a}))",
    "trunc": "tl.where({a} < 0.0, tl.ceil({a}), tl.floor({a}))",
    # half to even: ⌊a/2 + ¼⌋·2 is the nearest even number, taken where a is exactly halfway
    "round": "tl.where({a} - tl.floor({a}) == 0.5, 2.0 * tl.floor(0.5 * {a} + 0.25), tl.floor({a} + 0.5))",
    "maximum": "tl.where(({a} >= {b}) | ({a} != {a}), {a}, {b})",
    "minimum": "tl.where(({a} <= {b}) | ({a} != {a}), {a}, {b})",
    "remainder": "{a} - {b} * tl.floor({a} / {b})",
}


def literal(number: float) -> str:
    """`number` as Triton source."""
    return repr(float(number)) if math.isfinite(number) else f'float("{number}")'


def unsupported(value: Value) -> str | None:
    """Why `value` cannot be printed, or None. Leaves are `acc` and `extra`."""
    known = {*_COMPARISON, *_LOGICAL, *_FUNCTION, *_FORMULA, "logical_not", "add", "mul", "pow", "where", "const"}
    for v in value.walk():
        if v.op not in known and v.op not in ("acc", "extra"):
            return f"the epilogue uses '{v.op}', which the Triton generator cannot print"
    return None


def print_pointwise(value: Value, leaf: Callable[[Value], str], prefix: str) -> tuple[list[str], str]:
    """Statements that compute `value`, and the name of the result.

    `leaf` gives the name of an `acc` or `extra` leaf; `prefix` begins every name made here.
    """
    lines: list[str] = []
    names: dict[int, str] = {}
    booleans: set[int] = set()

    def number(v: Value) -> str:
        return f"{names[id(v)]}.to(tl.float32)" if id(v) in booleans else names[id(v)]

    def condition(v: Value) -> str:
        return names[id(v)] if id(v) in booleans else f"({names[id(v)]} != 0.0)"

    for v in value.walk():
        if v.op == "const":
            names[id(v)] = f"({literal(v.attr('value'))})" if v.attr("value") < 0 else literal(v.attr("value"))
            continue
        if v.op in ("acc", "extra"):
            names[id(v)] = leaf(v)
            continue
        if v.op in _COMPARISON:
            text = f"{number(v.args[0])} {_COMPARISON[v.op]} {number(v.args[1])}"
        elif v.op in _LOGICAL:
            text = f"{condition(v.args[0])} {_LOGICAL[v.op]} {condition(v.args[1])}"
        elif v.op == "logical_not":
            text = f"{condition(v.args[0])} == 0"
        elif v.op == "where":
            text = f"tl.where({condition(v.args[0])}, {number(v.args[1])}, {number(v.args[2])})"
        elif v.op in ("add", "mul"):
            text = (" + " if v.op == "add" else " * ").join(number(a) for a in v.args)
        elif v.op == "pow":
            text = _power(number(v.args[0]), v.attr("exponent"))
        elif v.op in _FUNCTION:
            text = f"{_FUNCTION[v.op]}({number(v.args[0])})"
        elif v.op in _FORMULA:
            text = _FORMULA[v.op].format(a=number(v.args[0]), b=number(v.args[-1]))
        else:
            raise ValueError(f"cannot print '{v.op}' as Triton source: ask `unsupported` before")
        if v.op in _COMPARISON or v.op in _LOGICAL or v.op == "logical_not":
            booleans.add(id(v))
        name = f"{prefix}{len(lines)}"
        lines.append(f"{name} = {text}")
        names[id(v)] = name
    return lines, number(value)


def _power(base: str, exponent: float) -> str:
    """`base ** exponent` for a constant exponent."""
    special = {0.5: f"tl.sqrt({base})", -0.5: f"tl.rsqrt({base})", -1.0: f"1.0 / {base}"}
    if exponent in special:
        return special[exponent]
    if exponent == int(exponent) and 0 < abs(exponent) <= 8:
        product = " * ".join([base] * int(abs(exponent)))
        return product if exponent > 0 else f"1.0 / ({product})"
    if exponent == int(exponent):  # a negative base keeps its sign for odd exponents
        sign = f"tl.where({base} < 0.0, -1.0, 1.0) * " if int(exponent) % 2 else ""
        return f"{sign}tl.exp2({literal(exponent)} * tl.log2(tl.abs({base})))"
    return f"tl.exp2({literal(exponent)} * tl.log2({base}))"
