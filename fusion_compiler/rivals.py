"""What can be done at one place of a graph: leaving the nodes to Inductor, or a candidate with what it leaves to
Inductor; and what each is predicted to take, by the size that ranges are solved in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import sympy
import torch
from torch.fx import Node

from .candidates import Amount, Candidate, Traffic
from .cost.amounts import fixed, is_symbolic
from .cost.baseline import Plan, inductor_plan
from .cost.crossover import FAR, Curves, cheapest, curves
from .fused import FusedOp, Site
from .machine import Machine
from .match import Match
from .offers import Offer
from .torch_private.symbols import range_of, traced_values

CLOSE = 0.25  # predictions that differ by less are worth a measurement
Bounds = tuple[int, int | None]  # sizes from, to; None: without end
Price = Callable[[Sequence[Node]], Plan]  # what Inductor makes of nodes, in graph order


@dataclass(frozen=True)
class Way:
    """A candidate at its alternative, with what stays for Inductor beside it."""

    offer: Offer
    candidate: Candidate
    rest: Plan
    measured: bool
    severed: Amount = 0.0

    @property
    def seconds(self) -> Amount:
        return self.candidate.seconds + self.rest.seconds + self.severed

    def priced(self) -> Amount:
        """The time at which the candidate counts: a prediction must win by its error, a measurement need not."""
        error: Amount = 0.0 if self.measured else self.candidate.error
        return self.candidate.seconds / (1 - error) + self.rest.seconds + self.severed

    @property
    def traffic(self) -> Traffic:
        return self.candidate.traffic + self.rest.traffic


@dataclass(frozen=True)
class Rivals:
    """The ways of carrying out a match. Number 0 is Inductor, which takes `before`; then come `ways`.

    `symbol` is the size that ranges are solved in, None where nothing depends on one; `sizes` are those of all symbols
    when tracing. `measured` tells whether Inductor's times are.
    """

    match: Match
    offers: Sequence[Offer]
    before: Plan
    ways: tuple[Way, ...]
    sizes: Mapping[sympy.Symbol, int]
    symbol: sympy.Symbol | None
    measured: bool

    @property
    def traced(self) -> int | None:
        """The size when tracing."""
        return None if self.symbol is None else self.sizes.get(self.symbol)

    @functools.cached_property
    def bounds(self) -> Bounds:
        """Sizes that the symbol may have."""
        assert self.symbol is not None, "only a symbol has bounds"
        return range_of(_size_with(self.match.op, self.symbol), self.symbol)

    @property
    def looked_at(self) -> tuple[int, int]:
        """The sizes for which times are predicted: nothing is computed for size 0, and some have no end."""
        begin, end = self.bounds
        lo = max(begin, 1)
        return lo, FAR if end is None else max(lo, min(end, FAR))

    @functools.cached_property
    def curves(self) -> Curves:
        """The ways by the size of the symbol."""
        assert self.symbol is not None, "only a symbol has curves"
        costs, times, valid = self._amounts
        return curves(costs, times, valid, self.symbol)

    def way(self, number: int) -> Way | None:
        return self.ways[number - 1] if number else None

    def best(self, size: int | None) -> int:
        """The way that is cheapest for a size of the symbol."""
        if self.symbol is not None and size is not None:
            return self.curves.best(size)
        costs, _, valid = self._amounts
        usable = [i for i, ok in enumerate(valid) if ok in (True, sympy.true)]
        return min(usable, key=lambda i: float(costs[i]))

    def saving(self, number: int, size: int | None) -> float:
        """What a way is predicted to save against Inductor for a size of the symbol."""
        if number == 0:
            return 0.0
        if self.symbol is not None and size is not None:
            return self.curves.time[0](size) - self.curves.time[number](size)
        _, times, _ = self._amounts
        return float(times[0]) - float(times[number])

    def favouring(self, number: int) -> list[tuple[Bounds, int]]:
        """Who would win where if one way were CLOSE cheaper."""
        assert self.symbol is not None, "only a symbol has ranges"
        costs, times, valid = self._amounts
        favoured = tuple(
            t / (1 + CLOSE) if i == number else c for i, (c, t) in enumerate(zip(costs, times, strict=True))
        )
        spans = cheapest(favoured, self.symbol, *self.looked_at, valid)
        return [(b, s.winner) for b, s in zip(self.bounded([(s.lo, s.hi) for s in spans]), spans, strict=True)]

    def bounded(self, spans: Sequence[tuple[int, int]]) -> list[Bounds]:
        """`spans` of the sizes that are looked at, the first and the last of them as far as sizes go."""
        begin, end = self.bounds
        last = len(spans) - 1
        return [(lo if i else begin, hi if i < last else end) for i, (lo, hi) in enumerate(spans)]

    @functools.cached_property
    def _amounts(self) -> tuple[tuple[Amount, ...], tuple[Amount, ...], tuple[bool | sympy.Basic, ...]]:
        """At what each way counts, what it takes and where it may be used, in terms of the symbol alone."""
        # sizes that were equal when tracing (queries and keys) are taken to vary together, the others to stay
        symbol = self.symbol
        stay = {s: symbol if symbol and v == self.traced else v for s, v in self.sizes.items() if s != symbol}
        before = fixed(self.before.seconds, stay)
        return (
            (before, *(fixed(w.priced(), stay) for w in self.ways)),
            (before, *(fixed(w.seconds, stay) for w in self.ways)),
            (True, *(fixed(w.candidate.valid, stay) for w in self.ways)),
        )


def rivals(match: Match, offers: Sequence[Offer], machine: Machine, price: Price | None = None) -> Rivals:
    """`offers` holds the match itself and its alternatives, in any order.

    `price` tells what Inductor makes of a set of nodes; it is predicted where not given, otherwise measured.
    """
    measured = price is not None
    price = price or (lambda nodes: inductor_plan(nodes, machine))
    prologue = set(match.prologue)
    everything = sorted({n for o in offers for n in replaced(o.site)} - prologue)
    norm = price(match.prologue).share(match.prologue_share)
    before = price(everything) + norm
    ways: list[Way] = []
    for o in (o for o in offers if o.candidates):
        folds = bool(prologue) and match.prologue[-1] in o.site.interior
        gone = set(replaced(o.site))
        rest = price([n for n in everything if n not in gone]) + (Plan(()) if folds else norm)
        ways += [Way(o, c, rest, bool(dict(c.details).get("measured")), match.severed) for c in o.candidates]
    symbol = _symbol(match.op, [before.seconds, *(w.seconds for w in ways)])
    return Rivals(match, offers, before, tuple(ways), _traced(match), symbol, measured)


# ---- nodes --------------------------------------------------------------------------------------
def replaced(site: Site) -> list[Node]:
    """The nodes that die with the site's output, in graph order: nothing else reads them."""
    gone = set(site.outputs)
    for node in sorted(site.interior, reverse=True):
        if node.users and all(user in gone for user in node.users):
            gone.add(node)
    return sorted(gone)


# ---- symbols ------------------------------------------------------------------------------------
def _symints(op: FusedOp) -> list[torch.SymInt]:
    attributes = [getattr(op, f.name) for f in fields(op)]
    values = [v for a in attributes for v in (a if isinstance(a, tuple) else (a,))]
    return [v for v in values if isinstance(v, torch.SymInt) and is_symbolic(v.node.expr)]


def is_sized_by_symbols(op: FusedOp) -> bool:
    """Whether a fused op has sizes that are symbolic."""
    return bool(_symints(op))


def _traced(match: Match) -> dict[sympy.Symbol, int]:
    """The sizes of the fused op, and of a result whose features are as many as a symbol says."""
    shapes = (node.meta["val"].shape for node in match.site.outputs)
    sizes = [*_symints(match.op), *(size for shape in shapes for size in shape if isinstance(size, torch.SymInt))]
    found: dict[sympy.Symbol, int] = {}
    for size in sizes:
        found |= traced_values(size)
    return found


def _size_with(op: FusedOp, symbol: sympy.Symbol) -> torch.SymInt:
    return next(s for s in _symints(op) if symbol in s.node.expr.free_symbols)


def _symbol(op: FusedOp, costs: Iterable[Amount]) -> sympy.Symbol | None:
    """The size that ranges are solved in: the first of the fused op's that the costs depend on."""
    free = {s for c in costs if isinstance(c, sympy.Basic) for s in c.free_symbols}
    ordered = [s for size in _symints(op) for s in sorted(size.node.expr.free_symbols, key=str)]
    return next((s for s in ordered if s in free), None)
