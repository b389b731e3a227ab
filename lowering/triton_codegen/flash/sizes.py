"""Sizes and strides as text of a kernel: numbers, or formulas of symbols that the kernel gets as arguments."""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from ....candidates import Amount


class Unprintable(ValueError):
    """A size that the kernel cannot compute from symbols."""


def size_text(size: Amount) -> str:
    """A size as an expression, in brackets where it is more than one word."""
    if isinstance(size, (int, float)):
        return str(int(size))
    return _text(sympy.expand(size))


def _text(size: sympy.Expr) -> str:
    if size.is_Integer:
        return str(int(size))
    if isinstance(size, sympy.Symbol):
        return str(size)
    if isinstance(size, (sympy.Add, sympy.Mul)):
        return "(" + (" + " if isinstance(size, sympy.Add) else " * ").join(map(_text, size.args)) + ")"
    if isinstance(size, sympy.Pow) and size.exp.is_Integer and size.exp > 0:
        return "(" + " * ".join([_text(size.base)] * int(size.exp)) + ")"
    raise Unprintable(f"the size {size} is no sum of products of sizes")


def symbols(sizes: Iterable[Amount]) -> list[sympy.Symbol]:
    """The symbols in sizes, in a fixed order."""
    return sorted({s for size in sizes if isinstance(size, sympy.Expr) for s in size.free_symbols}, key=str)
