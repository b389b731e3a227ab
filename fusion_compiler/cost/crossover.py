"""Which of several ways is cheapest, as a function of one symbolic size, and over which ranges of it several places
of a graph do well together.

Costs are piecewise: between two sizes at which different ways win, the boundary is found exactly by bisection on the
integers. Sizes to start from are every small one and a geometric sequence, so a way that wins only on an interval
narrower than 1/16 of its position, beyond 64, may go unseen; that costs time there, never correctness.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import sympy

from ..candidates import Amount
from .amounts import FUNCTIONS, Condition, compiled

FAR = 2**20  # a size without bound is looked at up to here; the last range then goes on for ever
SINGLE = 64  # every size up to here is looked at
WORTH = 1e-3  # of the time at an average size: what one more range has to save
_HARM = 1e6  # dearer than any loss of time


@dataclass(frozen=True)
class Span:
    """Way number `winner` is cheapest for lo ≤ size ≤ hi."""

    lo: int
    hi: int
    winner: int


@dataclass(frozen=True, eq=False)
class Curves:
    """Ways of computing one thing, by size. Way 0, which may be used anywhere, is what the others compete with.

    `cost` is the time at which a way counts, without end where it may not be used; `time` is what it is predicted to
    take, which is less where a prediction has to win by its error.
    """

    cost: tuple[Callable[[int], float], ...]
    time: tuple[Callable[[int], float], ...]

    def best(self, size: int) -> int:
        """The cheapest way; on a tie the first."""
        values = [f(size) for f in self.cost]
        return min(range(len(values)), key=values.__getitem__)

    def harmful(self, way: int, size: int) -> bool:
        """Whether a way may not be used, or is predicted to lose against way 0."""
        return way != 0 and (math.isinf(self.cost[way](size)) or self.time[way](size) > self.time[0](size))

    def over(self, lo: int, hi: int) -> int:
        """The way that loses least against the best of each size, among those that are harmful at none of them."""
        points = sizes(lo, hi)
        ways = [w for w in range(len(self.cost)) if not any(self.harmful(w, p) for p in points)]
        whole = [self.cost[0](p) for p in points]
        steps = _steps(points)

        def loss(way: int) -> float:
            return sum(s * self.cost[way](p) / w for s, p, w in zip(steps, points, whole, strict=True) if w)

        return min(ways, key=loss)


@functools.lru_cache(maxsize=128)  # the layers of a model have the same
def curves(
    costs: tuple[Amount, ...], times: tuple[Amount, ...], valid: tuple[Condition, ...], symbol: sympy.Symbol
) -> Curves:
    known = functools.cache  # each size is asked for again and again
    return Curves(tuple(map(known, _costs(costs, symbol, valid))), tuple(known(compiled(t, symbol)) for t in times))


def crossovers(cost_a: Amount, cost_b: Amount, symbol: sympy.Symbol, lo: int, hi: int) -> list[tuple[int, int, str]]:
    """(lo, hi, "a" or "b") in order, covering [lo, hi]; on a tie "a"."""
    return [(s.lo, s.hi, "ab"[s.winner]) for s in cheapest([cost_a, cost_b], symbol, lo, hi)]


def cheapest(
    costs: Sequence[Amount], symbol: sympy.Symbol, lo: int, hi: int, valid: Sequence[Condition] | None = None
) -> list[Span]:
    """Spans of sizes and the cheapest way for each; on a tie the first given.

    `valid[i]` says where way i may be used at all.
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
    start, current = lo, winner(lo)
    for left, right in itertools.pairwise(sizes(lo, hi)):
        while winner(right) != current:
            edge = _last(lambda size: winner(size) == current, max(left, start), right)  # noqa: B023
            spans.append(Span(start, edge, current))
            start = edge + 1
            current = winner(start)
    spans.append(Span(start, hi, current))
    return spans


def common(
    places: Mapping[Curves, Sequence[int]], lo: int, hi: int, at_most: int
) -> tuple[list[tuple[int, int]], float]:
    """At most so many ranges (from, to) over lo … hi, at whose ends all places change their ways together, and what is
    lost then against the best way of each place at each size: a share of the time of way 0, for a size at random among
    orders of magnitude. `places` tells how many there are of each kind, for each of `sizes(lo, hi)`.

    In a range every place takes one way that is harmful at none of its sizes. The ranges are those that lose least.
    """
    points = sizes(lo, hi)
    loss = _losses(places, points)
    for i, row in enumerate(loss if len(points) > 1 else ()):
        row[i + 1] += _HARM  # of one size torch makes a static graph
    count, whole = len(points), sum(_steps(points))
    # by dynamic programming: the least loss up to each point with so many ranges, and where the last of them begins
    found: list[list[tuple[float, int]]] = [[(loss[0][j], 0) for j in range(count + 1)]]
    for _ in range(at_most - 1):
        least = [before[0] for before in found[-1]]
        last = [(0.0, 0)]
        for j in range(1, count + 1):
            begin = min(range(j), key=lambda i: (least[i] + loss[i][j], -i))  # noqa: B023
            last.append((least[begin] + loss[begin][j], begin))
        found.append(last)
    ranges = min(range(len(found)), key=lambda n: found[n][count][0] + n * WORTH * whole)
    begins, end = list[int](), count
    for n in reversed(range(ranges + 1)):
        end = found[n][end][1]
        begins.insert(0, end)
    edges = [lo]
    for before, begin, after in zip(begins, begins[1:], [*begins[2:], count], strict=False):
        edges.append(_edge(places, points, before, begin, after) + 1)
    return list(zip(edges, [*(e - 1 for e in edges[1:]), hi], strict=True)), found[ranges][count][0] / whole


def sizes(lo: int, hi: int) -> list[int]:
    """The sizes that are looked at between two, which are the first and the last of them."""
    points, size = [lo], 1
    while size < hi:
        if size > lo:
            points.append(size)
        size += max(1, size // 16) if size >= SINGLE else 1
    return [*points, hi] if hi > lo else points


def _steps(points: Sequence[int]) -> list[float]:
    """What each of the points counts: its distance to the next in orders of magnitude."""
    return [math.log(following / point) for point, following in itertools.pairwise([*points, 2 * points[-1]])]


def _losses(places: Mapping[Curves, Sequence[int]], points: Sequence[int]) -> list[list[float]]:
    """[i][j]: what is lost over the points from the i-th to before the j-th if no place changes its way there."""
    best = {c: [c.cost[c.best(p)](p) for p in points] for c in places}
    whole = [sum(n[i] * c.cost[0](p) for c, n in places.items()) for i, p in enumerate(points)]
    shares = [step / total if total else 0.0 for step, total in zip(_steps(points), whole, strict=True)]
    table = [[0.0] * (len(points) + 1) for _ in points]
    for c, counts in places.items():
        until = []
        for way in range(len(c.cost)):
            single = (
                _HARM if n and c.harmful(way, p) else n and n * share * (c.cost[way](p) - least)
                for p, n, share, least in zip(points, counts, shares, best[c], strict=True)
            )
            until.append(list(itertools.accumulate(single, initial=0.0)))
        for i, row in enumerate(table):
            own = [[loss - u[i] for loss in u[i:]] for u in until]
            row[i:] = map(operator.add, row[i:], own[0] if len(own) == 1 else map(min, *own))
    return table


def _edge(places: Mapping[Curves, Sequence[int]], points: Sequence[int], before: int, begin: int, after: int) -> int:
    """The last size of the points from `before` on where those from `begin` on follow: exactly where their ways change
    places, between two points."""
    here = {c: n[begin - 1] for c, n in places.items() if n[begin - 1]}
    left = {c: c.over(points[before], points[begin - 1]) for c in here}
    right = {c: c.over(points[begin], points[after - 1]) for c in here}

    def price(ways: Mapping[Curves, int], size: int) -> tuple[int, float]:
        harm = sum(c.harmful(way, size) for c, way in ways.items())
        return harm, sum(here[c] * c.cost[way](size) for c, way in ways.items() if not c.harmful(way, size))

    return _last(lambda size: price(left, size) <= price(right, size), points[begin - 1], points[begin])


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


def _last(holds: Callable[[int], bool], left: int, right: int) -> int:
    """The last size of those from `left` on of which something holds that has ended at `right`."""
    while right - left > 1:
        middle = (left + right) // 2
        left, right = (middle, right) if holds(middle) else (left, middle)
    return left
