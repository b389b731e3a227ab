"""Guards on symbolic sizes (`ShapeEnv.evaluate_expr`): outside of its range of sizes a graph is compiled anew.

Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

import sympy
import torch
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


def implied(mode: FakeTensorMode, condition: sympy.Basic) -> bool:
    """Whether a condition holds for all sizes that the graph traced under `mode` may have."""
    from torch.utils._sympy.value_ranges import bound_sympy

    shape_env = mode.shape_env
    return shape_env is not None and bound_sympy(condition, shape_env.var_to_range).lower == sympy.true


def promised(mode: FakeTensorMode) -> set[sympy.Symbol]:
    """The symbols for which the user named the least and the greatest size (`mark_dynamic` with `min` or `max`,
    `torch.export.Dim`): a graph that does not serve all of these is an error."""
    from torch.fx.experimental.symbolic_shapes import StrictMinMaxConstraint

    found: set[sympy.Symbol] = set()
    for tracked in getattr(mode.shape_env, "tracked_fakes", None) or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None)
        if not isinstance(tracked.fake, torch.Tensor) or constraints is None:
            continue
        for size, constraint in zip(tracked.fake.shape, constraints, strict=True):
            if isinstance(size, torch.SymInt) and isinstance(constraint, StrictMinMaxConstraint):
                found |= size.node.expr.free_symbols
    return found


def symbols(mode: FakeTensorMode) -> set[sympy.Symbol]:
    """All symbols of the graph traced under `mode`."""
    return set(mode.shape_env.var_to_range) if mode.shape_env is not None else set()
