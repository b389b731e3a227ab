"""Writes of new rows into a static cache [B, heads, S, D], along its third axis, in all their spellings.

`index_put` (which `index_copy` becomes), `scatter` with an index that is the same for every head and column,
`slice_scatter` and `select_scatter` (what assigning to a slice or to one position becomes). Two writes go to the same
places if their positions are equal. Where the positions are counted from one integer, that is what a kernel reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from .attention import axes
from .attention.index_functions import Indexer
from .attention.limits import loads_of, read_from
from .halves import VIEWS
from .raising.registry import arguments
from .shapes import shape_of

aten = torch.ops.aten
POSITIONS = 2  # the axis of a cache


@dataclass(frozen=True)
class Positions:
    """Where L rows are put: at `offset` + t where `kind` is "none", further by the integer that `node` holds on the
    device ("scalar") or in the graph ("size"), at the "indices" [L] of `node`, or at those of each sequence, [B, L] or,
    for one row, [B] ("sequences")."""

    kind: str
    node: Node | None = None
    offset: int = 0


@dataclass(frozen=True)
class Write:
    """New rows `rows` [B, heads, L, D], or where `tokens_first` [B, L, heads, D], put into `cache` [B, heads, S, D]."""

    node: Node
    cache: Node
    at: Positions
    rows: Node
    tokens_first: bool = False

    @property
    def shape(self) -> tuple[Any, ...]:
        """Of the rows, as [B, heads, L, D]."""
        shape = tuple(shape_of(self.rows))
        return (shape[0], shape[2], shape[1], *shape[3:]) if self.tokens_first else shape


def written(node: Node) -> Write | None:
    """The write that `node` is, all of its sizes known."""
    find = _SPELLINGS.get(node.target)
    write = find(node) if find is not None else None
    if write is None:
        return None
    shapes = [shape_of(write.cache), write.shape]
    if not all(len(shape) == 4 and all(isinstance(size, int) for size in shape) for shape in shapes):
        return None
    (batch, heads, _, width), rows = shapes
    fits = rows[:2] == (batch, heads) and rows[3] == width
    return write if fits and write.cache.meta["val"].dtype == write.rows.meta["val"].dtype else None


def _put(node: Node) -> Write | None:
    cache, indices, rows, accumulate = arguments(node, (None, None, None, False))
    at = [i for i in indices if i is not None]
    if accumulate or len(indices) <= POSITIONS or indices[POSITIONS] is None:
        return None
    if len(at) == 2 and indices[0] is not None:
        return _put_by_sequence(node, cache, indices[0], indices[POSITIONS], rows)
    if len(at) != 1:
        return None
    rows = _with_leading_axes(rows) if isinstance(rows, Node) else rows
    fits = isinstance(rows, Node) and len(shape_of(rows)) == 4 and shape_of(at[0]) == shape_of(rows)[2:3]
    if not fits or at[0].meta["val"].dtype == torch.bool:
        return None
    return Write(node, cache, _counted(at[0]), rows)


def _with_leading_axes(rows: Node) -> Node:
    """`rows` with the axes of one element that an assignment drops in front, as in a batch of one."""
    source = rows.all_input_nodes[0] if rows.target in VIEWS else rows
    own, whole = shape_of(rows), shape_of(source)
    dropped = len(whole) - len(own)
    return source if dropped > 0 and whole == (1,) * dropped + tuple(own) else rows


def _put_by_sequence(node: Node, cache: Node, sequences: Node, at: Node, rows: Node) -> Write | None:
    """cache[sequences, :, at] = rows: [B, H, D] at positions [B], or [B, L, H, D] at [B, L]."""
    batch, sequence = shape_of(cache)[0], sympy.Symbol("sequence", integer=True, nonnegative=True)
    several = len(shape_of(at)) == 2
    source, tokens_first = (rows, True) if several else _of_one_row(rows)
    if shape_of(sequences) != ((batch, 1) if several else (batch,)) or shape_of(at)[0] != batch:
        return None
    index = (sequence, sympy.Integer(0)) if several else (sequence,)
    if source is None or len(shape_of(source)) != 4 or Indexer().at(sequences, index) != sequence:
        return None
    return Write(node, cache, Positions("sequences", at), source, tokens_first)


def _scattered(node: Node) -> Write | None:
    cache, dim, index, rows = arguments(node, (None, 0, None, None))
    shape = shape_of(index)
    if len(shape) != 4 or dim % 4 != POSITIONS or shape != shape_of(rows):
        return None
    view = axes.View.of(index)
    while (below := axes.step(view.source)) is not None:
        further = view.through(below)
        if further is None:
            break
        view = further
    length = (axes.Atom(0, axes.ONE, axes.size_of(shape[POSITIONS])),) if shape[POSITIONS] != 1 else ()
    alone = all(atom.axis is None for place, dim in enumerate(view.dims) if place != POSITIONS for atom in dim)
    if not alone or len(shape_of(view.source)) > 1 or view.dims[POSITIONS] != length:
        return None
    return Write(node, cache, _counted(view.source), rows)


def _sliced(node: Node) -> Write | None:
    cache, rows, dim, start, _, step = arguments(node, (None, None, 0, None, None, 1))
    if dim % 4 != POSITIONS or step != 1:
        return None
    return _from(node, cache, start if start is not None else 0, _copied(rows))


def _selected(node: Node) -> Write | None:
    cache, row, dim, index = arguments(node, (None, None, None, None))
    rows, tokens_first = _of_one_row(_copied(row))
    write = _from(node, cache, index, rows) if rows is not None and dim % 4 == POSITIONS else None
    return replace(write, tokens_first=tokens_first) if write is not None else None


_SPELLINGS: dict[Any, Callable[[Node], Write | None]] = {
    aten.index_put.default: _put, aten.scatter.src: _scattered, aten.slice_scatter.default: _sliced,
    aten.select_scatter.default: _selected,
}  # fmt: skip


def _of_one_row(row: Node) -> tuple[Node | None, bool]:
    """(the rows of which `row` [B, heads, D] is the only one, whether they stand as [B, 1, heads, D])."""
    if row.target is not aten.select.int:
        return None, False
    rows, dim, _ = arguments(row, (None, None, None))
    one = len(shape_of(rows)) == 4 and dim % 4 in (1, POSITIONS) and shape_of(rows)[dim] == 1
    return (rows, dim % 4 == 1) if one else (None, False)


def _copied(node: Node) -> Node:
    """What a functional copy into a part of a cache takes as it is."""
    if node.target is not aten.copy.default:
        return node
    source: Any = node.args[1]
    source = _with_leading_axes(source) if isinstance(source, Node) else source
    same = isinstance(source, Node) and shape_of(source) == shape_of(node)
    return source if same and source.meta["val"].dtype == node.meta["val"].dtype else node


def _from(node: Node, cache: Node, start: int | Node, rows: Node) -> Write | None:
    """The write of `rows` from the position `start` on, which lies within the cache."""
    if isinstance(start, Node):
        return Write(node, cache, Positions("size", start), rows)
    length = shape_of(cache)[POSITIONS]
    if not isinstance(length, int):
        return None
    return Write(node, cache, Positions("none", offset=start % length if start < 0 else start), rows)


def _counted(at: Node) -> Positions:
    """The positions that the integers `at` [L], or one integer, name."""
    indexer, token = Indexer(), sympy.Symbol("token", integer=True, nonnegative=True)
    shape = shape_of(at)
    one = shape in ((1,), ())
    term = indexer.at(at, ((sympy.Integer(0) if one else token),) if shape else ())
    if isinstance(term, sympy.Expr):
        first = sympy.expand(term - (0 if one else token))
        if first.is_Integer and first >= 0:
            return Positions("none", offset=int(first))
        reads = loads_of(first, indexer)
        if len(reads) == 1 and sympy.expand(first - reads[0]).is_Integer and all(i == 0 for i in reads[0].args):
            node = read_from(reads[0], indexer)
            if all(n == 1 for n in shape_of(node)):
                return Positions("scalar", node, int(sympy.expand(first - reads[0])))
    return Positions("indices", at)
