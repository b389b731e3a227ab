"""Which of several ways is cheapest, as a function of one symbolic size.

Costs are piecewise: between two sizes at which different ways win, the boundary is found exactly by bisection on the
integers. Sizes to start from are every small one and a geometric sequence, so a way that wins only on an interval
narrower than 1/16 of its position, beyond 64, may go unseen; that costs time there, never correctness.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy

from ..candidates import Amount
from .amounts import FUNCTIONS, Condition, compiled

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

    `valid[i]` says where way i may be used at all. With `at_most`, there are at most so many spans, those that lose the
    least against the best; a way may serve for being second best over a long span.
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
    return spans if at_most is None or len(spans) <= at_most else _fewest(points, cost, at_most)


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
    function = sympy.lambdify([symbol], condition, modules=FUNCTIONS)
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


def _fewest(points: Sequence[int], cost: Sequence[Callable[[int], float]], at_most: int) -> list[Span]:
    """At most so many spans over the points, with the least loss: by how much their ways are dearer than the best. A
    point counts by its distance to the next in orders of magnitude.

    Dynamic programming: for each number of spans and way of the last, the least loss so far and where ways begin.
    """
    ways = range(len(cost))
    never: tuple[float, tuple[tuple[int, int], ...]] = (math.inf, ())
    states = [[(0.0, ((0, way),)) if n == 0 else never for way in ways] for n in range(at_most)]
    for i, (point, following) in enumerate(itertools.pairwise([*points, 2 * points[-1]])):
        values = [f(point) for f in cost]
        losses = [math.log(following / point) * (value / min(values) - 1) for value in values]
        for n in reversed(range(at_most)):
            loss, begun = min(states[n - 1]) if n else never
            changed = [(loss, (*begun, (i, way))) for way in ways]
            better = [min(pair) for pair in zip(states[n], changed, strict=True)]
            states[n] = [(loss + own, begun) for (loss, begun), own in zip(better, losses, strict=True)]
    _, begun = min(min(state) for state in states)
    spans, start = list[Span](), points[0]
    for (_, way), (i, other) in itertools.pairwise(begun):
        # exactly where the two change places, between two points
        end = _edge(lambda size: 0 if cost[way](size) <= cost[other](size) else 1, points[i - 1], points[i], 0)  # noqa: B023
        spans.append(Span(start, end, way))
        start = end + 1
    return [*spans, Span(start, points[-1], begun[-1][1])]
