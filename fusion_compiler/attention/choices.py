"""What an element of a tensor is, as a function of indices: a sympy number, a sympy Boolean, or a `Choice` of numbers.

`as_held` is such a term in a dtype: torch rounds, cuts off and wraps around where sympy computes with all numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean, BooleanAtom, BooleanFunction

from . import axes

ZERO = sympy.Integer(0)
LOAD = "load_"  # how names of functions begin that stand for what a tensor holds


@dataclass(frozen=True)
class Choice:
    """The number `yes` where `condition` holds, else `no`; both may be choices again."""

    condition: Boolean
    yes: Any
    no: Any


Term = Any  # a sympy number, a sympy Boolean, or a Choice


def is_truth(term: Term) -> bool:
    """Whether a term is a truth value. (sympy counts every symbol among its Booleans.)"""
    return isinstance(term, (Relational, BooleanFunction, BooleanAtom))


def choice(condition: Boolean, yes: Term, no: Term) -> Term:
    """A choice, or what it comes down to: `where(i < 1, e(0), e(i))` is e(i)."""
    if condition == sympy.true or yes == no:
        return yes
    if condition == sympy.false:
        return no
    if is_truth(yes) or is_truth(no):
        return sympy.Or(sympy.And(condition, truth(yes)), sympy.And(sympy.Not(condition), truth(no)))
    first = _fixed_to_zero(condition)
    if first is not None and isinstance(no, sympy.Expr) and no.subs(first, 0) == yes:
        return no
    return Choice(condition, yes, no)


def _fixed_to_zero(condition: Boolean) -> sympy.Symbol | None:
    """The index of which the condition says no more than that it is 0."""
    if len(condition.free_symbols) != 1 or not isinstance(condition, Relational):
        return None
    (symbol,) = condition.free_symbols
    at_zero, beyond = condition.subs(symbol, 0), condition.subs(symbol, symbol + 1)
    return cast(sympy.Symbol, symbol) if at_zero == sympy.true and beyond == sympy.false else None


def lift(fn: Callable[..., Term], *args: Term) -> Term:
    """`fn`, a function of numbers, on every branch of its arguments."""
    for i, a in enumerate(args):
        if isinstance(a, Choice):
            branches = (lift(fn, *args[:i], branch, *args[i + 1 :]) for branch in (a.yes, a.no))
            return choice(a.condition, *branches)
    return fn(*args)


def number(term: Term) -> Term:
    """A truth value as 0 or 1; a number as it is."""
    return choice(term, sympy.Integer(1), ZERO) if is_truth(term) else term


def truth(term: Term) -> Boolean:
    """A number as whether it is not 0; a truth value as it is."""
    return cast(Boolean, term if is_truth(term) else lift(lambda x: sympy.Ne(x, 0), term))


def constant(value: Any) -> Term:
    """A number or truth value of Python as a term."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, float):
        if math.isinf(value):
            return sympy.oo if value > 0 else -sympy.oo
        return sympy.Integer(int(value)) if value.is_integer() and abs(value) < 2**53 else sympy.Float(value)
    return axes.size_of(value)


def leaves(term: Term) -> Iterable[tuple[Boolean, sympy.Expr]]:
    """The numbers a term may be, each with its condition."""
    term = number(term)
    if isinstance(term, Choice):
        for branch, condition in ((term.yes, term.condition), (term.no, sympy.Not(term.condition))):
            for inner, value in leaves(branch):
                yield sympy.And(condition, inner), value
    else:
        yield sympy.true, term


def parts_of(term: Term) -> list[sympy.Basic]:
    """The formulas that a term is made of: conditions and numbers."""
    if isinstance(term, Choice):
        return [term.condition, *parts_of(term.yes), *parts_of(term.no)]
    return [term]


# Integers of these dtypes do not wrap around for as many elements as tensors have.
WIDE = (torch.int32, torch.int64)


def as_held(term: Term, dtype: torch.dtype) -> Term | None:
    """The number or truth value that a tensor of `dtype` holds for `term`; None where that is not known.

    What is added to scores keeps its exact formula: rounding it is eager's error, and no kernel has to repeat it.
    """
    if dtype == torch.bool:
        return truth(term)
    if is_truth(term):
        return term
    if any(_unknown(leaf, dtype) for _, leaf in leaves(term)):
        return None
    return lift(lambda x: _rounded(x, dtype), term)


def _unknown(x: sympy.Expr, dtype: torch.dtype) -> bool:
    """Whether it is not known what an integer dtype holds for the number x."""
    if dtype.is_floating_point or dtype.is_complex:
        return False
    if x.is_number:
        return not x.is_finite or not torch.iinfo(dtype).min <= int(x) <= torch.iinfo(dtype).max
    if x.is_integer:
        return dtype not in WIDE and not is_read(x)
    return not (x.is_nonnegative and _dyadic(x))


def _rounded(x: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
    if dtype.is_floating_point:
        return constant(torch.tensor(float(x), dtype=torch.float64).to(dtype).item()) if x.is_number else x
    if x.is_number:
        return sympy.Integer(int(x))
    return x if x.is_integer else sympy.floor(sympy.nsimplify(x, rational=True))


def is_read(x: sympy.Expr) -> bool:
    """Whether x is an element as a tensor of the graph holds it."""
    return str(getattr(x, "func" if x.args else "name", "")).startswith(LOAD)


def comparable(term: Term, dtype: torch.dtype, *, ordered: bool, whole: bool) -> bool:
    """Whether comparing `term`, which is of `dtype`, in a kernel gives what comparing it in a graph does.

    `whole`: it is compared with whole numbers. Kernels compare others in float32. Where terms are `ordered`, the
    opposite comparison has to give the opposite, which it does not of what is no number.
    """
    return all(x.is_number or _comparable(x, dtype, ordered=ordered, whole=whole) for _, x in leaves(term))


def _comparable(x: sympy.Expr, dtype: torch.dtype, *, ordered: bool, whole: bool) -> bool:
    reads = [part for part in sympy.preorder_traversal(x) if is_read(part)]
    if not dtype.is_floating_point:
        return whole or not reads or is_read(x)
    if any(not r.is_integer for r in reads) and (ordered or dtype == torch.float64):
        return False
    return is_read(x) or (dtype in (torch.float32, torch.float64) and _dyadic(x))


def _dyadic(x: sympy.Expr) -> bool:
    """Whether the constants of x have few binary digits, so that its multiples of indices are exact."""
    return all(n.is_finite and float(n) * 1024 % 1 == 0 for n in x.atoms(sympy.Number))
