"""Arithmetic on amounts: plain numbers where sizes are known, sympy where they are not.

The functions stay in plain Python while every argument is a number, so a static graph never pays for sympy.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import sympy
import torch
from sympy.core.relational import Relational

from ..candidates import Amount

Condition: TypeAlias = bool | sympy.Basic

# for functions made of amounts: torch's integer arithmetic of sizes stands among sympy's own
FUNCTIONS = [{"FloorDiv": operator.floordiv, "CeilDiv": lambda a, b: -(-a // b), "PythonMod": operator.mod}, "math"]


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


@functools.lru_cache(maxsize=4096)
def formula(value: Amount) -> str:
    """A symbolic amount as text, nothing for a number."""
    return str(value) if is_symbolic(value) else ""


def settled(condition: sympy.Basic) -> Condition:
    """The condition as a bool where sympy knows it to be always or never true."""
    return bool(condition) if condition in (sympy.true, sympy.false) else condition


def greater(a: Amount, b: Amount) -> Condition:
    return sympy.Gt(a, b) if is_symbolic(a) or is_symbolic(b) else bool(a > b)


def at(value: Amount, sizes: Mapping[sympy.Symbol, int]) -> float:
    """The value where the symbols have the given sizes."""
    return float(fixed(value, sizes)) if isinstance(value, sympy.Basic) else float(value)


def fixed(value: Any, sizes: Mapping[sympy.Symbol, int | sympy.Symbol]) -> Any:
    """An amount or a condition where some symbols have the given sizes, or are others.

    `subs` would try to prove which part of a maximum is the greater, which can take seconds; nothing is proved here,
    and what holds numbers only is plain arithmetic.
    """
    return _fixed(value, dict(sizes), {}) if isinstance(value, sympy.Basic) else value


def _fixed(value: Any, sizes: Mapping[Any, Any], memo: dict[Any, Any]) -> Any:
    if value not in memo:
        if not value.args:
            memo[value] = sizes.get(value, value)
        elif isinstance(value, sympy.Piecewise):
            memo[value] = _branch([tuple(_fixed(part, sizes, memo) for part in branch) for branch in value.args])
        else:
            args = [_fixed(a, sizes, memo) for a in value.args]
            proves = isinstance(value, (sympy.Max, sympy.Min, Relational)) and any(map(is_symbolic, args))
            memo[value] = value.func(*args, evaluate=False) if proves else value.func(*args)
    return memo[value]


def _branch(branches: list[tuple[Any, ...]]) -> Any:
    """The first branch whose condition holds, where that is known."""
    possible = [(amount, condition) for amount, condition in branches if condition != sympy.false]
    holds = possible and possible[0][1] == sympy.true
    return possible[0][0] if holds else sympy.Piecewise(*possible, evaluate=False)


@functools.lru_cache(maxsize=4096)  # the layers of a model ask for the same functions
def compiled(value: Amount, symbol: sympy.Symbol) -> Callable[[int], float]:
    """`value` as a fast function of its one symbol."""
    if not is_symbolic(value):
        constant = float(value)
        return lambda _: constant
    function = sympy.lambdify([symbol], value, modules=FUNCTIONS)
    return lambda size: float(function(size))
