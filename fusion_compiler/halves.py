"""Halves of a tensor's last axis, read as sums of products of halves of other tensors.

A half is the first or second one of the axis, or its even or odd elements; of a complex tensor, its real or imaginary
part. Slices, splits, stacks, joins, scatters and views of all kinds are looked through, so that what a result's halves
are computed from does not depend on how they were taken apart and joined again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

from .algebra import Value
from .raising.registry import arguments
from .semantics import SemanticView
from .shapes import shape_of

aten = torch.ops.aten
prims = torch.ops.prims
Style = Literal["halves", "pairs", "complex", ""]

SAME = (
    prims.convert_element_type.default, aten._to_copy.default, aten.clone.default, aten.alias.default,
    aten.detach.default, aten.contiguous.default, aten.lift_fresh_copy.default,
)  # fmt: skip
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
SUMS = (aten.add.Tensor, aten.sub.Tensor)
DEEP = 16  # steps from a result to what it is computed of
WIDE = 8  # products in one sum


@dataclass(frozen=True)
class Part:
    """Half of a tensor's last axis, or, with style "", the tensor."""

    value: Value
    style: Style = ""
    index: int = 0


@dataclass(frozen=True)
class Term:
    """coefficient · the product of `factors`."""

    coefficient: float
    factors: tuple[Part, ...]


Sum = tuple[Term, ...]


class Unreadable(Exception):
    """A tensor whose halves are no sums of products of halves."""


class Halves:
    """Reads the tensors of one graph. Below a result, `atoms` are not opened: they count as tensors of their own."""

    def __init__(self, view: SemanticView, atoms: Collection[Node] = ()) -> None:
        self.view, self.atoms = view, atoms

    def with_halved_tensors_closed(self) -> Halves:
        """The same, where tensors that the graph takes halves of are not opened: x of the halves of x = y + y·w."""
        halved = (_half_of(node) for node in self.view.graph_module.graph.nodes)
        return Halves(self.view, {half[0] for half in halved if half is not None})

    def part(self, node: Node, style: Style, index: int, depth: int = DEEP) -> Sum:
        """The `index`-th half of `node`'s last axis."""
        if depth == 0:
            raise Unreadable
        pieces = pieces_of(node, style)
        if pieces is not None:
            return self.whole(pieces[index], depth - 1)
        size = shape_of(node)[-1]
        if node.target in SAME:
            return self.part(node.all_input_nodes[0], style, index, depth - 1)
        if node.target in VIEWS:
            source = node.all_input_nodes[0]
            if source.target is aten.view_as_real.default and style == "pairs":
                return self.number(source.all_input_nodes[0], index, depth - 1)
            if shape_of(source)[-1:] == (size,):
                return self.part(source, style, index, depth - 1)
        if node.target is aten.slice_scatter.default:
            base, source, dim, start, end, step = arguments(node, (None, None, 0, None, None, 1))
            if dim % len(shape_of(node)) == len(shape_of(node)) - 1:
                half = _half(size, start or 0, size if end is None else end, step)
                if half is None or half[0] != style:
                    raise Unreadable
                source = source.args[1] if source.target is aten.copy.default else source
                return self.whole(source, depth - 1) if half[1] == index else self.part(base, style, index, depth - 1)

        def operand(argument: Any) -> Sum:
            if isinstance(argument, Node) and shape_of(argument)[-1:] == (size,):
                return self.part(argument, style, index, depth - 1)
            return self.whole(argument, depth - 1)

        closed = depth < DEEP and node in self.atoms
        computed = None if closed else self.computed(node, operand)
        return computed or (Term(1.0, (Part(self.view.value(node), style, index),)),)

    def whole(self, argument: Any, depth: int = DEEP) -> Sum:
        """A tensor, or a number, all of it: it may be half of another."""
        if isinstance(argument, (int, float)):
            return (Term(float(argument), ()),)
        if depth == 0 or not isinstance(argument, Node):
            raise Unreadable
        node = argument
        if node.target in SAME:
            return self.whole(node.all_input_nodes[0], depth - 1)
        half = _half_of(node)
        if half is not None:
            source, style, index = half
            if source.target is aten.view_as_real.default:
                return self.number(source.all_input_nodes[0], index, depth - 1)
            joined = _joined(source)
            return self.part(joined, style, index, depth - 1)
        if node.target in (*VIEWS, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims):
            source = node.all_input_nodes[0]
            inner = [s for s in shape_of(source) if s != 1]
            if inner == [s for s in shape_of(node) if s != 1] or shape_of(source)[-1:] == shape_of(node)[-1:]:
                return self.whole(source, depth - 1)
        found = self.computed(node, lambda a: self.whole(a, depth - 1))
        return found or (Term(1.0, (Part(self.view.value(node)),)),)

    def computed(self, node: Node, operand: Callable[[Any], Sum]) -> Sum | None:
        """A sum or product of operands; None where it is something else."""
        if node.target is aten.neg.default:
            return _times(operand(node.args[0]), (Term(-1.0, ()),))
        if node.target in SUMS and node.kwargs.get("alpha", 1) == 1:
            right = operand(node.args[1])
            sign = -1.0 if node.target is aten.sub.Tensor else 1.0
            return _bounded((*operand(node.args[0]), *_times(right, (Term(sign, ()),))))
        if node.target is aten.mul.Tensor:
            return _times(operand(node.args[0]), operand(node.args[1]))
        return None

    def number(self, node: Node, index: int, depth: int) -> Sum:
        """The real (0) or imaginary (1) part of a complex tensor."""
        if depth == 0:
            raise Unreadable
        if node.target in (*SAME, *VIEWS, aten.unsqueeze.default):
            source = node.all_input_nodes[0]
            return self.number(source, index, depth - 1)
        if node.target is aten.view_as_complex.default:
            [source] = node.all_input_nodes
            pieces = _stacked(source, len(shape_of(source)) - 1)
            if pieces is not None:
                return self.whole(pieces[index], depth - 1)
            return self.part(_joined(source), "pairs", index, depth - 1)
        if node.target is aten.mul.Tensor and all(isinstance(a, Node) for a in node.args):
            left, right = node.args
            if all(a.meta["val"].is_complex() for a in (left, right)):  # type: ignore[union-attr]
                (a, b), (c, d) = (tuple(self.number(n, i, depth - 1) for i in (0, 1)) for n in (left, right))  # type: ignore[arg-type]
                if index == 0:
                    return _bounded((*_times(a, c), *_times(_times(b, d), (Term(-1.0, ()),))))
                return _bounded((*_times(a, d), *_times(b, c)))
        return (Term(1.0, (Part(self.view.value(node), "complex", index),)),)


def pieces_of(node: Node, style: Style) -> tuple[Node, Node] | None:
    """The two tensors that `node` joins as its halves, or as its even and odd elements."""
    if node.target is aten.cat.default:
        parts, dim = arguments(node, (None, 0))
        last = len(shape_of(node)) - 1
        if style == "halves" and dim % (last + 1) == last and len(parts) == 2:
            a, b = parts
            size = shape_of(a)[-1]
            return (a, b) if isinstance(size, int) and size == shape_of(b)[-1] and size > 1 else None
    if node.target in VIEWS:
        source = node.all_input_nodes[0]
        size, shape = shape_of(node)[-1], shape_of(source)
        if len(shape) > 1 and style == "pairs" and shape[-2:] == (size // 2, 2):
            return _stacked(source, len(shape) - 1)
        if len(shape) > 1 and style == "halves" and shape[-2:] == (2, size // 2):
            return _stacked(source, len(shape) - 2)
    return None


def _stacked(node: Node, dim: int) -> tuple[Node, Node] | None:
    """The two tensors that are stacked along `dim`."""
    while node.target in SAME:
        node = node.all_input_nodes[0]
    if node.target is not aten.cat.default:
        return None
    parts, at = arguments(node, (None, 0))
    if at % len(shape_of(node)) != dim or len(parts) != 2 or any(shape_of(p)[dim] != 1 for p in parts):
        return None
    first, second = parts
    return first, second


def _half(size: int, start: int, end: int, step: int) -> tuple[Style, int] | None:
    """Which half of an axis of `size` elements start:end:step is; None where one of these is symbolic."""
    if not all(isinstance(n, int) for n in (size, start, end, step)):
        return None
    end = min(end, size)
    if step == 2 and start in (0, 1) and end >= size - 1 and size % 2 == 0:
        return "pairs", start
    if step == 1 and size % 2 == 0 and (start, end) in ((0, size // 2), (size // 2, size)):
        return "halves", int(start > 0)
    return None


def _half_of(node: Node) -> tuple[Node, Style, int] | None:
    """(the tensor, style, index) of which `node` is a half."""
    for source, dim, start, end, step in _slice(node):
        shape = shape_of(source)
        last, size = len(shape) - 1, shape[dim]
        if not isinstance(size, int):
            return None
        if dim == last - 1 and size == 2 and end - start == 1:
            return source, "halves", start
        if dim == last and size == 2 and len(shape) > 1 and end - start == 1:
            return source, "pairs", start
        half = _half(size, start, end, step) if dim == last else None
        if half is not None:
            return source, half[0], half[1]
    return None


def _slice(node: Node) -> Iterator[tuple[Node, int, int, int, int]]:
    """(source, dim, start, end, step) of a slice, a select, or a part of a split."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if source is None:
        return
    if node.target is aten.slice.Tensor:
        _, dim, start, end, step = arguments(node, (None, 0, 0, 2**63 - 1, 1))
        dim %= len(shape_of(source))
        size = shape_of(source)[dim]
        if isinstance(size, int) and all(isinstance(v, int) for v in (start, end, step)):
            start, end = (v + size if v < 0 else min(v, size) for v in (start, end))
            yield source, dim, start, end, step
    elif node.target is aten.select.int:
        _, dim, index = arguments(node)
        dim %= len(shape_of(source))
        size = shape_of(source)[dim]
        if isinstance(size, int) and isinstance(index, int):
            yield source, dim, index % size, index % size + 1, 1
    elif source.target is aten.unbind.int and isinstance(node.args[1], int):
        whole, dim = arguments(source, (None, 0))
        yield whole, dim % len(shape_of(whole)), node.args[1], node.args[1] + 1, 1
    elif source.target in (aten.split_with_sizes.default, aten.split.Tensor) and isinstance(node.args[1], int):
        whole, sizes, dim = arguments(source, (None, None, 0))
        dim %= len(shape_of(whole))
        size, index = shape_of(whole)[dim], node.args[1]
        sizes = [sizes] * (index + 1) if isinstance(sizes, int) else sizes
        if isinstance(size, int) and all(isinstance(s, int) for s in sizes):
            yield whole, dim, sum(sizes[:index]), sum(sizes[: index + 1]), 1


def _joined(node: Node) -> Node:
    """The tensor of which `node` shows the halves as an axis of two."""
    if node.target in VIEWS:
        source = node.all_input_nodes[0]
        shape = shape_of(node)
        if len(shape) > 1 and 2 in shape[-2:] and shape_of(source)[-1:] == (shape[-2] * shape[-1],):
            return source
    return node


def _times(left: Sum, right: Sum) -> Sum:
    return _bounded(tuple(Term(a.coefficient * b.coefficient, a.factors + b.factors) for a in left for b in right))


def _bounded(terms: Sum) -> Sum:
    if len(terms) > WIDE:
        raise Unreadable
    return terms
