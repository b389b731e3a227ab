"""The ranges of sizes that a graph is compiled for.

A graph is compiled anew wherever one of its fusions changes its kernel. So all of them change at the same few sizes:
those at which the graph as a whole loses least against the best kernel of each fusion for each size. They do not depend
on the size that happened to be seen when tracing; so the graphs for all sizes are as many as there are ranges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import sympy

from . import select
from .cost.crossover import Curves, common, sizes
from .judge import MOST_RANGES
from .machine import Machine
from .match import Match
from .offers import Offer
from .rivals import Bounds, Rivals, is_sized_by_symbols, rivals


@dataclass(frozen=True)
class Ranges:
    """The ranges of each symbol that verdicts depend on, and what the report says of them."""

    of: Mapping[sympy.Symbol, Sequence[Bounds]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def ranges_of(
    matches: Sequence[Match], offered: Sequence[Sequence[Offer]], machine: Machine, whole: Collection[sympy.Symbol] = ()
) -> Ranges:
    """The common ranges of all matches of a graph: one of all sizes for the symbols in `whole`.

    What kernels cut apart depends on which of them are carried out, and is left out here.
    """
    if not any(is_sized_by_symbols(match.op) for match in matches):
        return Ranges()
    found = [rivals(m, offers, machine) for m, offers in zip(matches, offered, strict=True) if offers]
    spans: dict[sympy.Symbol, list[Bounds]] = {}
    notes = []
    for symbol in dict.fromkeys(r.symbol for r in found if r.symbol is not None):
        own = [r for r in found if r.symbol == symbol]
        lo, hi = own[0].looked_at
        edges, lost = common(_counted(found, symbol, sizes(lo, hi)), lo, hi, 1 if symbol in whole else MOST_RANGES)
        spans[symbol] = own[0].bounded(edges)
        if len(edges) > 1:
            told = ", ".join(_told(symbol, bounds) for bounds in spans[symbol])
            notes.append(
                f"sizes {symbol} are served by {len(edges)} graphs: {told}; a graph for each size is predicted "
                f"to save another {100 * lost:.1f} % of what Inductor takes for these places"
            )
    return Ranges(spans, tuple(notes))


def _told(symbol: sympy.Symbol, bounds: Bounds) -> str:
    lo, hi = bounds
    return f"{lo} ≤ {symbol}" + ("" if hi is None else f" ≤ {hi}")


def _counted(found: Sequence[Rivals], symbol: sympy.Symbol, points: Sequence[int]) -> dict[Curves, list[int]]:
    """How many places of each kind matter at each of the sizes: those that are fused or whose nodes no fusion takes.

    Which fusions stand together is asked once for sizes up to each power of two.
    """
    standing: dict[int, Counter[Curves]] = {}
    for size in points:
        if size.bit_length() not in standing:
            standing[size.bit_length()] = _standing(found, symbol, size)
    kinds = dict.fromkeys(r.curves for r in found if r.symbol == symbol)
    return {kind: [standing[size.bit_length()][kind] for size in points] for kind in kinds}


def _standing(found: Sequence[Rivals], symbol: sympy.Symbol, size: int) -> Counter[Curves]:
    items = []
    for r in found:
        number = r.best(size if r.symbol == symbol else r.traced)
        way = r.way(number)
        site = way.offer.site if way else r.match.site
        saving = r.saving(number, size if r.symbol == symbol else r.traced)
        items.append(select.Item(saving, frozenset(site.interior) - frozenset(site.escaping), output=site.output))
    winners = set(select.best(items))
    taken = {node for i in winners for node in (*items[i].exclusive, items[i].output)}
    return Counter(
        r.curves
        for i, r in enumerate(found)
        if r.symbol == symbol and (i in winners or r.match.site.output not in taken)
    )
