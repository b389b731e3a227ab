"""Which of several ways is cheapest, as a function of one symbolic size.

Costs are piecewise: between two sizes at which different ways win, the boundary is found exactly by bisection on the
integers. Sizes to start from are every small one and a geometric sequence, so a way that wins only on an interval
narrower than 1/16 of its position, beyond 64, may go unseen; that costs time there, never correctness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy

from ..candidates import Amount
from .amounts import Condition, compiled

FAR = 2**20  # a size without bound is looked at up to here; the last range then goes on for ever


@dataclass(frozen=True)
class Span:
    """Way number `winner` is cheapest for lo ≤ size ≤ hi."""

    lo: int
    hi: int
    winner: int


def crossovers(cost_a: Amount, cost_b: Amount, symbol: sympy.Symbol, lo: int, hi: int) -> list[tuple[int, int, str]]:
    """(lo, hi, "a" or "b") in order, covering [lo, hi]; on a tie "a"."""
    return [(s.lo, s.hi, "ab"[s.winner]) for s in cheapest([cost_a, cost_b], symbol, lo, hi)]


def cheapest(
    costs: Sequence[Amount],
    symbol: sympy.Symbol,
    lo: int,
    hi: int,
    valid: Sequence[Condition] | None = None,
    at_most: int | None = None,
) -> list[Span]:
    """Spans of sizes and the cheapest way for each; on a tie the first given.

    `valid[i]` says where way i may be used at all. With `at_most`, spans are given to a neighbour's way until so few
    are left, the least loss first.
    """
    if lo > hi:
        raise ValueError(f"no size between {lo} and {hi}")
    cost = _costs(costs, symbol, valid)

    def winner(size: int) -> int:
        values = [f(size) for f in cost]
        best = min(range(len(values)), key=values.__getitem__)
        if math.isinf(values[best]):
            raise ValueError(f"no way is valid where {symbol} = {size}")
        return best

    spans: list[Span] = []
    points = _points(lo, hi)
    start, current = lo, winner(lo)
    for left, right in zip(points, points[1:], strict=False):
        while winner(right) != current:
            edge = _edge(winner, max(left, start), right, current)
            spans.append(Span(start, edge, current))
            start = edge + 1
            current = winner(start)
    spans.append(Span(start, hi, current))
    while at_most is not None and len(spans) > at_most:
        spans = _merged(spans, cost)
    return spans


def _costs(
    costs: Sequence[Amount], symbol: sympy.Symbol, valid: Sequence[Condition] | None
) -> list[Callable[[int], float]]:
    functions = [compiled(c, symbol) for c in costs]
    allowed = [_allowed(v, symbol) for v in (valid or [True] * len(costs))]

    def guarded(f: Callable[[int], float], ok: Callable[[int], bool]) -> Callable[[int], float]:
        return lambda size: f(size) if ok(size) else math.inf

    return [guarded(f, ok) for f, ok in zip(functions, allowed, strict=True)]


def _allowed(condition: Condition, symbol: sympy.Symbol) -> Callable[[int], bool]:
    if not isinstance(condition, sympy.Basic):
        return lambda _: bool(condition)
    function = sympy.lambdify([symbol], condition, modules="math")
    return lambda size: bool(function(size))


def _points(lo: int, hi: int) -> list[int]:
    points = list(range(lo, min(hi, lo + 64) + 1))
    while points[-1] < hi:
        points.append(min(hi, points[-1] + max(1, points[-1] // 16)))
    return points


def _edge(winner: Callable[[int], int], left: int, right: int, current: int) -> int:
    """The last size of a run of `current` that begins at `left` and has ended at `right`."""
    while right - left > 1:
        middle = (left + right) // 2
        left, right = (middle, right) if winner(middle) == current else (left, middle)
    return left


def _merged(spans: list[Span], cost: Sequence[Callable[[int], float]]) -> list[Span]:
    """`spans` with the one given to a neighbour's way whose loss, relative to its cost, is least."""

    def loss(span: Span, way: int) -> float:
        sizes = {span.lo, (span.lo + span.hi) // 2, span.hi}
        return max(cost[way](size) / cost[span.winner](size) for size in sizes)

    options = [
        (loss(spans[i], spans[j].winner), i, spans[j].winner)
        for i in range(len(spans))
        for j in (i - 1, i + 1)
        if 0 <= j < len(spans)
    ]
    _, given, way = min(options)
    joined: list[Span] = []
    for i, span in enumerate(spans):
        taker = way if i == given else span.winner
        if joined and joined[-1].winner == taker:
            joined[-1] = Span(joined[-1].lo, span.hi, taker)
        else:
            joined.append(Span(span.lo, span.hi, taker))
    return joined
