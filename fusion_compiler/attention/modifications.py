"""Modifications of scores that no `Mask` says: what is added to them and which keys a query sees, as functions.

A kernel that is generated for an attention can print these functions (ALiBi, documents, prefixes, biases) instead of
reading a tensor of queries × keys. What of the conditions can be proved to be limits is taken out of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ..fused import Attention, Mask, Modification
from .choices import ZERO, Choice, leaves, number, parts_of, truth
from .index_functions import Indexer
from .limits import Extents, conjuncts, loads_of, read
from .masks import HIDDEN, Term, limited, sees_a_key
from .roles import Geometry

LEAST = torch.finfo(torch.float32).min
ABSORBING = -1e30  # a bias added to it changes nothing
OUTWEIGHED = 1e3  # times the factor of an unknown number, a constant beside it counts alone
MOST_OPERATIONS = 40  # of one term; more are cheaper to read than to compute again for every score


def modification(geometry: Geometry, indexer: Indexer, total: bool) -> tuple[Modification | None, tuple[Node, ...]]:
    """The modification that the masks of an attention make together, with the nodes it reads; None where they make
    none that can be printed. `total` tells that rows which see no key give 0."""
    nothing, extents, rows = (None, ()), geometry.symbols(), geometry.row_numbers()
    conditions, added, fills = list[Boolean](), list[object](), list[float]()
    summed = list[tuple[Term, object]]()
    for term in geometry.terms():
        value = _printable(term, indexer, extents)
        if not term.additive:
            if term.fill > HIDDEN:
                return nothing
            conditions.append(truth(value) if term.keeps else sympy.Not(truth(value)))
            fills.append(term.fill)
            continue
        summed.append((term, value))
        visible, hiding = _visible(value, term.factor)
        if hiding:
            conditions.append(visible)
            fills += hiding
        rest = _mapped(number(value), lambda leaf, factor=term.factor: _addend(leaf, factor))  # type: ignore[misc]
        if rest != ZERO:
            added.append(rest)
    finite = any(fill > float("-inf") for fill in fills)
    if finite and total:  # such rows would be the mean of all values beside those that are 0
        return nothing
    whole = sympy.to_nnf(sympy.And(*conditions), simplify=False)
    if whole == sympy.false:
        return nothing
    parts = conjuncts(whole)
    unknown = any(loads_of(leaf, indexer) for a in added for _, leaf in leaves(a))
    offsets = [p.upper for p in (read(part, extents, indexer) for part in parts) if p.upper is not None]
    seen = whole == sympy.true or sees_a_key(whole, offsets, extents, indexer)
    if finite and any(_may_pad(leaf, geometry, indexer) for a in added for _, leaf in leaves(a)):
        seen = False  # keys that only a finite number hides then count where those that are seen are padding
    sink = None
    if geometry.parts.sink is not None:
        term = geometry.term(geometry.parts.sink)
        sink = number(indexer.at(term.node, term.index))
        if any({extents.query, extents.key} & part.free_symbols for part in parts_of(sink)):
            return nothing
        finite, seen, unknown = False, True, False  # a row that sees no key gives 0, however it is hidden
    several = finite and not seen and not _average(geometry.terms(), fills, bool(added), unknown)
    if several and len(summed) < len(geometry.terms()):
        return nothing
    if several:
        added, parts, whole = [_sum_of_hiding(*one) for one in summed], [], sympy.true
        finite, unknown = False, True
    mask, visible, nodes = Mask("none"), whole, dict[str, Node]()
    if seen or not finite:
        found = [(part, read(part, extents, indexer)) for part in parts]
        proof = limited([limit for _, limit in found if not limit.failure], extents, indexer)
        if not isinstance(proof, str):
            mask, visible = proof.mask, sympy.And(*(part for part, limit in found if limit.failure))
            nodes |= {"position": proof.position} if proof.position is not None else {}
            nodes |= {"lengths": proof.lengths} if proof.lengths is not None else {}
    expressions = [_rebased(e, rows) for e in (*added, visible, *([sink] if sink is not None else []))]
    for expression in expressions:
        for part in parts_of(expression):
            for load in sorted(loads_of(part, indexer), key=str):
                head = load if load in indexer.loads else load.func
                nodes[str(head)] = indexer.loads[head]
    empty = "zero" if total else "none" if seen and not unknown else "nan"
    last = len(added)
    made = Modification(
        mask, tuple(expressions[:last]), expressions[last], finite and not seen, unknown, cast(Any, empty),
        tuple(nodes), expressions[-1] if sink is not None else None,
    )  # fmt: skip
    return made, tuple(nodes.values())


def says_more(op: Attention) -> bool:
    """Whether more is known of how scores are modified than that there is a tensor of it."""
    made = op.modification
    if made is None:
        return False
    alone = made.mask.kind == "none" and len(made.reads) == 1
    return not alone or bool(op.mask.tensor == "none")


def _may_pad(leaf: sympy.Expr, geometry: Geometry, indexer: Indexer) -> bool:
    """Whether a number that is added may be −∞ for whatever keys a row sees, as in a mask of padding: it is read, and
    is no bias of the heads."""
    heads = geometry.head_symbols
    return any(not heads & load.free_symbols for load in loads_of(leaf, indexer))


def _average(terms: Sequence[Term], fills: Sequence[float], biased: bool, unknown: bool) -> bool:
    """Whether a row that sees no key averages all values: every key is hidden by one and the same number, beside which
    nothing else counts: an `unknown` number that is added may be −∞, which is overwritten where it comes before."""
    alike = len(fills) == 1 or (len(set(fills)) == 1 and not any(term.additive for term in terms))
    kinds = [term.additive for term in terms]
    overwritten = not all(kinds) and kinds == sorted(kinds, reverse=True)
    return alike and (not biased or (fills[0] <= ABSORBING and (overwritten or not unknown)))


def _printable(term: Term, indexer: Indexer, extents: Extents) -> object:
    """The value of a term, or where that is a long formula or reads several tensors of queries × keys, one element."""
    value = indexer.at(term.node, term.index)
    atoms = list(parts_of(value))
    operations = sum(int(sympy.count_ops(a)) for a in atoms)
    tiles = {load for a in atoms for load in loads_of(a, indexer) if _is_tile(load, extents)}
    return indexer.element(term.node, term.index) if operations > MOST_OPERATIONS or len(tiles) > 1 else value


def _sum_of_hiding(term: Term, value: object) -> object:
    """What a term adds, for rows that several terms may hide wholly: those keys then count that the fewest hide. Twice
    the least number of a dtype is −∞."""
    least = torch.finfo(term.node.meta["val"].dtype).min

    def standing(leaf: sympy.Expr) -> sympy.Expr:
        hiding = _hiding(leaf, term.factor)
        if hiding is None or hiding > least:
            return leaf * sympy.Float(term.factor)
        return sympy.Float(LEAST) if hiding == least else sympy.S.NegativeInfinity

    return _mapped(number(value), standing)


def _is_tile(load: sympy.Expr, extents: Extents) -> bool:
    return bool({extents.query, extents.key} <= load.free_symbols)


def _visible(value: object, factor: float) -> tuple[Boolean, set[float]]:
    """Where an added value hides no key, and the numbers that hide one."""
    visible, fills = list[Boolean](), set[float]()
    for condition, leaf in leaves(value):
        constant = _hiding(leaf, factor)
        if constant is not None:
            fills.add(constant if constant >= LEAST else float("-inf"))
        else:
            visible.append(condition)
    return sympy.Or(*visible), fills


def _hiding(leaf: sympy.Expr, factor: float) -> float | None:
    """The number in a sum that is added to scores, where it hides a key whatever the rest is. In (m − 1) · 1e9, which
    hides where the unknown m is 0, the number is no larger than what m is multiplied with."""
    if leaf.is_number:
        constant = float(leaf) if leaf.is_extended_real else float("nan")
    else:
        known, rest = leaf.as_coeff_Add()
        constant = float(known)
        largest = max(abs(float(part.as_coeff_Mul()[0])) for part in sympy.Add.make_args(rest))
        if abs(constant) < OUTWEIGHED * largest:
            return None
    return constant * factor if constant * factor <= HIDDEN else None


def _addend(leaf: sympy.Expr, factor: float) -> sympy.Expr:
    if _hiding(leaf, factor) is not None:
        return ZERO
    return leaf if factor == 1.0 else leaf * sympy.Float(factor)


def _mapped(term: object, fn: Callable[[sympy.Expr], sympy.Expr]) -> object:
    """`fn` of every number that a term may be."""
    if isinstance(term, Choice):
        yes, no = _mapped(term.yes, fn), _mapped(term.no, fn)
        return yes if yes == no else Choice(term.condition, yes, no)
    return fn(cast(sympy.Expr, term))


def _rebased(term: object, rows: Mapping[sympy.Symbol, sympy.Expr]) -> object:
    if isinstance(term, Choice):
        return Choice(term.condition.xreplace(dict(rows)), _rebased(term.yes, rows), _rebased(term.no, rows))
    return cast(sympy.Basic, term).xreplace(dict(rows))
