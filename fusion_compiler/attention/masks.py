"""What a mask is, proved from how the graph computes it.

The relations that a mask's index function is made of are brought into the form a·q + b·k + c >= 0 and read as

    nothing to mask      the left side is never negative over the extents of the tensors
    causal               q − k + offset >= 0, the offset a number, a size, or an integer scalar on the device
    length               position − k >= 0, the same for every query
    padding by length    lengths[b] − k + c >= 0, one length for each element of the batch, or with q − last query + …
    sliding window       k − q + r >= 0
    chunked              k ⫽ c = (q + offset) ⫽ c, or k >= ((q + offset) ⫽ c) · c, beside a causal limit

Anything else stays a tensor, with a sentence that names what could not be proved. Whether every row sees some key is
proved by naming one: the first, the newest, or the query's own. A finite fill (the smallest number of a dtype) acts as
−∞ only in such rows; elsewhere the mask stays a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import sympy
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ..fused import Mask
from . import axes
from .choices import ZERO, leaves, truth
from .index_functions import Index, Indexer
from .limits import Extents, Limit, conjuncts, holds, loads_of, named, read, read_from

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
class Proof:
    """What is known of a mask, with the integers on the device that it reads: the scalar that is added to the offset,
    and the lengths."""

    mask: Mask
    position: Node | None = None
    lengths: Node | None = None


def prove(terms: Sequence[Term], extents: Extents, indexer: Indexer) -> Proof:
    """The strongest mask that the terms, all of which must let a key through, can be proved to be."""
    visible, fills = [], list[float]()
    for term in terms:
        found = _visible(term, indexer)
        if isinstance(found, str):
            return Proof(Mask("tensor", proof=found))
        visible.append(found[0])
        fills += found[1]
    finite = any(fill > float("-inf") for fill in fills)
    empty: EmptyRows = "mean" if float("-inf") not in fills and len(terms) == 1 else "nan"
    conditions = sympy.to_nnf(sympy.And(*visible), simplify=False)
    if conditions == sympy.false:
        return Proof(Mask("tensor", empty_rows=empty, proof="the mask hides every key"))
    parts = [read(part, extents, indexer) for part in conjuncts(conditions)]
    failed = next((p.failure for p in parts if p.failure), "")
    proof = limited(parts, extents, indexer) if not failed else failed
    reason = proof if isinstance(proof, str) else proof.mask.proof
    follows = [p for p in parts if p.follows_query or (extents.query == 0 and not p.by_batch)]
    offsets = [p.upper for p in follows if p.upper is not None]
    if isinstance(proof, Proof) and (proof.mask.kind == "none" or _newest_in_window(proof, extents)):
        empty = "none"
    elif sees_a_key(conditions, offsets, extents, indexer):
        empty = "none"
    if isinstance(proof, str):
        return Proof(Mask("tensor", empty_rows=empty, proof=reason))
    # beside finite fills, a row that sees nothing averages what they were put over: no limit says so
    if finite and empty != "none":
        reason += "; a row may see no key and then averages those that a finite number hides, which -inf would not"
        return Proof(Mask("tensor", empty_rows=empty, proof=reason))
    return replace(proof, mask=replace(proof.mask, empty_rows=empty, proof=reason))


def _newest_in_window(proof: Proof, extents: Extents) -> bool:
    """Whether every query sees its newest key, i + offset, or where that lies beyond the last key, the last key."""
    mask = proof.mask
    if mask.window is None or mask.window <= 0 or mask.chunk is not None or mask.padding is not None:
        return False
    if mask.position:  # a query's own position in the cache is one of its kv_len
        return isinstance(mask.offset, int) and 0 <= mask.offset < mask.window
    newest = extents.query + mask.offset
    beyond = extents.kv_len - 1 - newest + mask.window - 1
    return extents.never_negative(newest) and extents.never_negative(beyond)


def sees_a_key(conditions: Boolean, offsets: Sequence[sympy.Expr], extents: Extents, indexer: Indexer) -> bool:
    """Whether one and the same key, as a function of the query, is visible to every query."""
    for key in (ZERO, extents.query, *(extents.query + offset for offset in offsets)):
        inside = extents.never_negative(key) and extents.never_negative(extents.kv_len - 1 - key)
        position = _position(sympy.expand(key - extents.query), indexer) if loads_of(key, indexer) else ""
        in_cache = not isinstance(position, str) and position[1] == 0  # a query's own position is one of the cache
        if (inside or in_cache) and holds(conditions.subs(extents.key, key), extents, indexer):
            return True
    return False


def _visible(term: Term, indexer: Indexer) -> tuple[Boolean, list[float]] | str:
    """When a score is visible and the values that hide one, or why this is no mask."""
    value = indexer.at(term.node, term.index)
    if not term.additive:
        if term.fill > HIDDEN:
            return (
                f"masked scores are set to {term.fill:g}, which is not small enough to hide a key; -inf or "
                "torch.finfo(dtype).min is"
            )
        return (truth(value) if term.keeps else sympy.Not(truth(value))), [term.fill]
    visible, fills = [], list[float]()
    for condition, number in leaves(value):
        if not number.is_number:
            return f"{term.node.name} adds {named(number, indexer)} to the scores, which is neither 0 nor −∞"
        added = term.factor * float(number) if number.is_extended_real else float("nan")
        if added == 0.0:
            visible.append(condition)
        elif added <= HIDDEN:
            fills.append(added)
        else:
            return (
                f"{term.node.name} adds {added:g} to some scores, which is neither 0 nor small enough to hide a key; "
                "-inf or torch.finfo(dtype).min is"
            )
    return sympy.Or(*visible), fills


def limited(parts: list[Limit], extents: Extents, indexer: Indexer) -> Proof | str:
    """The mask that the limits make together, or why it is none."""
    several = "it has several limits of one kind"
    uppers = _closest([p for p in parts if p.upper is not None and not p.by_batch], extents)
    ends = _closest([p for p in parts if p.by_batch], extents)
    lowers, chunks = ([p for p in parts if getattr(p, name) is not None] for name in ("lower", "chunk"))
    follow = [p for p in uppers if p.follows_query and extents.query != 0]
    fixed = [p for p in uppers if p not in follow]
    if follow and fixed:  # a causal limit and one length for all
        ends, fixed = [*ends, *fixed], []
    if max(map(len, (follow, fixed, ends, lowers, chunks))) > 1:
        return several
    if not uppers and not ends:
        if lowers or chunks:
            return "keys are limited from below or to a chunk, with no causal limit beside that"
        return Proof(Mask("none", proof="the mask hides nothing: every relation in it always holds"))
    limit = (follow or fixed or [Limit(upper=extents.kv_len - 1)])[0]
    position = _position(cast(sympy.Expr, limit.upper), indexer)
    if isinstance(position, str):
        return position
    node, offset = position
    if (lowers or chunks) and not follow and not (fixed and extents.query == 0):
        return "a window or chunk without a causal limit that follows the query"
    window, chunk, padding, lengths = None, None, None, None
    staggered = bool(ends) and ends[0].follows_query
    if lowers:
        span = sympy.expand(sympy.Add(limit.upper, lowers[0].lower, 1))
        if not span.is_Integer:
            return f"the width of its window, {span}, is no number"
        window = int(span)
    if chunks:
        if chunks[0].start != limit.upper:
            return "its chunks are counted from another position than its causal limit"
        chunk = chunks[0].chunk
    if ends:
        last = _last(extents) if staggered else ZERO
        end = _lengths(sympy.expand(cast(sympy.Expr, ends[0].upper) + last), extents, indexer)
        if isinstance(end, str):
            return end
        lengths, padding = end
    newest = offset + (sympy.Symbol("query") if follow else 0) + (sympy.Symbol(node.name) if node is not None else 0)
    limits = [f"key <= {newest}"] if uppers else []
    limits += [f"key > {sympy.expand(newest - window)}"] if window is not None else []
    limits += [f"in the same chunk of {chunk}"] if chunk is not None else []
    if lengths is not None:
        behind = f" - {_last(extents)} + query" if staggered else ""
        limits.append(f"key < {lengths.name}" + (f" + {padding}" if padding else "") + behind)
    return Proof(
        Mask(
            "causal" if follow or lowers or chunks else "length",
            offset=int(offset) if offset.is_Integer else offset, window=window,
            position=node is not None, chunk=chunk, padding=padding, staggered=staggered,
            proof=f"{', '.join(limits)}, read from the index function of the mask",
        ), node, lengths,
    )  # fmt: skip


def _last(extents: Extents) -> sympy.Expr:
    """The index of the last query."""
    return extents.extent[extents.query] - 1 if extents.query in extents.extent else ZERO


def _closest(uppers: Sequence[Limit], extents: Extents) -> list[Limit]:
    """The upper limits without those that another one implies."""
    kept: list[Limit] = []
    for part in uppers:

        def implies(a: Limit, b: Limit) -> bool:
            ahead = cast(Any, b.upper) - cast(Any, a.upper)
            if a.by_batch:  # also of limits that follow the query and such that do not
                ahead += extents.query * (b.follows_query - a.follows_query)
            elif a.follows_query != b.follows_query:
                return False
            return extents.never_negative(sympy.expand(ahead))

        if not any(implies(k, part) for k in kept):
            kept = [*(k for k in kept if not implies(part, k)), part]
    return kept


def _position(offset: sympy.Expr, indexer: Indexer) -> tuple[Node | None, sympy.Expr] | str:
    """(scalar on the device, what is added to it) of an offset."""
    reads = loads_of(offset, indexer)
    if not reads:
        return None, offset
    rest = sympy.expand(offset - reads[0])
    if len(reads) > 1 or rest.has(reads[0]):
        return f"its offset {offset} is no integer scalar plus a number"
    if any(i != 0 for i in reads[0].args):
        return f"its offset differs from row to row: it reads {named(offset, indexer)}"
    node = read_from(reads[0], indexer)
    if axes.product(axes.shape_of(node)) != 1:
        return f"its offset is one element of {node.name}, which holds several"
    return node, rest


def _lengths(limit: sympy.Expr, extents: Extents, indexer: Indexer) -> tuple[Node, int] | str:
    """(lengths, c) where the limit is lengths[b] + c − 1."""
    reads = loads_of(limit, indexer)
    shift = sympy.expand(limit + 1 - reads[0]) if len(reads) == 1 else None
    if shift is None or not shift.is_Integer:
        return f"the length {limit} is no integer read from the device plus a number"
    node = read_from(reads[0], indexer)
    size = axes.product(axes.shape_of(node))
    each = [i for i in reads[0].args if i != 0] == [extents.batch] and axes.same(size, extents.extent[extents.batch])
    if not each and size != 1:
        return f"its lengths {node.name} are not one for each element of the batch"
    return node, int(shift)
