"""Prints what was recognised of a score, functions of batch, head, query and key, as Triton expressions.

In a kernel `rows` [BLOCK_M, 1] and `keys` [1, BLOCK_N] are the positions, `batch` and `head` integers. What depends on
one of them only stays a vector, and factors meet narrow ones first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from ....attention.choices import Choice, is_truth
from ....candidates import Amount
from .sizes import Unprintable, size_text

EXACT = 2**24  # positions below are whole numbers in float32
NARROW = (torch.uint8, torch.int8, torch.int16)  # differences of which would wrap around
_NAMES = {"batch": "batch", "head": "head", "query": "rows", "key": "keys"}
_RELATIONS = {sympy.Eq: "==", sympy.Ne: "!=", sympy.Le: "<=", sympy.Lt: "<", sympy.Ge: ">=", sympy.Gt: ">"}


@dataclass(frozen=True)
class Read:
    """A tensor that an expression reads: the kernel's argument for it, its strides in elements, its dtype."""

    argument: str
    strides: tuple[Amount, ...]
    dtype: torch.dtype


class Printer:
    """Prints terms of a `fused.Modification`. `bounds` are conditions under which positions are inside the tensors, by
    the name of the position; `exact` tells that positions may be counted in float32."""

    def __init__(self, reads: Mapping[str, Read], bounds: Mapping[str, str], exact: bool) -> None:
        self.reads, self.bounds, self.exact = reads, bounds, exact

    def number(self, term: Any, factor: float = 1.0) -> str:
        """A term times a constant, float32."""
        if isinstance(term, Choice):
            yes, no = self.number(term.yes, factor), self.number(term.no, factor)
            return f"tl.where({self.truth(term.condition)}, {yes}, {no})"
        if is_truth(term):
            return f"tl.where({self.truth(term)}, {factor!r}, 0.0)"
        if term.is_Add:
            return "(" + " + ".join(self.number(a, factor) for a in _narrow_first(term.args)) + ")"
        if term.is_number:
            return 'float("-inf")' if term == -sympy.oo else repr(float(term) * factor)
        parts = [repr(factor)] if factor != 1.0 else []
        return "(" + " * ".join(parts + [self._float(a) for a in _narrow_first(sympy.Mul.make_args(term))]) + ")"

    def truth(self, term: Any) -> str:
        """A condition."""
        if isinstance(term, (sympy.And, sympy.Or)):
            sign = " & " if isinstance(term, sympy.And) else " | "
            return "(" + sign.join(self.truth(a) for a in _narrow_first(term.args)) + ")"
        if isinstance(term, sympy.Not):
            return f"({self.truth(term.args[0])} == 0)"
        if isinstance(term, Relational) and type(term) in _RELATIONS:
            whole = all(a.is_integer for a in term.args)
            a, b = (self._integer(x) if whole else self.number(x) for x in term.args)
            return f"({a} {_RELATIONS[type(term)]} {b})"
        raise Unprintable(f"the condition {term} has no Triton expression")

    def _float(self, term: sympy.Expr) -> str:
        if term.is_number:
            return repr(float(term))
        if term.is_Add or term.is_Mul:
            if not term.is_integer or (self.exact and not reads_in(term)):
                sign = " + " if term.is_Add else " * "
                return "(" + sign.join(self._float(a) for a in _narrow_first(term.args)) + ")"
        elif isinstance(term, (sympy.Min, sympy.Max)) and not term.is_integer:
            return _nested(_MINMAX[term.func], [self._float(a) for a in term.args])
        elif isinstance(term, sympy.Abs) and not term.is_integer:
            return f"tl.abs({self._float(term.args[0])})"
        elif _is_power(term):
            if not term.is_integer or (self.exact and not reads_in(term)):
                return "(" + " * ".join([self._float(term.base)] * int(term.exp)) + ")"
        elif not term.is_integer:
            return f"{self._load(term)}.to(tl.float32)"
        return f"({self._integer(term)}).to(tl.float32)"

    def _integer(self, term: sympy.Expr) -> str:
        if term.is_Integer:
            return str(int(term))
        if isinstance(term, sympy.Symbol) and str(term) in _NAMES:
            return _NAMES[str(term)]
        if term.is_Add:
            return "(" + " + ".join(map(self._integer, _narrow_first(term.args))) + ")"
        if term.is_Mul or (_is_power(term) and _positions(term)):
            *narrow, wide = _narrow_first(term.args if term.is_Mul else [term.base] * int(term.exp))
            several = sum(map(_positions, (*narrow, wide))) > 1  # whose product may need 64 bits
            first = f"({self._integer(wide)}).to(tl.int64)" if several else self._integer(wide)
            return "(" + " * ".join([first, *map(self._integer, narrow)]) + ")"
        if isinstance(term, sympy.floor):
            a, b = sympy.fraction(sympy.together(term.args[0]))
            return self._floored(a, b)
        if isinstance(term, sympy.Mod):
            a, b = map(self._integer, term.args)
            return f"({a} % {b})" if term.args[0].is_nonnegative else f"((({a}) % {b} + {b}) % {b})"
        if isinstance(term, (sympy.Min, sympy.Max)):
            return _nested(_MINMAX[term.func], [self._integer(a) for a in term.args])
        if isinstance(term, sympy.Abs):
            return f"tl.abs({self._integer(term.args[0])})"
        if str(getattr(term, "func", term)) in self.reads or str(term) in self.reads:
            return self._load(term)
        if _positions(term):
            raise Unprintable(f"{term} has no Triton expression")
        return size_text(term)

    def _floored(self, a: sympy.Expr, b: sympy.Expr) -> str:
        if not b.is_positive or not a.is_integer or not b.is_integer:
            raise Unprintable(f"⌊{a} / {b}⌋ is no division of whole numbers")
        x, y = self._integer(a), self._integer(b)
        return f"({x} // {y})" if a.is_nonnegative else f"({x} // {y} - (({x}) % {y} < 0).to(tl.int32))"

    def _load(self, term: sympy.Expr) -> str:
        applied = isinstance(term, AppliedUndef)
        read = self.reads.get(str(term.func) if applied else str(term))
        if read is None:
            raise Unprintable(f"{term} has no Triton expression")
        indices = term.args if applied else ()
        place, conditions = read.argument, list[str]()
        for index, stride in zip(indices, read.strides, strict=True):
            if index != 0:
                place += f" + ({self._integer(index)}).to(tl.int64) * {size_text(stride)}"
        for symbol, bound in self.bounds.items():
            if bound and any(str(s) == symbol for s in term.free_symbols):
                conditions.append(f"({bound})")
        loaded = f"tl.load({place}{', mask=' + ' & '.join(conditions) + ', other=0' if conditions else ''})"
        return f"{loaded}.to(tl.int32)" if read.dtype in NARROW else loaded


_MINMAX = {sympy.Min: "tl.minimum", sympy.Max: "tl.maximum"}


def _nested(function: str, values: Sequence[str]) -> str:
    first, *rest = values
    return f"{function}({first}, {_nested(function, rest)})" if rest else first


def _narrow_first(terms: Sequence[Any]) -> list[Any]:
    """What is a number of the program before what varies along rows or keys, and that before what fills tiles."""
    return sorted(terms, key=lambda t: sum(str(s) in ("query", "key") for s in t.free_symbols))


def _is_power(term: sympy.Expr) -> bool:
    return bool(isinstance(term, sympy.Pow) and term.exp.is_Integer and 0 < term.exp <= 4)


def _positions(term: sympy.Expr) -> bool:
    """Whether a term varies among the scores of a tensor."""
    return any(str(s) in _NAMES for s in term.free_symbols)


def reads_in(term: sympy.Expr) -> bool:
    """Whether a term reads a tensor."""
    return bool(term.atoms(AppliedUndef)) or any(str(s).startswith("load_") for s in term.free_symbols)
