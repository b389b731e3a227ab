"""Guards on symbolic sizes (`ShapeEnv.evaluate_expr`): outside of its range of sizes a graph is compiled anew.

Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

import sympy
from torch._subclasses.fake_tensor import FakeTensorMode


def hold(mode: FakeTensorMode, symbol: sympy.Symbol, lo: int, hi: int | None) -> None:
    """Restricts the graph traced under `mode` to lo ≤ symbol ≤ hi, which the size seen when tracing must satisfy."""
    for bound in (sympy.Ge(symbol, lo), *(() if hi is None else (sympy.Le(symbol, hi),))):
        require(mode, bound)


def require(mode: FakeTensorMode, condition: sympy.Basic) -> None:
    """Restricts the graph traced under `mode` to sizes of which `condition` holds, as it must of those when tracing."""
    shape_env = mode.shape_env
    if shape_env is None:
        raise ValueError(f"the graph has symbolic sizes ({condition}) and yet no symbols were traced")
    if not shape_env.evaluate_expr(condition):
        raise ValueError(f"the graph was traced with a size outside of {condition}")
