"""Arithmetic on amounts: plain numbers where sizes are known, sympy where they are not.

The functions stay in plain Python while every argument is a number, so a static graph never pays for sympy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import sympy
import torch

from ..candidates import Amount

Condition: TypeAlias = bool | sympy.Basic


def amount(size: int | torch.SymInt) -> Amount:
    """A size of a tensor as a number, or as the sympy expression behind a SymInt."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = cast(sympy.Expr, size.node.expr)
    return int(expression) if expression.is_Integer else expression


def is_symbolic(value: Any) -> bool:
    return isinstance(value, sympy.Basic) and not value.is_number


def maximum(*values: Amount) -> Amount:
    # unevaluated: sympy would otherwise try to prove which one is greater, which can take seconds
    return sympy.Max(*values, evaluate=False) if any(map(is_symbolic, values)) else max(values)


def minimum(*values: Amount) -> Amount:
    return sympy.Min(*values, evaluate=False) if any(map(is_symbolic, values)) else min(values)


def ceil_div(a: Amount, b: Amount) -> Amount:
    return sympy.ceiling(a / b) if is_symbolic(a) or is_symbolic(b) else -(-a // b)


def product(sizes: Any) -> Amount:
    total: Amount = 1
    for size in sizes:
        total = total * amount(size)
    return total


def where(condition: Condition, a: Amount, b: Amount) -> Amount:
    if isinstance(condition, sympy.Basic) and condition not in (sympy.true, sympy.false):
        return sympy.Piecewise((a, condition), (b, True))
    return a if condition else b


def greater(a: Amount, b: Amount) -> Condition:
    return sympy.Gt(a, b) if is_symbolic(a) or is_symbolic(b) else bool(a > b)


def at(value: Amount, sizes: Mapping[sympy.Symbol, int]) -> float:
    """The value where the symbols have the given sizes."""
    return float(value.subs(sizes)) if isinstance(value, sympy.Basic) else float(value)


def compiled(value: Amount, symbol: sympy.Symbol) -> Callable[[int], float]:
    """`value` as a fast function of its one symbol."""
    if not is_symbolic(value):
        constant = float(value)
        return lambda _: constant
    function = sympy.lambdify([symbol], value, modules="math")
    return lambda size: float(function(size))
