"""The axes of an attention, sorted out.

The softmax runs over exactly the axis that is summed with the values: the keys. Every other axis of the scores is a
row:

    q, k and v vary along it     a batch or key/value-head axis
    only q varies along it       a query axis, or the heads of a group, which share k and v

From that follows how q, k, v, a mask and the result are arranged as [batch, heads, length, width].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import sympy
from torch.fx import Node

from ..fused import Mask
from . import arrangements, axes
from .axes import Atom, View
from .contraction import Operand
from .index_functions import Index
from .limits import Extents
from .masks import Term
from .refusals import NotAttention, UnlikeRepeats
from .scores import MaskSite
from .softmax import Scale


@dataclass(frozen=True)
class Row:
    """An axis of the scores other than the keys, with the atoms of q, k and v along it."""

    axis: int
    size: sympy.Expr
    q: Atom
    k: Atom
    v: Atom

    @property
    def shared(self) -> bool:
        """Whether k and v are the same all along the row."""
        return self.k.repeated and self.v.repeated


@dataclass(frozen=True)
class Parts:
    """The pieces of an attention. `q` and `k` are laid out by axes of the scores, `v` and `p` by those of `product`."""

    root: Node  # the softmax or the operator, for messages
    product: Node  # probabilities · v
    extents: tuple[sympy.Expr, ...]  # of the scores' axes
    keys: int  # the axis of the scores that the softmax runs over
    query_axis: int | None  # the axis of the scores that only q has
    q: Operand
    k: Operand
    v: Operand
    p: Operand
    probabilities: View  # what `p.node` is of the scores
    scale: float
    softcap: float | None
    masks: tuple[MaskSite, ...]
    known_mask: Mask | None = None
    factors: tuple[Scale, ...] = ()  # further scales, as tensors
    total: bool = False  # rows that see no key give 0
    chain: tuple[Node, ...] = ()  # nodes that hold scores or probabilities
    vendor: str = ""
    sink: MaskSite | None = None  # one more score per row, which no value is weighted with
    logarithm: MaskSite | None = None  # log Σ exp of the rows of scores, if it is computed
    quotient: Node | None = None  # the view of the product that is divided by the sums of the probabilities only then

    @property
    def value_dims(self) -> list[int]:
        """The dimensions of v that the probabilities do not have: its width."""
        pairs = zip(self.p.dims, self.v.dims, strict=True)
        return [d for p, d in pairs if d is not None and (p is None or not self.probabilities.dims[p])]


@dataclass(frozen=True)
class Geometry:
    """The axes of an attention, sorted out."""

    parts: Parts
    rows: tuple[Row, ...]
    batch: tuple[int, ...]  # indices into `rows`
    kv_heads: tuple[int, ...]
    groups: tuple[int, ...]
    queries: tuple[int, ...]
    kv_len: sympy.Expr
    v_dim: sympy.Expr

    @staticmethod
    def of(parts: Parts, q: View, k: View, v: View) -> Geometry:
        rows: list[Row] = []
        pairs: list[tuple[Atom, Atom]] = []
        for p_dim, v_dim in zip(parts.p.dims, parts.v.dims, strict=True):
            seen = parts.probabilities.dims[p_dim] if p_dim is not None else ()
            if not seen:
                continue
            values = v.dims[v_dim] if v_dim is not None else ()
            aligned = axes.align([seen, values or [axes.repeat(axes.product(a.size for a in seen))]])
            if aligned is None or any(a.repeated for a in seen):
                raise NotAttention(
                    parts.product, f"{parts.product.name} pairs values and probabilities of different axes"
                )
            pairs += [(a, b) for a, b in aligned]
        inner = parts.probabilities.dims[parts.p.inner]
        whole = Atom(parts.keys, axes.ONE, parts.extents[parts.keys])
        if inner != ((whole,) if not axes.same(whole.size, axes.ONE) else ()):
            raise NotAttention(
                parts.root, f"the softmax {parts.root.name} runs over another axis than {parts.product.name} sums"
            )
        for axis, extent in enumerate(parts.extents):
            if axis == parts.keys or axes.same(extent, axes.ONE):
                continue
            own_atoms = arrangements.in_order((a for a, _ in pairs if a.axis == axis), len(parts.extents)) or []
            if not axes.same(axes.product(a.size for a in own_atoms), extent):
                raise NotAttention(parts.product, f"{parts.product.name} does not read all the probabilities")
            columns: list[Sequence[Atom]] = [own_atoms, [next(b for a, b in pairs if a == s) for s in own_atoms]]
            for operand, view in ((parts.q, q), (parts.k, k)):
                dim = operand.dims[axis]
                own = view.dims[dim] if dim is not None else ()
                columns.append(list(own) or [axes.repeat(extent)])
            aligned = axes.align(columns)
            if aligned is None:
                raise NotAttention(parts.root, f"the heads around {parts.root.name} do not divide each other")
            for _, b, c, d in aligned:
                rows.append(Row(axis, b.size, c, d, b))
        rows = _joined(rows, parts)
        width = axes.product(a.size for d in parts.value_dims for a in v.dims[d])
        return _classified(parts, rows, parts.extents[parts.keys], width)

    def atoms(self, axis: int) -> list[Atom]:
        """The rows on an axis of the scores, as atoms whose axis is the row's number."""
        return [Atom(i, axes.ONE, r.size) for i, r in enumerate(self.rows) if r.axis == axis]

    @property
    def key(self) -> Atom:
        return Atom(len(self.rows), axes.ONE, self.kv_len)

    @property
    def value(self) -> Atom:
        return Atom(len(self.rows) + 1, axes.ONE, self.v_dim)

    def by_row(self, view: View) -> tuple[axes.Dim, ...] | None:
        """The dimensions of a view of the scores, in rows and the key axis."""
        extents = self.parts.extents
        dims = [[self.key] if a == self.parts.keys else self.atoms(a) for a in range(len(extents))]
        dims = [[] if axes.same(n, axes.ONE) else d for d, n in zip(dims, extents, strict=True)]
        below = View(view.source, tuple(map(tuple, dims)), view.dtype)
        found = view.through(below)
        return found.dims if found is not None else None

    def masked_rows(self) -> list[set[int]]:
        """For each mask the rows along which it varies, as far as views tell."""
        found: list[set[int]] = []
        for site in self.parts.masks:
            dims, view = self.by_row(site.scores), axes.trail(site.node, exact=False)[-1]
            rows: set[int] = set()
            for dim, own in zip((dims or ())[-len(view.dims) :], view.dims, strict=False):
                aligned = axes.align([dim, own]) if own else []
                varies = [(a, None) for a in dim] if aligned is None else [(r, a) for r, a in aligned]
                rows |= {cast(int, r.axis) for r, a in varies if a is None or not a.repeated}
            found.append(rows)
        return found

    def _heads(self) -> tuple[int, ...]:
        return self.kv_heads + self.groups

    def targets(self, side: str, view: View) -> list[list[Atom]] | None:
        """Batch, heads, length and width of q, k or v as atoms of the node that `view` is a view of."""
        parts = self.parts
        operand = {"q": parts.q, "k": parts.k, "v": parts.v}[side]
        dims: Sequence[Sequence[Atom]]
        if side == "v":
            by_row = self.by_row(parts.probabilities)
            if by_row is None:
                return None
            dims = [by_row[p] if p is not None else () for p in parts.p.dims]
        else:
            dims = [self.atoms(a) if a != parts.keys else () for a in range(len(parts.extents))]
        along: dict[int, Atom] = {}
        for own, dim in zip(operand.dims, dims, strict=True):
            atoms = view.dims[own] if own is not None else ()
            rows = list(dim)
            if not rows:
                continue
            aligned = axes.align([rows, list(atoms) or [axes.repeat(axes.product(r.size for r in rows))]])
            if aligned is None or len(aligned) != len(rows):
                return None
            along.update({cast(int, r.axis): a for r, a in aligned})
        heads = self._heads() if side == "q" else self.kv_heads
        if side == "q":
            length = [along[i] for i in self.queries]
            width = view.dims[operand.inner]
        elif side == "k":
            length = list(view.dims[cast(int, operand.dims[parts.keys])])
            width = view.dims[operand.inner]
        else:
            length = list(view.dims[operand.inner])
            width = tuple(a for d in parts.value_dims for a in view.dims[d])
        return [[along[i] for i in self.batch], [along[i] for i in heads], length, list(width)]

    def result(self, view: View) -> arrangements.Arrangement | None:
        """How [batch, heads, queries, width] becomes a view of the product."""
        by_row = self.by_row(self.parts.probabilities)
        if by_row is None:
            return None
        dims = [by_row[p] if p is not None and by_row[p] else None for p in self.parts.p.dims]
        shape = axes.shape_of(self.parts.product)
        width = [() if axes.same(n, axes.ONE) else (self.value,) for n in shape]
        own = tuple(d if d is not None else w for d, w in zip(dims, width, strict=True))
        found = view.through(View(view.source, own, view.dtype))
        order = [*self.batch, *self._heads(), *self.queries]
        atoms = [Atom(i, axes.ONE, self.rows[i].size) for i in order]
        if not axes.same(self.v_dim, axes.ONE):
            atoms.append(self.value)
        return arrangements.arrangement(atoms, found.dims) if found is not None else None

    def statistic(self, site: MaskSite) -> arrangements.Arrangement | None:
        """How [batch, heads, queries] becomes a number for each row of the scores that meet `site`."""
        dims = self.by_row(site.scores)
        if dims is None:
            return None
        rows = [d for d in dims if self.key not in d]
        kept = [() if self.key in d else d for d in dims]
        order = [*self.batch, *self._heads(), *self.queries]
        atoms = [Atom(i, axes.ONE, self.rows[i].size) for i in order]
        return arrangements.arrangement(atoms, rows if len(axes.shape_of(site.node)) == len(rows) else kept)

    @property
    def result_shape(self) -> tuple[sympy.Expr, ...]:
        """[batch, heads, queries, width]."""
        rows = (self.batch, self._heads(), self.queries)
        return (*(axes.product(self.rows[i].size for i in own) for own in rows), self.v_dim)

    def mask(self, view: View, dims: tuple[axes.Dim, ...]) -> arrangements.Arrangement | None:
        """How a mask that meets scores of the dimensions `dims` becomes one over [batch, heads, queries, keys]."""
        along: dict[int, Atom] = {}
        for own, dim in zip(view.dims, dims[len(dims) - len(view.dims) :], strict=True):
            if own:
                aligned = axes.align([dim, own])
                if aligned is None or len(aligned) != len(dim):
                    return None
                along.update({cast(int, r.axis): a for r, a in aligned})
        wanted = (self.batch, self._heads(), self.queries, (len(self.rows),))
        targets = [[along[i] for i in rows if i in along] for rows in wanted]
        if any(t and len(t) != len(rows) for t, rows in zip(targets, wanted, strict=True)):
            return None
        return arrangements.arranged(view.source, targets)

    def row_scale(self, factor: Scale) -> arrangements.Arrangement | None:
        """How what scales the scores becomes a number for each row [batch, heads, queries, 1]; None for one number."""
        shape = axes.shape_of(factor.node)
        if axes.same(axes.product(shape), axes.ONE):
            return None
        dims = self.by_row(factor.over) if factor.over is not None else None
        found = self.mask(View.of(factor.node), dims) if dims is not None else None
        if found is None or not axes.same(found.shape[3], axes.ONE):
            raise NotAttention(
                factor.node,
                f"scores are scaled by {factor.node.name}, a tensor of {'×'.join(map(str, shape))}; one that is the "
                "same for all keys is put on the queries, and keys can be scaled before the product",
            )
        return found

    # ---- symbols ----------------------------------------------------------------------------
    def _symbol(self, i: int) -> sympy.Symbol:
        name = "key" if i == len(self.rows) else "query" if i in self.queries else f"row{i}"
        return sympy.Symbol(name, integer=True, nonnegative=True)

    @property
    def head_symbols(self) -> set[sympy.Symbol]:
        return {self._symbol(i) for i in self._heads()}

    def symbols(self) -> Extents:
        extent = {self._symbol(i): r.size for i, r in enumerate(self.rows)}
        key = self._symbol(len(self.rows))
        query = self._symbol(self.queries[0]) if self.queries else sympy.Integer(0)
        batch = self._symbol(self.batch[0]) if len(self.batch) == 1 else None
        return Extents(query, key, {**extent, key: self.kv_len}, batch)

    def terms(self) -> tuple[Term, ...]:
        """The masks as they meet the scores."""
        return tuple(map(self.term, self.parts.masks))

    def term(self, site: MaskSite) -> Term:
        dims = self.by_row(site.scores)
        if dims is None:
            raise NotAttention(site.node, f"the mask {site.node.name} meets the scores across their axes")
        return Term(site.node, self.index(dims, site.node), site.additive, site.keeps, site.fill, site.factor)

    def row_numbers(self) -> dict[sympy.Symbol, sympy.Expr]:
        """The symbols of batch and heads as digits of the numbers `batch` and `head`."""
        found: dict[sympy.Symbol, sympy.Expr] = {}
        for name, rows in (("batch", self.batch), ("head", self._heads())):
            number, inner = sympy.Symbol(name, integer=True, nonnegative=True), sympy.Integer(1)
            for i in reversed(rows):
                digit = sympy.floor(number / inner)
                found[self._symbol(i)] = sympy.Mod(digit, self.rows[i].size) if i != rows[0] else digit
                inner *= self.rows[i].size
        return found

    def index(self, dims: Sequence[axes.Dim], node: Node) -> Index:
        """Where a tensor that broadcasts to `dims` is read for the score at the symbols."""
        index: list[sympy.Expr] = []
        shape = axes.shape_of(node)
        for dim, size in zip(dims[len(dims) - len(shape) :], shape, strict=True):
            total: sympy.Expr = sympy.Integer(0)
            for atom in dim:
                number = cast(int, atom.axis)
                digit, extent = self._symbol(number), [*(r.size for r in self.rows), self.kv_len][number]
                if not axes.same(atom.size, extent):
                    digit = sympy.Mod(sympy.floor(digit / atom.step), atom.size)
                total = total * atom.size + digit
            index.append(sympy.Integer(0) if axes.same(size, axes.ONE) else total)
        return tuple(index)


def _joined(rows: list[Row], parts: Parts) -> list[Row]:
    """Rows that are neighbours in the scores and in all three operands are one."""
    joined: list[Row] = []
    for row in rows:
        if joined and joined[-1].axis == row.axis and not row.shared:
            last = joined[-1]
            columns = [axes.join((getattr(last, s), getattr(row, s))) for s in "qkv"]
            if all(len(c) == 1 for c in columns) and last.shared == row.shared:
                (q,), (k,), (v,) = columns
                joined[-1] = Row(row.axis, last.size * row.size, q, k, v)
                continue
        joined.append(row)
    return joined


def _classified(parts: Parts, rows: Sequence[Row], kv_len: sympy.Expr, width: sympy.Expr) -> Geometry:
    mixed = next((r for r in rows if r.k.repeated != r.v.repeated), None)
    if mixed is not None:
        raise UnlikeRepeats(parts.root, f"keys and values of {parts.root.name} are not repeated alike")
    own = [i for i, r in enumerate(rows) if not r.shared]
    shared = [i for i, r in enumerate(rows) if r.shared]
    # heads of a group are part of the same axis of q as the key/value heads, wherever they were moved
    on_head_axis = [i for i in shared if own and rows[i].q.axis == rows[own[-1]].q.axis]
    queries = [i for i in shared if rows[i].axis == parts.query_axis and i not in on_head_axis]
    unsorted = Geometry(parts, tuple(rows), (), (), (), (), kv_len, width)
    if parts.masks:  # a mask tells queries from the heads of a group, which it is the same for
        masked = [[i for i in queries if i in varying] for varying in unsorted.masked_rows()]
        queries = min((m for m in masked if m), key=len, default=queries)[-1:]
    groups = tuple(i for i in shared if i not in queries)
    lone_batch = len(own) == 1 and bool(groups) and not on_head_axis
    heads = [] if lone_batch else own[-1:]
    if len(own) > 2:  # heads that keys or values hold in two axes are one axis of q
        on_axis = [i for i in own if rows[i].q.axis == rows[own[-1]].q.axis]
        heads = on_axis if len(on_axis) < len(own) else heads
    batch = [i for i in own if i not in heads]
    return replace(unsorted, batch=tuple(batch), kv_heads=tuple(heads), groups=groups, queries=tuple(queries))
