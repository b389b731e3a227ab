"""Guards on symbolic sizes (`ShapeEnv.evaluate_expr`): outside of its range of sizes a graph is compiled anew.

Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

import sympy
from torch._subclasses.fake_tensor import FakeTensorMode


def hold(mode: FakeTensorMode, symbol: sympy.Symbol, lo: int, hi: int | None) -> None:
    """Restricts the graph traced under `mode` to lo ≤ symbol ≤ hi, which the size seen when tracing must satisfy."""
    shape_env = mode.shape_env
    if shape_env is None:
        raise ValueError(f"the graph has a symbolic size {symbol} and yet no symbols were traced")
    for bound in (sympy.Ge(symbol, lo), *(() if hi is None else (sympy.Le(symbol, hi),))):
        if not shape_env.evaluate_expr(bound):
            raise ValueError(f"the graph was traced with a size outside of {bound}")
