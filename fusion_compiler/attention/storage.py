"""Attention whose keys and values are dequantised or gathered from pages first: the same, reading them as stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.fx import Node

from ..fused import WORD, Attention, Codes, Layout, Site, Size, StoredAttention
from ..match import Match
from ..shapes import shape_of
from ..sites import interior_between, staying
from . import axes, quantised
from .index_functions import Indexer
from .operands import named
from .pages import KEYS, Gathered, by_axes, gathered, unzeroed


def as_stored(match: Match, indexer: Indexer) -> Match:
    """`match`, with the attention that reads what is stored as an alternative where keys or values are computed."""
    op = match.op
    assert isinstance(op, Attention)
    if op.logarithm is not None:
        return match
    lengths = named(op, match.site).get("lengths")
    q, *sides = match.site.operands[:3]
    layouts = [_whole(layout, shape_of(side)) for layout, side in zip(op.layouts[1:3], sides, strict=True)]
    op = replace(op, layouts=(op.layouts[0], *layouts, *op.layouts[3:]))
    codes: list[quantised.Found | None] = []
    blocks: list[Gathered | None] = []
    for place, layout in enumerate(layouts):
        view = by_axes(sides[place], layout)
        if view is not None:
            sides[place] = unzeroed(view, op.mask, lengths, indexer).source
        codes.append(quantised.stored(sides[place]) if _in_order(sides[place], layout) else None)
        found = codes[-1]
        sides[place] = found[1] if found is not None else sides[place]
        view = by_axes(sides[place], layout)
        blocks.append(gathered(view, op.mask, lengths, indexer) if view is not None else None)
    k, v = blocks
    pages, table = None, list[Node]()
    if k is not None and v is not None and k.beside(v):
        plain = all(c is not None or b.cache.meta["val"].dtype == op.dtype for c, b in zip(codes, (k, v), strict=True))
        beside = [_beside(*one, op, lengths, indexer) for one in zip(codes, (k, v), layouts, strict=True)]
        if plain and None not in beside:
            pages, sides, table = k.pages, [k.cache, v.cache], [k.table]
            codes = [one or None for one in beside]
    if pages is None and not any(codes):
        return match
    if not all(code is None or _in_words(code[0], node) for code, node in zip(codes, sides, strict=True)):
        return match
    extra = [node for code in codes if code is not None for node in code[2]]
    operands = (q, *sides, *match.site.operands[3:], *extra, *table)
    interior = interior_between(match.site.output, operands)
    site = Site(operands, match.site.output, interior, staying(interior, (match.site.output,)))
    k_codes, v_codes = (code[0] if code is not None else None for code in codes)
    return replace(match, alternatives=(*match.alternatives, (StoredAttention(op, k_codes, v_codes, pages), site)))


def _whole(layout: Layout, shape: Sequence[Size]) -> Layout:
    """`layout` of a tensor of `shape` with the axes of one element that it leaves out, where it only exchanges axes."""
    long = [d for d, size in enumerate(shape) if size != 1]
    ones = iter(d for d, size in enumerate(shape) if size == 1)
    short = [size for size in layout.split if size != 1]
    exchanged = [layout.split[d] for d in layout.order]
    alike = len(shape) == len(layout.merged) and short == [shape[d] for d in long]
    if not alike or [n for n in exchanged if n != 1] != [n for n in layout.merged if n != 1]:
        return layout
    kept = [d for d, size in enumerate(layout.split) if size != 1]
    places = iter(long[kept.index(d)] for d in layout.order if layout.split[d] != 1)
    order = tuple(next(ones) if size == 1 else next(places) for size in layout.merged)
    return replace(layout, split=tuple(shape), order=order)


def _in_order(node: Node, layout: Layout) -> bool:
    """Whether a layout does no more than to exchange axes, all of known sizes."""
    shape = shape_of(node)
    known = all(isinstance(size, int) for size in (*shape, *layout.split, *layout.shape))
    return (
        known
        and shape == layout.split == tuple(layout.split)
        and layout.merged == layout.shape
        and (tuple(shape[d] for d in layout.order) == tuple(layout.shape))
        and layout.order[-1] == len(shape) - 1
    )


def _in_words(codes: Codes, node: Node) -> bool:
    """Whether the rows of a tensor of codes are whole words that lie aligned."""
    value = node.meta["val"]
    size = WORD // 2 if codes.packed else WORD
    *strides, last = value.stride()
    counted = [value.shape[-1], value.storage_offset(), *strides]
    return last == 1 and all(isinstance(n, int) and n % size == 0 for n in counted)


def _beside(
    codes: quantised.Found | None,
    pages: Gathered,
    layout: Layout,
    op: Attention,
    lengths: Node | None,
    indexer: Indexer,
) -> quantised.Found | tuple[()] | None:
    """`codes` with scales and zeros that a kernel reads beside `pages`: one for all positions of a head, or gathered
    from pages as the codes are. Nothing where there are no codes, None where there are others."""
    if codes is None:
        return ()
    known, held, others = codes
    axis = layout.order[KEYS] - len(layout.order)
    shapes = [axes.shape_of(node) for node in others]
    if not any(len(shape) >= -axis and not axes.same(shape[axis], axes.ONE) for shape in shapes):
        return codes
    views = [by_axes(_widened(node), layout) for node in others]
    found = [gathered(view, op.mask, lengths, indexer) if view is not None else None for view in views]
    caches = [one.cache for one in found if one is not None and one.pages == pages.pages and one.table is pages.table]
    blocks = axes.shape_of(pages.cache)[0]
    if len(caches) < len(others) or not all(axes.same(axes.shape_of(cache)[0], blocks) for cache in caches):
        return None
    return replace(known, in_pages=True), held, tuple(caches)


def _widened(node: Node) -> Node:
    """Below a cast of what is gathered to another floating type."""
    source = node.all_input_nodes[0] if node.target in axes.CASTS else node
    return source if source.meta["val"].is_floating_point() else node
