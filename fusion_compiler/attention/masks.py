"""What a mask is, proved from how the graph computes it.

The relations that a mask's index function is made of are brought into the form a·q + b·k + c >= 0 and read as

    nothing to mask      the left side is never negative over the extents of the tensors
    causal               q − k + offset >= 0, the offset a number, a size, or an integer scalar on the device
    length               position − k >= 0, the same for every query
    sliding window       k − q + r >= 0

Anything else stays a tensor, with a sentence that names what could not be proved. A finite fill (the smallest number of
a dtype) acts as −∞ only in rows that see some key; that is proved too, else the mask stays a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import sympy
from sympy.core.relational import Equality, Relational
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ..fused import Mask
from . import axes
from .index_functions import ZERO, Index, Indexer, leaves, truth

# Finite fills from here on act as −∞ beside a visible key: float16 has no smaller number, wider dtypes no such scores.
HIDDEN = -65504.0


EmptyRows = Literal["none", "mean", "nan", "zero"]


@dataclass(frozen=True)
class Term:
    """A mask as it meets the scores: added to them, or the condition under which they are kept (`fill` elsewhere)."""

    node: Node
    index: Index  # where `node` is read for one score
    additive: bool = True
    keeps: bool = True  # condition only: True keeps the score
    fill: float = 0.0
    factor: float = 1.0  # what an added mask is multiplied with


@dataclass(frozen=True)
class Extents:
    """The symbols that the mask is evaluated at, with their extents: index i runs from 0 to extent − 1."""

    query: sympy.Expr
    key: sympy.Symbol
    extent: dict[sympy.Symbol, sympy.Expr]

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
class Proof:
    """What is known of a mask; `position` is the integer scalar that a device-side offset is read from."""

    mask: Mask
    position: Node | None = None


def prove(terms: Sequence[Term], extents: Extents, indexer: Indexer) -> Proof:
    """The strongest mask that the terms, all of which must let a key through, can be proved to be."""
    visible, fills = [], list[float]()
    for term in terms:
        found = _visible(term, indexer)
        if isinstance(found, str):
            return Proof(Mask("tensor", proof=found))
        visible.append(found[0])
        fills.append(found[1])
    finite = min(fills) > float("-inf")
    empty: EmptyRows = "mean" if finite and len(terms) == 1 else "nan"
    conditions = sympy.to_nnf(sympy.And(*visible), simplify=False)
    if conditions == sympy.false:
        return Proof(Mask("tensor", empty_rows=empty, proof="the mask hides every key"))
    parts = [_read(part, extents, indexer) for part in sympy.And.make_args(conditions)]
    sees_first_key = all(p.keeps_first_key for p in parts)
    failed = next((p.failure for p in parts if p.failure), "")
    proof = _combine([p for p in parts if not p.failure], extents, indexer) if not failed else None
    if proof is None:
        empty = "none" if sees_first_key else empty
        return Proof(Mask("tensor", empty_rows=empty, proof=failed or "it has several limits of one kind"))
    mask, sees = proof.mask, sees_first_key
    if mask.window is not None:
        # query i sees its newest key, i + offset, unless that lies beyond kv_len − 1 by a whole window; a position read
        # from the device is one of the cache, which is kv_len long
        newest = extents.query + mask.offset
        beyond = extents.kv_len - 1 - newest + mask.window - 1
        sees = mask.window > 0 and (mask.position or extents.never_negative(newest) and extents.never_negative(beyond))
    if sees or mask.kind == "none":
        return replace(proof, mask=replace(mask, empty_rows="none"))
    reason = f"rows that see no key may exist ({mask.proof})"
    return Proof(Mask("tensor", empty_rows=empty, proof=reason))


def _visible(term: Term, indexer: Indexer) -> tuple[Boolean, float] | str:
    """When a score is visible and the least value that hides one, or why this is no mask."""
    value = indexer.at(term.node, term.index)
    if not term.additive:
        if term.fill > HIDDEN:
            return f"masked scores are set to {term.fill:g}, which is not small enough to hide a key"
        return (truth(value) if term.keeps else sympy.Not(truth(value))), term.fill
    visible, fill = [], 0.0  # the most hiding value
    for condition, number in leaves(value):
        if not number.is_number:
            return f"{term.node.name} adds {_named(number, indexer)} to the scores, which is neither 0 nor −∞"
        added = term.factor * float(number) if number.is_extended_real else float("nan")
        if added == 0.0:
            visible.append(condition)
        elif added <= HIDDEN:
            fill = min(fill, added)
        else:
            return f"{term.node.name} adds {added:g} to some scores, which is neither 0 nor −∞"
    return sympy.Or(*visible), fill


def _named(expr: sympy.Basic, indexer: Indexer) -> str:
    """The nodes that an expression reads, for a sentence."""
    atoms = [*expr.free_symbols, *(f.func for f in expr.atoms(sympy.Function))]
    names = sorted({indexer.loads[a].name for a in atoms if a in indexer.loads})
    return "values of " + ", ".join(names) if names else str(expr)


@dataclass(frozen=True)
class _Part:
    """One conjunct: offset + q·follows_query − k >= 0 (upper), or k − q + reach >= 0 (lower), or why it is neither."""

    upper: sympy.Expr | None = None
    lower: sympy.Expr | None = None
    follows_query: bool = True
    keeps_first_key: bool = True
    failure: str = ""


def _read(part: Boolean, extents: Extents, indexer: Indexer) -> _Part:
    if part == sympy.true:
        return _Part()
    if isinstance(part, sympy.Or):
        possible = [p for p in part.args if _read(sympy.Not(p), extents, indexer) != _Part()]
        if len(possible) == 1 or any(_read(p, extents, indexer) == _Part() for p in possible):
            return _read(possible[0], extents, indexer) if len(possible) == 1 else _Part()
    if not isinstance(part, Relational):
        return _Part(keeps_first_key=False, failure=f"{_named(part, indexer)} decide what is masked")
    if isinstance(part, (Equality, sympy.Ne)) or not (part.lhs - part.rhs).is_integer:
        return _Part(keeps_first_key=False, failure=f"a condition on {_named(part, indexer)} is no inequality")
    slack = sympy.expand(part.gts - part.lts - (1 if part.func in (sympy.Gt, sympy.Lt) else 0))
    if extents.never_negative(slack):
        return _Part()
    query, key = extents.query, extents.key
    by_query = slack.coeff(query) if query != 0 else ZERO
    by_key = slack.coeff(key)
    rest = sympy.expand(slack - by_query * query - by_key * key)
    # without an upper limit of its own, key 0 is hidden from some row unless the slack at key 0 is never negative;
    # positions read from the device count from 0
    reads = [a for a in rest.atoms(sympy.Function, sympy.Symbol) if a in indexer.loads or a.func in indexer.loads]
    counts = {a: sympy.Dummy("count", integer=True, nonnegative=True) for a in reads}
    keeps = extents.never_negative(slack.subs(key, 0).subs(counts))
    if not rest.free_symbols & set(extents.extent) and (by_query, by_key) in ((1, -1), (0, -1)):
        return _Part(upper=rest, follows_query=by_query == 1, keeps_first_key=keeps)
    if not rest.free_symbols & set(extents.extent) and (by_query, by_key) == (-1, 1):
        return _Part(lower=rest, keeps_first_key=False)
    return _Part(keeps_first_key=keeps, failure=f"{sympy.Ge(slack, 0)} is no causal, length or window limit")


def _combine(parts: list[_Part], extents: Extents, indexer: Indexer) -> Proof | None:
    uppers = [p for p in parts if p.upper is not None]
    lowers = [p for p in parts if p.lower is not None]
    if len(uppers) > 1 or len(lowers) > 1 or (lowers and not uppers):
        return None
    if not uppers:
        return Proof(Mask("none", proof="the mask hides nothing: every relation in it always holds"))
    upper = uppers[0].upper
    assert upper is not None
    position = _position(upper, indexer)
    if isinstance(position, str):
        return Proof(Mask("tensor", proof=position))
    node, offset = position
    kind: Literal["causal", "length"] = "causal" if uppers[0].follows_query and extents.query != 0 else "length"
    if lowers and kind == "length":
        return None
    window = None
    if lowers:
        span = sympy.expand(upper + lowers[0].lower + 1)
        if not span.is_Integer:
            return None
        window = int(span)
    where = f" + {node.name}" if node is not None else ""
    row = "query" if kind == "causal" else ""
    limit = " + ".join(filter(None, (row, str(offset) if offset != 0 or not row else ""))) + where
    proof = f"key <= {limit}, read from the index function of the mask"
    if offset.is_Integer:
        offset = int(offset)
    return Proof(Mask(kind, offset=offset, window=window, position=node is not None, proof=proof), node)


def _position(offset: sympy.Expr, indexer: Indexer) -> tuple[Node | None, sympy.Expr] | str:
    """(scalar on the device, what is added to it) of an offset."""
    reads = [a for a in offset.atoms(sympy.Function, sympy.Symbol) if a in indexer.loads or a.func in indexer.loads]
    if not reads:
        return None, offset
    rest = sympy.expand(offset - reads[0])
    if len(reads) > 1 or rest.has(reads[0]):
        return f"its offset {offset} is no integer scalar plus a number"
    if any(i != 0 for i in reads[0].args):
        return f"its offset differs from row to row: it reads {_named(offset, indexer)}"
    node = indexer.loads[reads[0] if reads[0] in indexer.loads else reads[0].func]
    if axes.product(axes.shape_of(node)) != 1:
        return f"its offset is one element of {node.name}, which holds several"
    return node, rest
