"""Whether a fusion pays: the cheapest of what the lowerings offer and of leaving the nodes to Inductor.

A prediction is trusted only beyond its error: a candidate must be predicted to need less than (1 − error) of the time
that Inductor needs for the nodes it replaces. With a symbolic size the verdict is a list of ranges, in none of which a
candidate is taken that is predicted to lose against Inductor for some size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import sympy
from torch.fx import Node

from .candidates import MARGIN, Candidate
from .cost.amounts import at
from .cost.amounts import fixed as fixed_at
from .cost.crossover import common, sizes
from .cost.roofline import matmul_facts
from .fused import FusedOp, MatmulFamily, Site, StoredAttention
from .machine import Machine
from .match import Match
from .offers import Offer
from .reasons import FEW_RANGES, UNGUARDED, fused_reason, in_front_reason, kept_reason
from .report import Decision, Option, Range, Verdict, Work, where
from .rivals import Bounds, Price, Rivals, Way, replaced, rivals

MOST_RANGES = 3
INDUCTOR = "inductor"


@dataclass(frozen=True)
class Choice:
    """What to do for lo ≤ size ≤ hi (None: without end). `candidate` is None where the nodes stay with Inductor."""

    lo: int
    hi: int | None
    op: FusedOp
    site: Site
    candidate: Candidate | None


@dataclass(frozen=True)
class Judgement:
    """The decision for the report, and the candidate to emit for each range of `symbol` (one choice where none).
    `winner` is the number of the way that won for the size seen when tracing: 0 is Inductor."""

    rivals: Rivals
    decision: Decision
    choices: tuple[Choice, ...]
    winner: int = 0

    @property
    def match(self) -> Match:
        return self.rivals.match

    @property
    def symbol(self) -> sympy.Symbol | None:
        return self.rivals.symbol

    @property
    def traced(self) -> int | None:
        """Size of the symbol when tracing."""
        return self.rivals.traced

    @property
    def sizes(self) -> Mapping[sympy.Symbol, int]:
        """Of all symbols when tracing."""
        return self.rivals.sizes

    @property
    def saving(self) -> float:
        """Predicted seconds saved at the size seen when tracing."""
        return self.decision.saving

    def choice(self, size: int | None = None) -> Choice:
        """The choice for a size; by default for the one seen when tracing."""
        wanted = self.traced if size is None else size
        if wanted is None:
            return self.choices[0]
        return next(c for c in self.choices if c.lo <= wanted and (c.hi is None or wanted <= c.hi))

    def where_traced(self, measured: Judgement) -> Judgement:
        """`measured`, which is of the traced size alone, for the sizes around it that it can speak for: where the way
        that won there is predicted to be nearly the cheapest, within the range that was solved for; this one elsewhere.
        """
        if self.symbol is None or self.traced is None:
            return measured
        here, won, near = self.choice(), measured.choices[0], self._near(measured.winner)
        if near is None:
            return self
        lo, hi = near
        lo, hi = max(lo, here.lo), here.hi if hi is None else hi if here.hi is None else min(hi, here.hi)
        if lo == hi:  # of one size torch makes a static graph
            return self
        choices: list[Choice] = []
        ranges: list[Range] = []
        for choice, told in zip(self.choices, self.decision.ranges, strict=True):
            if choice is not here:
                choices.append(choice)
                ranges.append(told)
                continue
            parts = [(choice.lo, lo - 1, choice, told), (lo, hi, won, measured._told(told.symbol))]
            parts += [] if hi is None else [(hi + 1, choice.hi, choice, told)]
            for first, last, made, range_ in parts:
                if last is None or first <= last:
                    choices.append(dataclasses.replace(made, lo=first, hi=last))
                    ranges.append(dataclasses.replace(range_, lo=first, hi=last))
        decision = dataclasses.replace(measured.decision, ranges=tuple(ranges))
        return dataclasses.replace(self, decision=decision, choices=tuple(choices))

    def _near(self, winner: int) -> Bounds | None:
        """The sizes around the traced one for which the winner is predicted to be nearly the cheapest."""
        at = self.traced or 0
        spans = self.rivals.favouring(winner)
        found = ((lo, hi) for (lo, hi), w in spans if lo <= at and (hi is None or at <= hi) and w == winner)
        return next(found, None)

    def _told(self, symbol: str) -> Range:
        candidate = self.choices[0].candidate
        name = candidate.name if candidate else INDUCTOR
        return Range(symbol, 0, None, self.decision.verdict, name, self.decision.reason)


def judge(
    match: Match,
    offers: Sequence[Offer],
    machine: Machine,
    *,
    price: Price | None = None,
    ranges: Mapping[sympy.Symbol, Sequence[Bounds]] | None = None,
    whole: Collection[sympy.Symbol] = (),
) -> Judgement:
    """The verdict on one match. `offers` holds the match itself and its alternatives, in any order.

    `price` tells what Inductor makes of a set of nodes; it is predicted where not given, otherwise measured. `ranges`
    are those of the match's graph; without them it gets at most MOST_RANGES of its own, or one for a symbol in `whole`,
    of which the graph has to serve all sizes.
    """
    found = rivals(match, offers, machine, price)
    context = _Context(found, machine, found.symbol in whole)
    if found.symbol is None:
        spans: list[tuple[Bounds, int]] = [((0, None), found.best(None))]
    else:
        own = (ranges or {}).get(found.symbol) or _own_ranges(found, 1 if found.symbol in whole else MOST_RANGES)
        spans = _merged([(bounds, _over(found, bounds)) for bounds in own])
    traced = found.traced
    won = next(w for (lo, hi), w in spans if traced is None or (lo <= traced and (hi is None or traced <= hi)))
    told = () if found.symbol is None else tuple(context.range(found.symbol, *b, found.way(w)) for b, w in spans)
    choices = (_choice(found, *span) for span in spans)
    return Judgement(found, context.decision(found.way(won), told), tuple(choices), won)


def _own_ranges(found: Rivals, at_most: int) -> list[Bounds]:
    lo, hi = found.looked_at
    return found.bounded(common({found.curves: [1] * len(sizes(lo, hi))}, lo, hi, at_most)[0])


def _over(found: Rivals, bounds: Bounds) -> int:
    lo, hi = found.looked_at
    return found.curves.over(max(bounds[0], lo), hi if bounds[1] is None else min(bounds[1], hi))


def _merged(spans: Sequence[tuple[Bounds, int]]) -> list[tuple[Bounds, int]]:
    """Neighbours with the same way as one."""
    merged = list(spans[:1])
    for (lo, hi), way in spans[1:]:
        (begin, _), before = merged[-1]
        if way == before:
            merged[-1] = (begin, hi), way
        else:
            merged.append(((lo, hi), way))
    return merged


def _choice(found: Rivals, bounds: Bounds, number: int) -> Choice:
    way = found.way(number)
    if way is None:
        return Choice(*bounds, found.match.op, found.match.site, None)
    return Choice(*bounds, way.offer.op, way.offer.site, way.candidate)


# ---- the report ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Context:
    rivals: Rivals
    machine: Machine
    whole: bool  # whether one verdict has to serve all sizes

    def decision(self, way: Way | None, ranges: tuple[Range, ...]) -> Decision:
        before = Work.of(self.rivals.before.traffic, self.rivals.before.seconds, self.rivals.sizes)
        after = Work.of(way.traffic, way.seconds, self.rivals.sizes) if way else None
        return Decision(
            pattern=self.rivals.match.pattern,
            verdict="fused" if way else "kept",
            reason=self._reason(way, self.rivals.sizes),
            where=where(self.rivals.match.site.output),
            before=before,
            after=after,
            candidates=self._options(before),
            kernel=way.candidate.kernel if way else "",
            ranges=ranges,
            node=self.rivals.match.site.output.name,
            nodes=tuple(n.name for n in self._concerned(way)),
            details=(way.candidate.details if way else ()) + self._facts(),
        )

    def _concerned(self, way: Way | None) -> list[Node]:
        """The nodes that are replaced, or would be, with those of a norm that is folded in, whoever else reads it."""
        site = way.offer.site if way else self.rivals.match.site
        folded = [n for n in self.rivals.match.prologue if n in site.interior]
        return sorted({*replaced(site), *folded})

    def _facts(self) -> tuple[tuple[str, float], ...]:
        op = self.rivals.match.op
        return matmul_facts(op, self.rivals.sizes) if isinstance(op, MatmulFamily) else ()

    def range(self, symbol: sympy.Symbol, lo: int, hi: int | None, way: Way | None) -> Range:
        """The reason is given for one size of the range: its middle (geometric, as sizes are)."""
        verdict: Verdict = "fused" if way else "kept"
        middle = lo if hi is None else math.isqrt(max(lo, 1) * hi)
        sizes = {s: middle if v == self.rivals.sizes[symbol] else v for s, v in self.rivals.sizes.items()}
        name = way.candidate.name if way else INDUCTOR
        return Range(str(symbol), lo, hi, verdict, name, self._reason(way, sizes))

    def _reason(self, way: Way | None, sizes: Mapping[sympy.Symbol, int]) -> str:
        before = Work.of(self.rivals.before.traffic, self.rivals.before.seconds, sizes)
        if way is not None:
            after = Work.of(way.traffic, way.seconds, sizes)
            return fused_reason(self.rivals.match.op, before, after, way.measured) + self._in_front(way, after, sizes)
        usable = self._usable(sizes)
        best = min(usable, key=lambda w: at(w.seconds, sizes), default=None)
        unavailable = [u.reason for o in self.rivals.offers for _, u in o.unavailable]
        invalid = [w.candidate for w in self.rivals.ways if w not in usable]
        closest = None if best is None else (best.candidate.name, Work.of(best.traffic, best.seconds, sizes))
        measured = (best is not None and best.measured, self.rivals.measured)
        severed = best is not None and at(best.severed, sizes) > 0
        return kept_reason(
            self.rivals.match.op, self.machine, self.rivals.before, before, closest, unavailable, invalid, measured,
            error=at(best.candidate.error, sizes) if best else MARGIN, severed=severed,
            given_up=UNGUARDED if self.whole else FEW_RANGES,
        )  # fmt: skip

    def _usable(self, sizes: Mapping[sympy.Symbol, int]) -> list[Way]:
        return [w for w in self.rivals.ways if fixed_at(w.candidate.valid, sizes) in (True, sympy.true)]

    def _in_front(self, way: Way, after: Work, sizes: Mapping[sympy.Symbol, int]) -> str:
        """Why what is stored is not read as it is by the kernel that won, where that might be."""
        stored = [o for o in self.rivals.offers if isinstance(o.op, StoredAttention)]
        if not stored or isinstance(way.offer.op, StoredAttention):
            return ""
        reading = [w for w in self._usable(sizes) if isinstance(w.offer.op, StoredAttention)]
        best = min(reading, key=lambda w: at(w.seconds, sizes), default=None)
        closest = None if best is None else (best.candidate.kernel, Work.of(best.traffic, best.seconds, sizes))
        return in_front_reason(after, closest, [u.reason for o in stored for _, u in o.unavailable])

    def _options(self, before: Work) -> tuple[Option, ...]:
        known = (("measured", True),) if self.rivals.measured else ()
        listed = [Option(INDUCTOR, "left to Inductor", before, details=known)]
        for way in self.rivals.ways:
            c = way.candidate
            work = Work.of(way.traffic, way.seconds, self.rivals.sizes)
            valid = "always" if c.valid in (True, sympy.true) else str(c.valid)
            listed.append(Option(c.name, c.kernel, work, valid, details=c.details))
        for o in self.rivals.offers:
            listed += [Option(name, reason=u.reason) for name, u in o.unavailable]
        return tuple(listed)
