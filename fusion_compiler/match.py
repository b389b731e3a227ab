"""Matches and near misses: what a pattern found in a graph, and what it almost found."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .candidates import Amount
from .fused import FusedOp, MatmulFamily, MatmulGroup, RowReduction, Site

if TYPE_CHECKING:
    from torch.fx import Node

    from .pattern import AnyPattern
    from .semantics import SemanticView

ATTENTION = "attention"


@dataclass(frozen=True)
class Match:
    """A place in the graph that computes `op`. `alternatives` are other fused ops for the same output, such as
    the same linear without the norm in front folded in; the judge takes the cheapest legal one.

    `prologue` are the nodes of a norm that the first form recomputes inside the kernel; the last of them holds its
    result. They may be read elsewhere: then they stay. `prologue_share` is the part of their cost that this match
    saves: the share of its weights among all that fold the same norm, 0 where something else reads the norm.

    `severed` are the seconds that Inductor would have saved by running the site's last operations together with what
    reads its results: what a kernel of its own costs besides."""

    pattern: str
    op: FusedOp
    site: Site
    alternatives: tuple[tuple[FusedOp, Site], ...] = ()
    prologue: tuple[Node, ...] = ()
    prologue_share: float = 1.0
    severed: Amount = 0.0


@dataclass(frozen=True)
class NearMiss:
    """The root of a pattern was there but not the rest: the node that broke it, and why, in a sentence. `root` is the
    node that would have been the output, where that is another one."""

    pattern: str
    node: Node
    reason: str
    root: Node


def find_all(view: SemanticView, patterns: Iterable[AnyPattern]) -> tuple[list[Match], list[NearMiss]]:
    """What every pattern found and almost found in a graph.

    What an earlier pattern matched, or a part of it, is no near miss of a later one: users' patterns come before the
    built-in ones, and of these a part (a norm) before the whole (a residual and its norm).
    """
    matches: list[Match] = []
    near_misses: list[NearMiss] = []
    for pattern in patterns:
        found, almost = pattern.find(view)
        taken = {n for m in matches if _says_of(m, pattern.name) for n in (*m.site.outputs, *m.site.interior)}
        # a chain behind a linear that a user has declared, for example, is one place
        known = {m.site for m in matches if isinstance(m.op, MatmulFamily)}
        matches += [m for m in found if m.site not in known]
        near_misses += [n for n in almost if n.root not in taken]
    # what was found there instead says enough, but a softmax says nothing of the whole that it might have been part of,
    # nor a linear behind pointwise operations of the norm in front of these
    said = {m.site.output for m in matches if m.pattern not in ("softmax", "activation_linear")}
    of_attention = {m.site.output for m in matches if _says_of(m, ATTENTION)}
    near_misses = [n for n in near_misses if not {n.node, n.root} & (of_attention if n.pattern == ATTENTION else said)]
    return _share_prologues(matches), near_misses


def _says_of(match: Match, pattern: str) -> bool:
    """Whether a match says enough of where `pattern` almost stood. A softmax and the linears that products of one head
    of one sequence are say nothing of the attention that these might have been part of."""
    parts = match.pattern == "softmax" or isinstance(match.op, (MatmulFamily, MatmulGroup, RowReduction))
    return not (pattern == ATTENTION and parts)


def _share_prologues(matches: list[Match]) -> list[Match]:
    """Divide the cost of each folded norm among the products that fold it."""
    folding: dict[Node, list[Match]] = {}
    for m in matches:
        if m.prologue:
            folding.setdefault(m.prologue[-1], []).append(m)
    shared = []
    for m in matches:
        share = 1.0
        if m.prologue:
            sharing = folding[m.prologue[-1]]
            inside = {node for other in sharing for node in other.site.interior}
            if any(user not in inside for node in m.prologue for user in node.users):
                share = 0.0
            else:
                stored = {w for other in sharing if not _packed(other) for w in _weights(other)}
                products = {w for other in sharing for w in _weights(other, stored)}
                share = len(_weights(m, stored)) / len(products)
        shared.append(replace(m, prologue_share=share))
    return shared


def _packed(match: Match) -> bool:
    return isinstance(match.op, (MatmulFamily, MatmulGroup)) and bool(match.op.whole.packed)


def _weights(match: Match, stored: Collection[Node] = ()) -> tuple[Node, ...]:
    """The weights behind a norm. A packed one is the one of `stored`, the weights that others read whole, that is
    computed from it."""
    op = match.op
    if not isinstance(op, (MatmulFamily, MatmulGroup)) or op.whole.norm is None:
        return ()
    if _packed(match) and (computed := tuple(n for n in match.site.interior if n in stored)):
        return computed
    found: list[Node] = []
    at = op.whole.head
    for part in op.parts:
        held = [p.operands for p in part.packed] or [1] * part.weights
        for operands in held:
            found.append(match.site.operands[at])
            at += operands
        at += len(part.extras)
    return tuple(found)
