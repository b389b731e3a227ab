"""From atoms back to operations: which reshape, permute and expand make one tensor of another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
from torch.fx import Node

from .axes import ONE, Atom, product, same, same_shape, shape_of


@dataclass(frozen=True)
class Arrangement:
    """reshape to `split`, permute by `order`, reshape to `merged`, expand to `shape`."""

    split: tuple[sympy.Expr, ...]
    order: tuple[int, ...]
    merged: tuple[sympy.Expr, ...]
    shape: tuple[sympy.Expr, ...]

    def changes_nothing(self, shape: Sequence[sympy.Expr]) -> bool:
        in_order = list(self.order) == sorted(self.order)
        return in_order and same_shape(shape, self.merged) and same_shape(self.merged, self.shape)


def in_order(atoms: Iterable[Atom], rank: int) -> list[Atom] | None:
    """The atoms as they lie in a source of `rank` dimensions, outermost first; None where two of them overlap."""
    ordered: list[Atom] = []
    left = [a for a in atoms if not a.repeated]
    for axis in range(rank):
        run, reached = list[Atom](), ONE
        while (inner := next((a for a in left if a.axis == axis and same(a.step, reached)), None)) is not None:
            left.remove(inner)
            run.insert(0, inner)
            reached = inner.step * inner.size
        ordered += run
    return ordered if not left else None


def arranged(source: Node, targets: Sequence[Sequence[Atom]]) -> Arrangement | None:
    """How a node becomes a tensor whose dimensions are `targets`, lists of the node's atoms; None if it cannot."""
    atoms = in_order((a for t in targets for a in t), len(shape_of(source)))
    whole = atoms is not None and same(product(a.size for a in atoms), product(shape_of(source)))
    return arrangement(atoms, targets) if atoms is not None and whole else None


def arrangement(atoms: Sequence[Atom], targets: Sequence[Sequence[Atom]]) -> Arrangement | None:
    """How a tensor made of `atoms` in this order becomes one whose dimensions are `targets`; None without a copy of
    repeated elements."""
    wanted = [[a for a in t if not a.repeated] for t in targets]
    flat = [a for t in wanted for a in t]
    if sorted(map(str, flat)) != sorted(map(str, atoms)):
        return None
    if any(w and len(w) != len(t) for w, t in zip(wanted, targets, strict=True)):
        return None
    # atoms that are neighbours before and after, within one dimension, need not be told apart
    places = {a: (d, i) for d, t in enumerate(wanted) for i, a in enumerate(t)}
    runs: list[list[Atom]] = []
    for atom in atoms:
        if runs and places[runs[-1][-1]] == (places[atom][0], places[atom][1] - 1):
            runs[-1].append(atom)
        else:
            runs.append([atom])
    ordered = sorted(range(len(runs)), key=lambda r: places[runs[r][0]])
    return Arrangement(
        tuple(product(a.size for a in run) for run in runs),
        tuple(ordered),
        tuple(product(a.size for a in w) for w in wanted),
        tuple(product(a.size for a in t) for t in targets),
    )
