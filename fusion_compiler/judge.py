"""Whether a fusion pays: the cheapest of what the lowerings offer and of leaving the nodes to Inductor.

A prediction is trusted only beyond ±`MARGIN`: a candidate must be predicted to need less than (1 − MARGIN) of the time
that Inductor needs for the nodes it replaces. With a symbolic size the verdict is a list of ranges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import sympy
import torch
from torch.fx import Node

from .candidates import Amount, Candidate, Lowering, Traffic, Unavailable
from .cost.amounts import Condition, at, is_symbolic
from .cost.baseline import Plan, inductor_plan
from .cost.crossover import FAR, cheapest
from .cost.roofline import matmul_facts
from .fused import FusedOp, MatmulFamily, Site
from .machine import Machine
from .match import Match
from .reasons import MARGIN, fused_reason, kept_reason
from .report import Decision, Option, Range, Verdict, Work, where
from .torch_private.symbols import range_of, traced_values

MOST_RANGES = 3
INDUCTOR = "inductor"
_Values = Mapping[sympy.Symbol, int | sympy.Symbol]


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


@dataclass(frozen=True)
class _Way:
    """A candidate at its alternative, with what stays for Inductor beside it."""

    offer: Offer
    candidate: Candidate
    rest: Plan
    measured: bool

    @property
    def seconds(self) -> Amount:
        return self.candidate.seconds + self.rest.seconds

    def priced(self) -> Amount:
        """The time at which the candidate counts: a prediction must win by the margin, a measurement need not."""
        return self.candidate.seconds / (1 if self.measured else 1 - MARGIN) + self.rest.seconds

    @property
    def traffic(self) -> Traffic:
        return self.candidate.traffic + self.rest.traffic


def judge(match: Match, offers: Sequence[Offer], machine: Machine, *, baseline: Plan | None = None) -> Judgement:
    """The verdict on one match. `offers` holds the match itself and its alternatives, in any order.

    `baseline` is what Inductor makes of all their nodes together; it is predicted where not given.
    """
    prologue = set(match.prologue)
    everything = sorted({n for o in offers for n in _replaced(o.site)} - prologue)
    norm = inductor_plan(match.prologue, machine).share(match.prologue_share)
    before = baseline if baseline is not None else inductor_plan(everything, machine) + norm
    ways = []
    for o in (o for o in offers if o.candidates):
        folds = bool(prologue) and match.prologue[-1] in o.site.interior
        gone = set(_replaced(o.site))
        rest = inductor_plan([n for n in everything if n not in gone], machine) + (Plan(()) if folds else norm)
        ways += [_Way(o, c, rest, bool(dict(c.details).get("measured"))) for c in o.candidates]
    sizes = _traced(match.op)
    symbol = _symbol(match.op, [before.seconds, *(w.seconds for w in ways)])
    # sizes that were equal when tracing (queries and keys) are taken to vary together, the others to stay
    fixed = {s: symbol if symbol and v == sizes.get(symbol) else v for s, v in sizes.items() if s != symbol}
    spans = _spans(match.op, before, ways, symbol, fixed)
    traced = sizes.get(symbol) if symbol is not None else None
    here = next(w for lo, hi, w in spans if traced is None or (lo <= traced and (hi is None or traced <= hi)))
    context = _Context(match, offers, machine, before, ways, sizes)
    return Judgement(
        match,
        context.decision(here, () if symbol is None else tuple(context.range(symbol, *span) for span in spans)),
        tuple(Choice(lo, hi, *_place(match, w), w.candidate if w else None) for lo, hi, w in spans),
        symbol,
        traced,
    )


def _place(match: Match, way: _Way | None) -> tuple[FusedOp, Site]:
    return (way.offer.op, way.offer.site) if way else (match.op, match.site)


def _spans(
    op: FusedOp, before: Plan, ways: Sequence[_Way], symbol: sympy.Symbol | None, fixed: _Values
) -> list[tuple[int, int | None, _Way | None]]:
    """(lo, hi, the way that wins or None for Inductor) over the sizes of the symbol; without one, a single entry."""
    costs = [_fix(c, fixed) for c in (before.seconds, *(w.priced() for w in ways))]
    valid = [True, *(_fix_condition(w.candidate.valid, fixed) for w in ways)]
    winners: list[_Way | None] = [None, *ways]
    if symbol is None:
        usable = [i for i, ok in enumerate(valid) if ok in (True, sympy.true)]
        return [(0, None, winners[min(usable, key=lambda i: float(costs[i]))])]
    begin, end = range_of(_size_with(op, symbol), symbol)
    lo = max(begin, 1)  # nothing is computed for size 0, so it has no price of its own
    spans = cheapest(costs, symbol, lo, FAR if end is None else max(lo, min(end, FAR)), valid, at_most=MOST_RANGES)
    first, last = spans[0], spans[-1]
    return [(begin if s is first else s.lo, end if s is last else s.hi, winners[s.winner]) for s in spans]


# ---- nodes --------------------------------------------------------------------------------------
def _replaced(site: Site) -> list[Node]:
    """The nodes that die with the site's output, in graph order: nothing else reads them."""
    gone = {site.output}
    for node in sorted(site.interior, reverse=True):
        if node.users and all(user in gone for user in node.users):
            gone.add(node)
    return sorted(gone)


# ---- symbols ------------------------------------------------------------------------------------
def _symints(op: FusedOp) -> list[torch.SymInt]:
    values = [getattr(op, f.name) for f in fields(op)]
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


def _fix(value: Amount, sizes: _Values) -> Amount:
    return value.subs(sizes) if isinstance(value, sympy.Basic) else value


def _fix_condition(value: Condition, sizes: _Values) -> Condition:
    return value.subs(sizes) if isinstance(value, sympy.Basic) else value


# ---- the report ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Context:
    match: Match
    offers: Sequence[Offer]
    machine: Machine
    before: Plan
    ways: Sequence[_Way]
    sizes: Mapping[sympy.Symbol, int]

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
            nodes=tuple(n.name for n in _replaced(way.offer.site if way else self.match.site)),
            details=(way.candidate.details if way else ()) + self._facts(),
        )

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
            return fused_reason(before, Work.of(way.traffic, way.seconds, sizes), way.measured)
        usable = [w for w in self.ways if _fix_condition(w.candidate.valid, sizes) in (True, sympy.true)]
        best = min(usable, key=lambda w: at(w.seconds, sizes), default=None)
        unavailable = [u.reason for o in self.offers for _, u in o.unavailable]
        invalid = [w.candidate for w in self.ways if w not in usable]
        closest = None if best is None else (best.candidate.name, Work.of(best.traffic, best.seconds, sizes))
        return kept_reason(self.match.op, self.machine, self.before, before, closest, unavailable, invalid)

    def _options(self, before: Work) -> tuple[Option, ...]:
        listed = [Option(INDUCTOR, "left to Inductor", before)]
        for way in self.ways:
            c = way.candidate
            work = Work.of(way.traffic, way.seconds, self.sizes)
            valid = "always" if c.valid in (True, sympy.true) else str(c.valid)
            listed.append(Option(c.name, c.kernel, work, valid, details=c.details))
        for o in self.offers:
            listed += [Option(name, reason=u.reason) for name, u in o.unavailable]
        return tuple(listed)
