"""Keys and values that are gathered from pages: cache[table], seen as [batch, heads, positions, width].

The blocks that a table names are put one after another, in whatever order of axes; the last one may be cut. What is put
to zero because the mask hides it need not be: a kernel does not read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import sympy
import torch
from torch.fx import Node

from ..fused import Layout, Mask, Pages
from . import axes
from .axes import ONE, Atom, Dim, View
from .choices import ZERO
from .index_functions import Indexer
from .limits import Extents
from .masks import Term, prove

aten = torch.ops.aten
BATCH, HEADS, KEYS, WIDTH = range(4)


@dataclass(frozen=True)
class Gathered:
    """`cache` [blocks, …] and `table` [B, most blocks], from which keys or values are gathered."""

    pages: Pages
    cache: Node
    table: Node

    def beside(self, other: Gathered) -> bool:
        """Whether one table serves both."""
        blocks, others = (axes.shape_of(g.cache)[0] for g in (self, other))
        return self.pages == other.pages and self.table is other.table and axes.same(blocks, others)


def by_axes(node: Node, layout: Layout) -> View | None:
    """`node` as [batch, heads, keys, width], as its layout says. The width may be that of codes."""
    split, merged, shape = ([axes.size_of(n) for n in sizes] for sizes in (layout.split, layout.merged, layout.shape))
    if not axes.same_shape(merged, shape):
        return None
    whole, width = axes.shape_of(node), len(split) - 1
    if len(split) == len(merged) and axes.same_shape(whole[:-1], split[:-1]):  # codes of fewer elements
        split[width] = whole[-1]
        merged[layout.order.index(width)] = whole[-1]
    view = View.of(node).reshape(split)
    return view.permute(layout.order).reshape(merged) if view is not None else None


def gathered(view: View, mask: Mask, lengths: Node | None, indexer: Indexer) -> Gathered | None:
    """The pages that a tensor [batch, heads, keys, width] is gathered from."""
    found: View | None = view
    while found is not None and found.source.target is not aten.index.Tensor:
        below = axes.step(found.source)
        if below is not None:
            found = found.through(below)
        elif found.source.target is aten.slice.Tensor:
            found = _uncut(found)
        else:
            kept = unzeroed(found, mask, lengths, indexer)
            found = kept if kept is not found else None
    return _pages(found) if found is not None else None


def unzeroed(view: View, mask: Mask, lengths: Node | None, indexer: Indexer) -> View:
    """The view without what puts zeros where `mask`, with its operand `lengths`, hides the key."""
    node = view.source
    if node.target is not aten.where.self or mask.kind not in ("none", "causal", "length") or mask.empty_rows == "mean":
        return view
    condition, yes, no = cast("tuple[Node, Any, Any]", node.args)
    keeps = axes.scalar_of(no) == 0.0
    kept = yes if keeps else no
    index, extents = _indices(view)
    if not isinstance(kept, Node) or not (keeps or axes.scalar_of(yes) == 0.0) or index is None:
        return view
    if not axes.same_shape(axes.shape_of(kept), axes.shape_of(node)):
        return view
    shape = axes.shape_of(condition)
    own = index[len(index) - len(shape) :]
    at = tuple(ZERO if n == 1 else i for n, i in zip(shape, own, strict=True))
    proof = prove([Term(condition, at, additive=False, keeps=keeps, fill=float("-inf"))], extents, indexer)
    return replace(view, source=kept) if _hides(mask, lengths, proof.mask, proof.lengths, extents) else view


def _hides(mask: Mask, lengths: Node | None, keeps: Mask, kept: Node | None, extents: Extents) -> bool:
    """Whether what `keeps` does not keep is hidden by `mask`."""
    if keeps.kind == "none":
        return True
    if keeps.kind != "length" or keeps.position or (keeps.window, keeps.chunk) != (None, None):
        return False
    if not extents.never_negative(axes.size_of(keeps.offset) - extents.kv_len + 1):
        return False
    padding = keeps.padding
    return padding is None or (mask.padding is not None and mask.padding <= padding and lengths is kept)


def _indices(view: View) -> tuple[tuple[sympy.Expr, ...] | None, Extents]:
    """Where the source is read for a batch element and a key, the other axes left open; None if by parts of axes."""
    batch, key = (sympy.Symbol(n, integer=True, nonnegative=True) for n in ("stored_batch", "stored_key"))
    shape = axes.shape_of(view.source)
    extents = {batch: ONE, key: ONE}
    read: list[sympy.Expr] = [ZERO] * len(shape)
    for place, dim in enumerate(view.dims):
        if not dim:
            continue
        if len(dim) != 1 or dim[0].axis is None or not axes.same(dim[0].size, shape[dim[0].axis]):
            return None, Extents(ZERO, key, extents, batch)
        axis = dim[0].axis
        if place in (BATCH, KEYS):
            read[axis] = batch if place == BATCH else key
            extents[read[axis]] = shape[axis]
        else:
            read[axis] = sympy.Symbol(f"stored_{place}", integer=True, nonnegative=True)
            extents[read[axis]] = shape[axis]
    return tuple(read), Extents(ZERO, key, extents, batch)


def _uncut(view: View) -> View | None:
    """A view of a slice that keeps the first positions as one of what it was cut from."""
    source, dim, start, _, step, *_ = (*view.source.args, *(None,) * 5)
    assert isinstance(source, Node)
    axis, keys = (dim or 0) % len(axes.shape_of(source)), view.dims[KEYS]
    whole = (Atom(axis, ONE, axes.shape_of(view.source)[axis]),)
    if (start or 0) != 0 or (step or 1) != 1 or keys != whole:
        return None
    dims = list(view.dims)
    dims[KEYS] = (Atom(axis, ONE, axes.shape_of(source)[axis]),)
    return View(source, tuple(dims), view.dtype, view.scale)


def _pages(view: View) -> Gathered | None:
    cache, lookups = cast("tuple[Node, list[Node | None]]", view.source.args[:2])
    if len(lookups) != 1 or lookups[0] is None or len(axes.shape_of(cache)) not in (3, 4):
        return None
    table = _table(lookups[0])
    if table is None or view.scale != 1.0:
        return None
    flat = len(axes.shape_of(lookups[0])) == 1
    for heads_first in (False, True):
        size = cache.meta["val"].shape[2 if heads_first else 1]
        if isinstance(size, int) and view.dims == tuple(_expected(view.source, table, flat, heads_first)):
            return Gathered(Pages(size, heads_first), cache, table)
    return None


def _table(node: Node) -> Node | None:
    """The integers [B, most blocks] that a lookup is made of."""
    while node.target in axes.RESHAPES or node.target in axes.CASTS or node.target in axes.COPIES:
        source = cast(Node, node.args[0])
        if source.meta["val"].dtype not in (torch.int32, torch.int64):
            break
        node = source
    return node if len(axes.shape_of(node)) == 2 and node.meta["val"].dtype in (torch.int32, torch.int64) else None


def _expected(gather: Node, table: Node, flat: bool, heads_first: bool) -> Iterator[Dim]:
    """Of the gathered tensor [B, blocks, …] or [B · blocks, …], the axes as batch, heads, keys and width."""
    batch, blocks = axes.shape_of(table)
    shape = axes.shape_of(gather)
    first = 1 if flat else 2
    heads, inner = (first, first + 1) if heads_first else (first + 1, first)
    each = Atom(0, blocks if flat else ONE, batch)
    block = Atom(0 if flat else 1, ONE, blocks)
    for atoms in ([each], [Atom(heads, ONE, shape[heads])], [block, Atom(inner, ONE, shape[inner])]):
        yield axes.join(a for a in atoms if not axes.same(a.size, ONE))
    width = shape[first + 2 :]  # scales may have none
    yield axes.join(Atom(first + 2, ONE, size) for size in width if not axes.same(size, ONE))
