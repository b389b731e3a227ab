"""Finds linears whose input is computed element by element by operations that nobody else needs: act(…)·Wᵀ.

The operations are taken back as far as their results are read here alone; what they read is then the input of the
linear's kernel, whatever stands behind the linear being its epilogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.fx import Node

from . import matmul_family
from .algebra import POINTWISE, Value
from .linear_chains import chains
from .match import Match, NearMiss
from .matmul_epilogue import Epilogue, Refused
from .matmul_family import Family
from .semantics import SemanticView
from .shapes import extent
from .sites import site_of

PATTERN = "activation_linear"
LONGEST = 32  # operations; a kernel repeats them in every block of columns


def find_activation_linear(view: SemanticView) -> tuple[list[Match], list[NearMiss]]:
    """Every linear with an activation in front, and those whose activation cannot be part of a kernel."""
    matches, near_misses = [], []
    for linear in view.linears():
        opened = _opened(view, linear)
        family = _plain(view, linear) if opened else None
        if family is None:
            continue
        found = _activated(view, family, linear.args[0], opened)
        if isinstance(found, str):
            near_misses.append(NearMiss(PATTERN, family.site.operands[0], found, family.site.output))
        else:
            matches.append(Match(PATTERN, found.op, found.site))
    return matches, near_misses


def _plain(view: SemanticView, linear: Value) -> Family | None:
    """The linear with the longest chain behind it that can be an epilogue; None behind a norm, which is better folded,
    and where it is part of something else."""
    for chain in chains(view, linear):
        root, output = view.value(chain.root), chain.output(view)
        families = matmul_family.build(view, root, output, chain.border) if output is not None else ""
        if not isinstance(families, str):
            return families[0] if families[0].op.norm is None and not families[0].op.computed_from else None
    return None


def _opened(view: SemanticView, linear: Value) -> list[Value]:
    """The pointwise operations that x is computed by, x first, as far back as nobody else reads what they give."""
    taken = {p.node for p in view.products(linear)}
    found: list[Value] = []
    pending = [linear.args[0]]
    while pending and len(found) < LONGEST:
        value = pending.pop()
        held = view.nodes(value)
        if value in found or value.op not in POINTWISE or value.op == "const" or not _only_read_by(held, taken):
            continue
        found.append(value)
        taken.update(held)
        pending += value.args
    return found


def _only_read_by(held: Sequence[Node], taken: set[Node]) -> bool:
    """Whether all readers of some nodes, but for these themselves and views that nobody reads, are among `taken`."""
    readers = {user for node in held for user in node.users if user.users or user.op == "output"}
    return all(user in taken or user in held for user in readers)


def _activated(view: SemanticView, family: Family, x: Value, opened: list[Value]) -> Family | str:
    op, site = family.op, family.site
    rewriter = Epilogue(view, (), (), (extent(op.m), extent(op.k)), opened)
    try:
        activation = rewriter.rewritten(x)
    except Refused as refusal:
        return str(refusal)
    inputs, nodes = zip(*rewriter.extras, strict=True) if rewriter.extras else ((), ())
    if not any(given.kind == "full" for given in inputs):
        return "its input is computed from no tensor with the elements of its rows"
    made = replace(op, activation=activation, inputs=inputs)
    operands = (*nodes, *site.operands[1:])
    if any(matmul_family.reaches_far(node) for node in nodes):
        return "an input reaches over 2³¹ elements of memory, and kernels count in 32 bits; make it contiguous"
    return Family(made, site_of(view, site.output, operands))
