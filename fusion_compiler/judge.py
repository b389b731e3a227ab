"""Whether a fusion pays: the cheapest of what the lowerings offer and of leaving the nodes to Inductor.

A prediction is trusted only beyond its error: a candidate must be predicted to need less than (1 − error) of the time
that Inductor needs for the nodes it replaces. With a symbolic size the verdict is a list of ranges.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import sympy
import torch
from torch.fx import Node

from .candidates import MARGIN, Amount, Candidate, Lowering, Traffic, Unavailable
from .cost.amounts import at, is_symbolic
from .cost.amounts import fixed as fixed_at
from .cost.baseline import Plan, inductor_plan
from .cost.crossover import FAR, cheapest
from .cost.roofline import matmul_facts
from .fused import FusedOp, MatmulFamily, Site
from .machine import Machine
from .match import Match
from .reasons import fused_reason, kept_reason
from .report import Decision, Option, Range, Verdict, Work, where
from .torch_private.symbols import range_of, traced_values

MOST_RANGES = 3
CLOSE = 0.25  # predictions that differ by less are worth a measurement
INDUCTOR = "inductor"
_Values = Mapping[sympy.Symbol, int | sympy.Symbol]
_Span = tuple[int, int | None, int]  # from, to, number of the way that wins: 0 is Inductor
Price = Callable[[Sequence[Node]], Plan]  # what Inductor makes of nodes, in graph order


@dataclass(frozen=True)
class Offer:
    """What the lowerings have for one alternative of a match. `unavailable` says, by lowering, why there is nothing;
    a legality refusal of the alternative belongs there too."""

    op: FusedOp
    site: Site
    candidates: tuple[Candidate, ...] = ()
    unavailable: tuple[tuple[str, Unavailable], ...] = ()


def offer(op: FusedOp, site: Site, machine: Machine, lowerings: Iterable[Lowering]) -> Offer:
    """Asks every lowering."""
    candidates: list[Candidate] = []
    unavailable: list[tuple[str, Unavailable]] = []
    for lowering in lowerings:
        found = lowering.candidates(op, machine)
        if isinstance(found, Unavailable):
            unavailable.append((lowering.name, found))
        else:
            candidates.extend(found)
    return Offer(op, site, tuple(candidates), tuple(unavailable))


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
    """The decision for the report, and the candidate to emit for each range of `symbol` (one choice where none)."""

    match: Match
    decision: Decision
    choices: tuple[Choice, ...]
    symbol: sympy.Symbol | None = None
    traced: int | None = None  # size of the symbol when tracing
    sizes: Mapping[sympy.Symbol, int] = field(default_factory=dict)  # of all symbols when tracing
    winner: int = 0  # where traced: 0 is Inductor, then the candidates in their order
    spans: Callable[[int], list[_Span]] | None = None  # who would win where, if one way were CLOSE cheaper

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
        here, won = self.choice(), measured.choices[0]
        lo, hi = self._near(measured.winner)
        lo, hi = max(lo, here.lo), here.hi if hi is None else hi if here.hi is None else min(hi, here.hi)
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

    def _near(self, winner: int) -> tuple[int, int | None]:
        spans = self.spans(winner) if self.spans else []
        at = self.traced or 0
        found = ((lo, hi) for lo, hi, w in spans if lo <= at and (hi is None or at <= hi) and w == winner)
        return next(found, (at, at))

    def _told(self, symbol: str) -> Range:
        candidate = self.choices[0].candidate
        name = candidate.name if candidate else INDUCTOR
        return Range(symbol, 0, None, self.decision.verdict, name, self.decision.reason)


@dataclass(frozen=True)
class _Way:
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


def judge(match: Match, offers: Sequence[Offer], machine: Machine, *, price: Price | None = None) -> Judgement:
    """The verdict on one match. `offers` holds the match itself and its alternatives, in any order.

    `price` tells what Inductor makes of a set of nodes; it is predicted where not given, otherwise measured.
    """
    measured = price is not None
    price = price or (lambda nodes: inductor_plan(nodes, machine))
    prologue = set(match.prologue)
    everything = sorted({n for o in offers for n in _replaced(o.site)} - prologue)
    norm = price(match.prologue).share(match.prologue_share)
    before = price(everything) + norm
    ways = []
    for o in (o for o in offers if o.candidates):
        folds = bool(prologue) and match.prologue[-1] in o.site.interior
        gone = set(_replaced(o.site))
        rest = price([n for n in everything if n not in gone]) + (Plan(()) if folds else norm)
        ways += [_Way(o, c, rest, bool(dict(c.details).get("measured")), match.severed) for c in o.candidates]
    sizes = _traced(match.op)
    symbol = _symbol(match.op, [before.seconds, *(w.seconds for w in ways)])
    # sizes that were equal when tracing (queries and keys) are taken to vary together, the others to stay
    fixed = {s: symbol if symbol and v == sizes.get(symbol) else v for s, v in sizes.items() if s != symbol}

    def solve(favoured: int | None = None) -> list[_Span]:
        return _spans(match.op, before, ways, symbol, fixed, favoured)

    winners: list[_Way | None] = [None, *ways]
    solved = solve()
    traced = sizes.get(symbol) if symbol is not None else None
    won = next(w for lo, hi, w in solved if traced is None or (lo <= traced and (hi is None or traced <= hi)))
    spans, here = [(lo, hi, winners[w]) for lo, hi, w in solved], winners[won]
    context = _Context(match, offers, machine, before, ways, sizes, measured)
    return Judgement(
        match,
        context.decision(here, () if symbol is None else tuple(context.range(symbol, *span) for span in spans)),
        tuple(Choice(lo, hi, *_place(match, w), w.candidate if w else None) for lo, hi, w in spans),
        symbol,
        traced,
        sizes,
        won,
        solve,
    )


def _place(match: Match, way: _Way | None) -> tuple[FusedOp, Site]:
    return (way.offer.op, way.offer.site) if way else (match.op, match.site)


def _spans(
    op: FusedOp,
    before: Plan,
    ways: Sequence[_Way],
    symbol: sympy.Symbol | None,
    fixed: _Values,
    favoured: int | None = None,
) -> list[_Span]:
    """Which way wins over the sizes of the symbol; without one, a single entry. With one way `favoured` by CLOSE, all
    ranges are given, however many."""
    costs = [fixed_at(c, fixed) for c in (before.seconds, *(w.priced() for w in ways))]
    if favoured is not None:
        seconds = before.seconds if favoured == 0 else ways[favoured - 1].seconds
        costs[favoured] = fixed_at(seconds, fixed) / (1 + CLOSE)
    valid = [True, *(fixed_at(w.candidate.valid, fixed) for w in ways)]
    if symbol is None:
        usable = [i for i, ok in enumerate(valid) if ok in (True, sympy.true)]
        return [(0, None, min(usable, key=lambda i: float(costs[i])))]
    begin, end = range_of(_size_with(op, symbol), symbol)
    lo = max(begin, 1)  # nothing is computed for size 0, so it has no price of its own
    far = FAR if end is None else max(lo, min(end, FAR))
    spans = cheapest(costs, symbol, lo, far, valid, at_most=MOST_RANGES if favoured is None else None)
    first, last = spans[0], spans[-1]
    return [(begin if s is first else s.lo, end if s is last else s.hi, s.winner) for s in spans]


# ---- nodes --------------------------------------------------------------------------------------
def _replaced(site: Site) -> list[Node]:
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


def _traced(op: FusedOp) -> dict[sympy.Symbol, int]:
    found: dict[sympy.Symbol, int] = {}
    for size in _symints(op):
        found |= traced_values(size)
    return found


def _size_with(op: FusedOp, symbol: sympy.Symbol) -> torch.SymInt:
    return next(s for s in _symints(op) if symbol in s.node.expr.free_symbols)


def _symbol(op: FusedOp, costs: Iterable[Amount]) -> sympy.Symbol | None:
    """The size that ranges are solved in: the first of the fused op's that the costs depend on."""
    free = {s for c in costs if isinstance(c, sympy.Basic) for s in c.free_symbols}
    ordered = [s for size in _symints(op) for s in sorted(size.node.expr.free_symbols, key=str)]
    return next((s for s in ordered if s in free), None)


# ---- the report ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Context:
    match: Match
    offers: Sequence[Offer]
    machine: Machine
    before: Plan
    ways: Sequence[_Way]
    sizes: Mapping[sympy.Symbol, int]
    measured: bool  # what Inductor takes

    def decision(self, way: _Way | None, ranges: tuple[Range, ...]) -> Decision:
        before = Work.of(self.before.traffic, self.before.seconds, self.sizes)
        after = Work.of(way.traffic, way.seconds, self.sizes) if way else None
        return Decision(
            pattern=self.match.pattern,
            verdict="fused" if way else "kept",
            reason=self._reason(way, self.sizes),
            where=where(self.match.site.output),
            before=before,
            after=after,
            candidates=self._options(before),
            kernel=way.candidate.kernel if way else "",
            ranges=ranges,
            node=self.match.site.output.name,
            nodes=tuple(n.name for n in self._concerned(way)),
            details=(way.candidate.details if way else ()) + self._facts(),
        )

    def _concerned(self, way: _Way | None) -> list[Node]:
        """The nodes that are replaced, or would be, with those of a norm that is folded in, whoever else reads it."""
        site = way.offer.site if way else self.match.site
        folded = [n for n in self.match.prologue if n in site.interior]
        return sorted({*_replaced(site), *folded})

    def _facts(self) -> tuple[tuple[str, float], ...]:
        op = self.match.op
        return matmul_facts(op, self.sizes) if isinstance(op, MatmulFamily) else ()

    def range(self, symbol: sympy.Symbol, lo: int, hi: int | None, way: _Way | None) -> Range:
        """The reason is given for one size of the range: its middle (geometric, as sizes are)."""
        verdict: Verdict = "fused" if way else "kept"
        middle = lo if hi is None else math.isqrt(max(lo, 1) * hi)
        sizes = {s: middle if v == self.sizes[symbol] else v for s, v in self.sizes.items()}
        name = way.candidate.name if way else INDUCTOR
        return Range(str(symbol), lo, hi, verdict, name, self._reason(way, sizes))

    def _reason(self, way: _Way | None, sizes: Mapping[sympy.Symbol, int]) -> str:
        before = Work.of(self.before.traffic, self.before.seconds, sizes)
        if way is not None:
            return fused_reason(self.match.op, before, Work.of(way.traffic, way.seconds, sizes), way.measured)
        usable = [w for w in self.ways if fixed_at(w.candidate.valid, sizes) in (True, sympy.true)]
        best = min(usable, key=lambda w: at(w.seconds, sizes), default=None)
        unavailable = [u.reason for o in self.offers for _, u in o.unavailable]
        invalid = [w.candidate for w in self.ways if w not in usable]
        closest = None if best is None else (best.candidate.name, Work.of(best.traffic, best.seconds, sizes))
        measured = (best is not None and best.measured, self.measured)
        severed = best is not None and at(best.severed, sizes) > 0
        return kept_reason(
            self.match.op, self.machine, self.before, before, closest, unavailable, invalid, measured,
            error=at(best.candidate.error, sizes) if best else MARGIN, severed=severed,
        )  # fmt: skip

    def _options(self, before: Work) -> tuple[Option, ...]:
        known = (("measured", True),) if self.measured else ()
        listed = [Option(INDUCTOR, "left to Inductor", before, details=known)]
        for way in self.ways:
            c = way.candidate
            work = Work.of(way.traffic, way.seconds, self.sizes)
            valid = "always" if c.valid in (True, sympy.true) else str(c.valid)
            listed.append(Option(c.name, c.kernel, work, valid, details=c.details))
        for o in self.offers:
            listed += [Option(name, reason=u.reason) for name, u in o.unavailable]
        return tuple(listed)
