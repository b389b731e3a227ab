"""Views as factorised axes.

Every dimension of a view is an ordered list of `Atom`s, outermost first. An atom is a run of indices along one axis of
the view's source: index i of the atom moves the source's index by i · step. A repeated atom is an axis the source does
not have: all its indices read the same element. Then

    permute reorders dimensions, reshape splits and joins lists of atoms, expand adds repeated atoms,
    copies are the same view, dimensions of size 1 have no atoms.

So [B, Hkv·g, S, D] built by `repeat_kv` has the heads [Hkv, repeat g], and the tiled order is [repeat g, Hkv].
Sizes are sympy expressions; what is not provably equal counts as different, and no guard is installed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch.fx import Node

aten = torch.ops.aten
prims = torch.ops.prims

ONE = sympy.Integer(1)


def size_of(value: int | torch.SymInt | sympy.Expr) -> sympy.Expr:
    """A size as a sympy expression."""
    if isinstance(value, sympy.Basic):
        return value
    return cast(sympy.Expr, value.node.expr) if isinstance(value, torch.SymInt) else sympy.Integer(value)


def shape_of(node: Node) -> tuple[sympy.Expr, ...]:
    """Shape of a tensor node."""
    return tuple(size_of(s) for s in node.meta["val"].shape)


def same(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two sizes are known to be equal."""
    if a == b or (a.is_Integer and b.is_Integer):
        return bool(a == b)
    return bool(sympy.expand(a - b) == 0)


def same_shape(a: Sequence[sympy.Expr], b: Sequence[sympy.Expr]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """a / b where b is known to divide a."""
    if a.is_Integer and b.is_Integer:
        return sympy.Integer(int(a) // int(b)) if b != 0 and int(a) % int(b) == 0 else None
    ratio = sympy.cancel(a / b)
    return ratio if ratio.is_integer and sympy.fraction(ratio)[1] == 1 else None


def product(sizes: Iterable[sympy.Expr]) -> sympy.Expr:
    return sympy.Mul(*sizes)


@dataclass(frozen=True)
class Atom:
    """A run of `size` indices along `axis` of the source, `step` apart; repeated where `axis` is None."""

    axis: int | None
    step: sympy.Expr
    size: sympy.Expr

    @property
    def repeated(self) -> bool:
        return self.axis is None

    def split(self, inner: sympy.Expr) -> tuple[Atom, Atom]:
        """The atom as an outer and an inner one, the inner of the given size, which must divide this one's."""
        outer = quotient(self.size, inner)
        assert outer is not None, f"{inner} does not divide {self.size}"
        return Atom(self.axis, self.step * (1 if self.repeated else inner), outer), Atom(self.axis, self.step, inner)


def repeat(size: sympy.Expr) -> Atom:
    return Atom(None, ONE, size)


Dim = tuple[Atom, ...]


def join(atoms: Iterable[Atom]) -> Dim:
    """The same list with neighbours that are one run put together."""
    joined: list[Atom] = []
    for atom in atoms:
        if joined and joined[-1].axis == atom.axis and (atom.repeated or same(joined[-1].step, atom.step * atom.size)):
            joined[-1] = Atom(atom.axis, atom.step, joined[-1].size * atom.size)
        else:
            joined.append(atom)
    return tuple(joined)


def align(columns: Sequence[Sequence[Atom]]) -> list[tuple[Atom, ...]] | None:
    """Splits the lists of atoms, which factorise one and the same extent, until they have equal sizes row by row.

    None where the factorisations have no common refinement, such as 6 = 2·3 and 6 = 3·2.
    """
    stacks = [list(c) for c in columns]
    rows: list[tuple[Atom, ...]] = []
    while all(stacks):
        tails = [s.pop() for s in stacks]
        inner = min(tails, key=lambda a: _rank(a.size)).size
        for i, atom in enumerate(tails):
            if same(atom.size, inner):
                continue
            if quotient(atom.size, inner) is None:
                return None
            outer, tails[i] = atom.split(inner)
            stacks[i].append(outer)
        rows.append(tuple(tails))
    return rows[::-1] if not any(stacks) else None


def _rank(size: sympy.Expr) -> tuple[int, int]:
    """Order in which a size can divide another: fewer symbols first, then the smaller number."""
    coefficient, rest = size.as_coeff_Mul()
    return len(sympy.Mul.make_args(rest)) if rest != 1 else 0, int(coefficient)


@dataclass(frozen=True)
class View:
    """A tensor as an arrangement of the atoms of `source`, times `scale`, in `dtype`."""

    source: Node
    dims: tuple[Dim, ...]
    dtype: torch.dtype
    scale: float = 1.0

    @staticmethod
    def of(node: Node) -> View:
        """The view of a node that is the node itself."""
        dims = tuple(() if same(n, ONE) else (Atom(axis, ONE, n),) for axis, n in enumerate(shape_of(node)))
        return View(node, dims, node.meta["val"].dtype)

    @property
    def shape(self) -> tuple[sympy.Expr, ...]:
        return tuple(product(a.size for a in d) for d in self.dims)

    def with_dims(self, dims: Iterable[Iterable[Atom]]) -> View:
        return View(self.source, tuple(join(d) for d in dims), self.dtype, self.scale)

    def permute(self, order: Sequence[int]) -> View:
        return self.with_dims(self.dims[d] for d in order)

    def reshape(self, shape: Sequence[sympy.Expr]) -> View | None:
        """The view with its atoms dealt out anew; None where the new shape cuts across an atom."""
        targets = [repeat(n) for n in shape if not same(n, ONE)]
        rows = align([[a for d in self.dims for a in d], targets])
        if rows is None:
            return None
        atoms, dims = [row[0] for row in rows], list[Dim]()
        for n in shape:
            taken: list[Atom] = []
            while not same(product(a.size for a in taken), n):
                if not atoms:
                    return None
                taken.append(atoms.pop(0))
            dims.append(tuple(taken))
        return self.with_dims(dims)

    def expand(self, shape: Sequence[sympy.Expr]) -> View:
        """Broadcast to `shape`: new dimensions in front, and those of size 1 repeated."""
        dims: list[Dim] = [()] * (len(shape) - len(self.dims)) + list(self.dims)
        return self.with_dims(d or (() if same(n, ONE) else (repeat(n),)) for d, n in zip(dims, shape, strict=True))

    def take(self, atom: Atom) -> Dim | None:
        """The atoms of this view's source that `atom`, an atom of this view, stands for."""
        if atom.axis is None:
            return (atom,)
        dim = self.dims[atom.axis]
        extent = product(a.size for a in dim)
        outer = quotient(extent, atom.step * atom.size)
        if outer is None:
            return None
        rows = align([dim, [repeat(n) for n in (outer, atom.size, atom.step) if not same(n, ONE)]])
        if rows is None:
            return None
        atoms, inner, taken = [row[0] for row in rows], ONE, list[Atom]()
        while atoms and not same(inner, atom.step):
            inner *= atoms.pop().size
        while atoms and not same(product(a.size for a in taken), atom.size):
            taken.insert(0, atoms.pop())
        return tuple(taken)

    def through(self, inner: View) -> View | None:
        """This view of a tensor that is itself the view `inner` of another."""
        dims: list[list[Atom]] = []
        for dim in self.dims:
            parts = [inner.take(a) for a in dim]
            if any(p is None for p in parts):
                return None
            dims.append([a for p in parts if p is not None for a in p])
        return View(inner.source, tuple(join(d) for d in dims), self.dtype, self.scale * inner.scale)


# ---- one step down the graph ----------------------------------------------------------------------

COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten.alias.default, aten.lift_fresh_copy.default})
RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.squeeze.dim,
                      aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default})  # fmt: skip
SWAPS = frozenset({aten.permute.default, aten.transpose.int, aten.t.default})
REPEATS = frozenset({aten.expand.default, aten.repeat.default, aten.cat.default})
CASTS = frozenset({prims.convert_element_type.default, aten._to_copy.default})
VIEWS = RESHAPES | SWAPS | COPIES | {aten.expand.default}


def is_size_preserving_view(node: Node) -> bool:
    """Whether the node shows every element of its input once: any view or copy that repeats and drops nothing."""
    return node.target in (RESHAPES | SWAPS | COPIES) or (
        node.target is aten.expand.default and same_shape(shape_of(node), shape_of(cast(Node, node.args[0])))
    )


def step(node: Node) -> View | None:
    """The node as a view of its first input; None where it is no view."""
    if node.target is aten.cat.default:
        return _copies_of_one(node)
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    if not isinstance(node.args[0].meta.get("val"), torch.Tensor):
        return None  # one of several results
    below = View.of(node.args[0])
    target: Any = node.target
    if target in SWAPS:
        rank = len(below.dims)
        order = list(range(rank))
        if target is aten.permute.default:
            order = [int(d) % rank for d in cast(Sequence[int], node.args[1])]
        elif rank >= 2:
            a, b = (0, 1) if target is aten.t.default else (int(cast(int, d)) % rank for d in node.args[1:3])
            order[a], order[b] = order[b], order[a]
        return below.permute(order)
    if target in RESHAPES:
        return below.reshape(shape_of(node))
    if target is aten.expand.default:
        return below.expand(shape_of(node))
    if target is aten.repeat.default:
        counts = [size_of(n.meta["val"] if isinstance(n, Node) else n) for n in cast(Sequence[Any], node.args[1])]
        dims: list[Dim] = [()] * (len(counts) - len(below.dims)) + list(below.dims)
        return below.with_dims(d if same(n, ONE) else (repeat(n), *d) for d, n in zip(dims, counts, strict=True))
    if target in COPIES:
        return below
    if target is aten.slice.Tensor and same_shape(shape_of(node), shape_of(node.args[0])):
        return below
    return None


def _copies_of_one(node: Node) -> View | None:
    """A concatenation of one tensor with itself as a view of it."""
    parts = cast(Sequence[Node], node.args[0])
    if len(set(parts)) != 1:
        return None
    below, dim = View.of(parts[0]), int(cast(int, node.args[1] if len(node.args) > 1 else 0))
    dims = list(below.dims)
    dims[dim] = (repeat(sympy.Integer(len(parts))), *dims[dim])
    return below.with_dims(dims)


def scalar_of(argument: Any) -> float | None:
    """The number that an argument is: a Python number, a full/0-d constant of the graph, or one computed from those."""
    if isinstance(argument, (int, float)):
        return float(argument)
    if not isinstance(argument, Node):
        return None
    if argument.op == "get_attr":
        held = getattr(argument.graph.owning_module, str(argument.target), None)
        # a constant of the program; fake tensors hold no value
        return float(held) if type(held) is torch.Tensor and held.numel() == 1 else None
    if argument.target is aten.full.default:
        return scalar_of(argument.args[1])
    if argument.target is aten.scalar_tensor.default or argument.target in CASTS or argument.target in VIEWS:
        return scalar_of(argument.args[0])
    formula = FORMULAS.get(getattr(argument.target, "overloadpacket", None))
    if formula is None or argument.kwargs:
        return None
    known = [scalar_of(a) for a in argument.args]
    try:
        return None if None in known else float(formula(*known))
    except (ArithmeticError, ValueError):
        return None


# Arithmetic of constants, such as a scale written 1 / torch.sqrt(torch.tensor(d)).
FORMULAS: dict[Any, Callable[..., float]] = {
    aten.add: operator.add, aten.sub: operator.sub, aten.mul: operator.mul, aten.div: operator.truediv,
    aten.neg: operator.neg, aten.abs: abs, aten.pow: math.pow, aten.sqrt: math.sqrt, aten.exp: math.exp,
    aten.log: math.log, aten.rsqrt: lambda x: 1 / math.sqrt(x), aten.reciprocal: lambda x: 1 / x,
    aten.ge: operator.ge, aten.where: lambda condition, yes, no: yes if condition else no,
}  # fmt: skip


def scaling(node: Node) -> tuple[Node, float] | None:
    """(x, c) where the node is x · c or x / c for a number c that is neither 0 nor infinite."""
    if node.target not in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar) or len(node.args) != 2:
        return None
    a, b = node.args
    divides = node.target in (aten.div.Tensor, aten.div.Scalar)
    if not isinstance(a, Node) or (scalar_of(b) is None and not divides):
        a, b = b, a
    c = scalar_of(b)
    if not isinstance(a, Node) or not c or not same_shape(shape_of(a), shape_of(node)):
        return None
    factor = 1.0 / c if divides else c
    return (a, factor) if math.isfinite(factor) else None


def widens(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every value of the floating dtype `narrow` is one of `wide`."""
    return narrow.is_floating_point and wide.is_floating_point and torch.promote_types(narrow, wide) == wide


def trail(node: Node, *, scaled: bool = False, exact: bool = True) -> list[View]:
    """The node as a view of itself, of its input, of that one's input, and so on, as deep as views go.

    Casts are looked through where no value changes (widening ones, and narrowing ones that undo a widening), or all of
    them if not `exact`. With `scaled`, so are products with a number; they gather in `View.scale`.
    """
    views = [View.of(node)]
    while True:
        last = views[-1]
        below, factor = step(last.source), 1.0
        if below is None and last.source.target in CASTS and _same_device(last.source):
            below = View.of(cast(Node, last.source.args[0]))
        if below is None and scaled and (found := scaling(last.source)) is not None:
            below, factor = View.of(found[0]), found[1]
        further = last.through(below) if below is not None else None
        if further is None:
            break
        views.append(View(further.source, further.dims, last.dtype, last.scale * factor))
    return [v for i, v in enumerate(views) if not exact or _exact([u.source.meta["val"].dtype for u in views[: i + 1]])]


def _same_device(node: Node) -> bool:
    return bool(node.meta["val"].device == cast(Node, node.args[0]).meta["val"].device)


def _exact(dtypes: Sequence[torch.dtype]) -> bool:
    """Whether a value cast through these dtypes, the last first, is the one cast from the last to the first."""
    return all(widens(dtypes[-1], dtype) for dtype in dtypes) or len(set(dtypes)) == 1


def above_repeats(views: Sequence[View]) -> list[View]:
    """The part of a trail above all repeats; where a copy writes the repeated tensor out, down to that copy."""
    above = [v for v in views if not any(a.repeated for dim in v.dims for a in dim)]
    if len(above) > 1 and above[-1].source.target in REPEATS and above[-2].source.target in COPIES:
        above.pop()
    return above


def unrepeated(views: Sequence[View]) -> list[View]:
    """The part of a trail below all repeats, copies, scales and casts: what a kernel may read."""
    first = 0
    for i, view in enumerate(views[:-1]):
        target = view.source.target
        repeats = target in REPEATS and not is_size_preserving_view(view.source)
        if repeats or target in COPIES or (step(view.source) is None):
            first = i + 1
    return list(views[first:])
