"""Conditions on query and key, read as limits.

An inequality of integers is brought into the form a·q + b·k + c >= 0; what it says of keys is a `Limit`. Integers that
are read from the device, from tensors that cannot be seen into, are taken to count from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import sympy
from sympy.core.relational import Equality, Relational
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from .choices import ZERO
from .index_functions import Indexer


@dataclass(frozen=True)
class Extents:
    """The symbols that the mask is evaluated at, with their extents: index i runs from 0 to extent − 1."""

    query: sympy.Expr
    key: sympy.Symbol
    extent: dict[sympy.Symbol, sympy.Expr]
    batch: sympy.Symbol | None = None

    @property
    def kv_len(self) -> sympy.Expr:
        return self.extent[self.key]

    def minimum(self, expr: sympy.Expr) -> sympy.Expr:
        """The least value of an expression that is linear in the indices; −∞ where it is not known to be linear."""
        expr = sympy.expand(expr)
        for symbol, extent in self.extent.items():
            slope = expr.coeff(symbol)
            rest = sympy.expand(expr - slope * symbol)
            if symbol in rest.free_symbols or not (slope.is_nonnegative or slope.is_negative):
                return -sympy.oo
            expr = sympy.expand(rest + (slope * (extent - 1) if slope.is_negative else 0))
        return expr

    def never_negative(self, expr: sympy.Expr) -> bool:
        return bool(self.minimum(expr).is_nonnegative)


@dataclass(frozen=True)
class Limit:
    """One conjunct, as the limit that it sets, or why it is none; nothing at all where it always holds.

    upper: upper + q·follows_query − k >= 0, where `upper` may read one length per batch element (`by_batch`);
    lower: k − q + lower >= 0; chunk: k is in the chunk of q + start, of `chunk` keys.
    """

    upper: sympy.Expr | None = None
    lower: sympy.Expr | None = None
    follows_query: bool = False
    by_batch: bool = False
    chunk: int | None = None
    start: sympy.Expr = ZERO
    failure: str = ""


def read(part: Boolean, extents: Extents, indexer: Indexer) -> Limit:
    if part == sympy.true:
        return Limit()
    if isinstance(part, sympy.Or):
        possible = [p for p in part.args if read(sympy.Not(p), extents, indexer) != Limit()]
        if any(read(p, extents, indexer) == Limit() for p in possible):
            return Limit()
        if len(possible) == 1:
            return read(possible[0], extents, indexer)
    if not isinstance(part, Relational):
        return Limit(failure=f"{named(part, indexer)} decide what is masked, by no single limit")
    if isinstance(part, Equality) and (chunk := _same_chunk(part, extents)) is not None:
        return chunk
    if isinstance(part, (Equality, sympy.Ne)) or not (part.lhs - part.rhs).is_integer:
        return Limit(failure=f"a condition on {named(part, indexer)} is no inequality of positions")
    slack = _slack(part)
    if extents.never_negative(slack):
        return Limit()
    query, key = extents.query, extents.key
    by_query = slack.coeff(query) if query != 0 else ZERO
    by_key = slack.coeff(key)
    rest = sympy.expand(slack - by_query * query - by_key * key)
    indices = rest.free_symbols & set(extents.extent)
    if not indices and (by_query, by_key) in ((1, -1), (0, -1)):
        return Limit(upper=rest, follows_query=by_query == 1)
    if indices == {extents.batch} and (by_query, by_key) in ((1, -1), (0, -1)):
        return Limit(upper=rest, by_batch=True, follows_query=by_query == 1)
    if not indices and (by_query, by_key) == (-1, 1):
        return Limit(lower=rest)
    if (by_query, by_key) == (0, 1) and (chunk := _from_start_of_chunk(rest, extents)) is not None:
        return chunk
    if not indices and query == 0 and by_key == 1:  # there is one query only, and nothing can be seen to follow it
        return Limit(lower=rest)
    shown = f"{named(rest, indexer)} in {slack} >= 0" if loads_of(rest, indexer) else f"{slack} >= 0"
    return Limit(failure=f"{shown} is no causal, length, window or chunk limit")


def _same_chunk(part: Equality, extents: Extents) -> Limit | None:
    """k ⫽ c = (q + start) ⫽ c."""
    sides = [_floored(side) for side in part.args]
    if None in sides:
        return None
    (a, c), (b, d) = cast("list[tuple[sympy.Expr, sympy.Expr]]", sides)
    if c != d:
        return None
    if a != extents.key:
        a, b = b, a
    start = sympy.expand(b - extents.query)
    if a != extents.key or start.free_symbols & set(extents.extent):
        return None
    if all(extents.never_negative(c - 1 - x) and extents.never_negative(x) for x in (a, b)):
        return Limit()  # all in the first chunk
    return Limit(chunk=int(c), start=start)


def _from_start_of_chunk(rest: sympy.Expr, extents: Extents) -> Limit | None:
    """k − ((q + start) ⫽ c)·c >= 0, given what is beside k."""
    factor, floors = sympy.expand(-rest).as_coeff_Mul()
    found = _floored(floors)
    if found is None or found[1] != factor:
        return None
    start = sympy.expand(found[0] - extents.query)
    return None if start.free_symbols & set(extents.extent) else Limit(chunk=int(factor), start=start)


def _floored(expr: sympy.Expr) -> tuple[sympy.Expr, sympy.Integer] | None:
    """(x, c) where the expression is x ⫽ c."""
    floors = expr.atoms(sympy.floor)
    if len(floors) != 1:
        return None
    (floor,) = floors
    beside = sympy.expand(expr - floor)
    quotient = sympy.expand(floor.args[0] + beside)
    divisor = sympy.fraction(sympy.together(quotient))[1]
    if not beside.is_Integer or not divisor.is_Integer or divisor <= 1:
        return None
    return sympy.expand(quotient * divisor), divisor


def holds(condition: Boolean, extents: Extents, indexer: Indexer) -> bool:
    """Whether a condition is known to hold for all indices; integers read from the device count from 0."""
    if isinstance(condition, sympy.And):
        return all(holds(c, extents, indexer) for c in condition.args)
    if isinstance(condition, sympy.Or):
        return any(holds(c, extents, indexer) for c in condition.args)
    if not isinstance(condition, Relational) or isinstance(condition, (Equality, sympy.Ne)):
        return bool(condition == sympy.true)
    slack = _slack(condition)
    counts = {a: sympy.Dummy("count", integer=True, nonnegative=True) for a in loads_of(slack, indexer) if a.is_integer}
    return all(extents.never_negative(s.subs(counts)) for s in _without_distance(slack))


def loads_of(expr: sympy.Basic, indexer: Indexer) -> list[sympy.Expr]:
    """What an expression reads from tensors that cannot be seen into."""
    return [a for a in expr.atoms(sympy.Function, sympy.Symbol) if a in indexer.loads or a.func in indexer.loads]


def _slack(relation: Relational) -> sympy.Expr:
    """The integer that is not negative exactly where an inequality of integers holds."""
    strict = int(relation.func in (sympy.Gt, sympy.Lt))
    return sympy.expand((relation.gts - relation.lts - strict).rewrite(sympy.floor))


def _without_distance(slack: sympy.Expr) -> list[sympy.Expr]:
    """slack >= 0 without absolute values: c − |x| >= 0 is c − x >= 0 and c + x >= 0."""
    distances = slack.atoms(sympy.Abs)
    if len(distances) != 1:
        return [slack]
    (distance,) = distances
    if not slack.coeff(distance).is_negative:
        return [slack]
    return [sympy.expand(slack.subs(distance, sign * distance.args[0])) for sign in (1, -1)]


def conjuncts(conditions: Boolean) -> list[Boolean]:
    parts: list[Boolean] = []
    for part in sympy.And.make_args(conditions):
        equal = isinstance(part, (Equality, sympy.Ne))
        if isinstance(part, Relational) and not equal and (part.lhs - part.rhs).is_integer:
            parts += [sympy.Ge(s, 0) for s in _without_distance(_slack(part))]
        else:
            parts.append(part)
    return parts


def named(expr: sympy.Basic, indexer: Indexer) -> str:
    """The nodes that an expression reads, for a sentence."""
    atoms = [*expr.free_symbols, *(f.func for f in expr.atoms(sympy.Function))]
    names = sorted({indexer.loads[a].name for a in atoms if a in indexer.loads})
    return "values of " + ", ".join(names) if names else str(expr)


def read_from(read: sympy.Expr, indexer: Indexer) -> Node:
    return indexer.loads[read if read in indexer.loads else read.func]
