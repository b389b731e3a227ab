"""Attention whose keys and values are dequantised or gathered from pages first: the same, reading them as stored."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from ..fused import WORD, Attention, Codes, Layout, Site, StoredAttention
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
    layouts = op.layouts[1:3]
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
    extra = [node for code in codes if code is not None for node in code[2]]
    k, v = blocks
    pages = None
    if k is not None and v is not None and k.beside(v):
        plain = all(c is not None or b.cache.meta["val"].dtype == op.dtype for c, b in zip(codes, (k, v), strict=True))
        if plain and not any(_by_key(c, layout) for c, layout in zip(codes, layouts, strict=True)):
            pages, sides = k.pages, [k.cache, v.cache]
            extra.append(k.table)
    if pages is None and not any(codes):
        return match
    if not all(code is None or _in_words(code[0], node) for code, node in zip(codes, sides, strict=True)):
        return match
    operands = (q, *sides, *match.site.operands[3:], *extra)
    interior = interior_between(match.site.output, operands)
    site = Site(operands, match.site.output, interior, staying(interior, (match.site.output,)))
    k_codes, v_codes = (code[0] if code is not None else None for code in codes)
    return replace(match, alternatives=(*match.alternatives, (StoredAttention(op, k_codes, v_codes, pages), site)))


def _in_order(node: Node, layout: Layout) -> bool:
    """Whether a layout does no more than to exchange axes, all of known sizes."""
    shape = shape_of(node)
    known = all(isinstance(size, int) for size in (*shape, *layout.split, *layout.shape))
    return (
        known
        and shape == layout.split == tuple(layout.split)
        and layout.merged == layout.shape
        and (tuple(shape[d] for d in layout.order) == tuple(layout.shape))
    )


def _in_words(codes: Codes, node: Node) -> bool:
    """Whether the rows of a tensor of codes are whole words that lie aligned."""
    value = node.meta["val"]
    size = WORD // 2 if codes.packed else WORD
    *strides, last = value.stride()
    counted = [value.shape[-1], value.storage_offset(), *strides]
    return last == 1 and all(isinstance(n, int) and n % size == 0 for n in counted)


def _by_key(codes: quantised.Found | None, layout: Layout) -> bool:
    """Whether a scale or zero differs from key to key: these would have to be gathered too."""
    axis = layout.order[KEYS] - len(layout.order)
    shapes = [axes.shape_of(node) for node in (codes[2] if codes is not None else ())]
    return any(len(shape) >= -axis and not axes.same(shape[axis], axes.ONE) for shape in shapes)
