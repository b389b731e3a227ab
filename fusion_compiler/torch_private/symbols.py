"""Ranges and traced values of the symbols behind SymInts (`ShapeEnv`).

Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

import sympy
import torch

UNBOUNDED = 2**62  # torch writes "no upper bound" as infinity or as about the largest int64


def range_of(size: torch.SymInt, symbol: sympy.Symbol) -> tuple[int, int | None]:
    """The sizes that `symbol` may take in the graph of `size`; None: without end."""
    bounds = size.node.shape_env.var_to_range[symbol]
    lower = int(bounds.lower) if bounds.lower.is_Integer else 0  # an int that a module holds has no lower bound either
    upper = int(bounds.upper) if bounds.upper.is_Integer else UNBOUNDED
    return max(lower, 0), upper if upper < UNBOUNDED else None


def traced_values(size: torch.SymInt) -> dict[sympy.Symbol, int]:
    """The value of every symbol of the graph of `size` that came from a real input when tracing.

    Sizes that depend on data and the ragged sizes of nested tensors have none.
    """
    shape_env = size.node.shape_env
    return {symbol: int(value) for symbol, value in shape_env.backed_var_to_val.items() if value.is_Integer}


def is_known(size: int | torch.SymInt) -> bool:
    """Whether a size had a value when tracing."""
    return isinstance(size, int) or set(size.node.expr.free_symbols) <= traced_values(size).keys()
