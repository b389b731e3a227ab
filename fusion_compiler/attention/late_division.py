"""Probabilities divided by their sum only after they have met the values: (exp(x) · v) / Σ exp(x)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import Node

from . import axes
from .axes import View
from .contraction import Operand
from .softmax import Softmax, exponent_of, fraction, of_exponentials, sum_of, uncast

aten = torch.ops.aten


@dataclass(frozen=True)
class LateDivision:
    """`quotient` divides a view of a product with the `exponentials` by a view of their `total` along `dim`."""

    exponentials: Node
    total: Node
    dim: int
    quotient: Node

    def is_row_by_row(self, product: Node, probabilities: Operand, seen: View) -> bool:
        """Whether every row of the product is divided by its own total; `seen` is what the probabilities' operand of
        the product is of the exponentials."""
        rows = tuple(
            seen.dims[d] if d is not None else () if axes.same(n, axes.ONE) else (axes.repeat(n),)
            for d, n in zip(probabilities.dims, axes.shape_of(product), strict=True)
        )
        kept = list(View.of(self.exponentials).dims)
        kept[self.dim : self.dim + 1] = [()] if len(kept) == len(axes.shape_of(self.total)) else []
        top, bottom = cast("tuple[Node, Node]", fraction(self.quotient))
        above = _of(top, product, View(self.exponentials, rows, torch.float32))
        below = _of(bottom, self.total, View(self.exponentials, tuple(kept), torch.float32))
        if above is None or below is None:
            return False
        return above.dims == below.expand(axes.shape_of(self.quotient)).dims


def _of(node: Node, source: Node, seen: View) -> View | None:
    """`node`, a view of `source`, as a view of what `seen` is."""
    view = next((v for v in axes.trail(node, exact=False) if v.source is source), None)
    return view.through(seen) if view is not None else None


def divided_later(exponentials: Node) -> tuple[Softmax, LateDivision] | None:
    """The exponentials as a softmax whose division comes later, with that division."""
    if exponent_of(exponentials) is None:
        return None
    for total in exponentials.users:
        if total.target is not aten.sum.dim_IntList or sum_of(total) is not total:
            continue
        dim = cast("list[int]", total.args[1])[0] % len(axes.shape_of(exponentials))
        reached = list(total.users)
        while reached:
            user = reached.pop()
            parts = fraction(user)
            if parts is None and (axes.step(user) is not None or user.target is aten.reciprocal.default):
                reached += user.users
            if parts is not None and sum_of(parts[1]) is total and uncast(parts[0]) is not exponentials:
                found = of_exponentials(exponentials, dim, exponentials)
                return (found, LateDivision(exponentials, total, dim, user)) if found is not None else None
    return None
