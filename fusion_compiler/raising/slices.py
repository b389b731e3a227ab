"""Parts of tensors: slices and splits. Part of a linear is a linear with part of its weight."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..algebra import Value
from ..shapes import Product, extent, shape_of
from .arithmetic import innermost
from .registry import arguments, rule

if TYPE_CHECKING:
    from ..semantics import SemanticView

aten = torch.ops.aten


@rule(aten.slice.Tensor)
def _slice(view: SemanticView, node: Node) -> Value | None:
    source, dim, start, end, step = arguments(node, (None, 0, 0, 2**63 - 1, 1))
    shape = shape_of(source)
    if shape_of(node) == shape:
        return view.value(source)
    if not all(isinstance(v, int) for v in (dim, start, end, step, shape[dim])) or step != 1:
        return None
    size = shape[dim]
    start = start % size if start < 0 else start
    end = end % size if end < 0 else min(end, size)
    return _part(view, source, dim % len(shape), start, end)


def _part(view: SemanticView, source: Node, dim: int, start: int, end: int) -> Value:
    """Elements start … end−1 of one axis. Part of a linear's outputs is a linear with part of its weight."""
    shape = shape_of(source)
    value = view.value(source)
    if dim == len(shape) - 1:
        linear, bias = (value, None) if value.op == "linear" else _linear_and_bias(value)
        if linear is not None:
            part = _output_features(view, linear, start, end)
            if bias is None:
                return part
            groups = tuple((end - start if kept else size, kept) for size, kept in bias.attr("groups"))
            held = view.algebra.make("slice", bias.args[0], dim=0, shape=(shape[-1],), start=start, end=end)
            return view.algebra.add(part, view.algebra.bcast(held, groups))
    return view.algebra.make("slice", value, dim=dim, shape=shape, start=start, end=end)


def _linear_and_bias(value: Value) -> tuple[Value | None, Value | None]:
    """(linear, bias) of `linear + bias` with the bias repeated along the rows, else (None, None)."""
    if value.op == "add" and len(value.args) == 2:
        for linear, bias in (value.args, value.args[::-1]):
            if linear.op == "linear" and bias.op == "bcast" and [k for _, k in bias.attr("groups")] == [False, True]:
                return linear, bias
    return None, None


def _output_features(view: SemanticView, linear: Value, start: int, end: int) -> Value:
    """The linear that gives features start … end−1 of `linear`."""
    x, weight = linear.args
    stored = view.products(linear)[0].weight.meta["val"]
    k, n = (extent(s) for s in stored.shape[-2:])
    kn = linear.attr("kn")
    shape, dim = ((k, n), 1) if kn else ((n, k), 0)
    part = view.algebra.make("slice", weight, dim=dim, shape=shape, start=start, end=end)
    value = view.algebra.make("linear", x, part, kn=kn)
    known = view._products.setdefault(id(value), [])
    known += [
        Product(p.node, p.x, p.weight, (p.features[0] + start, p.features[0] + end)) for p in view.products(linear)
    ]
    return value


@rule(operator.getitem)
def _getitem(view: SemanticView, node: Node) -> Value | None:
    source, index = arguments(node)
    if source.target in (aten.split_with_sizes.default, aten.split.Tensor):
        return _split_part(view, source, index)
    if source.target is aten.var_mean.correction:
        if index == 0 and source.kwargs.get("correction", 1) != 0:
            return None
        size = innermost(source)
        if size is not None:
            return view.algebra.make("mean" if index else "var", view.value(source.all_input_nodes[0]), size=size)
    return None


def _split_part(view: SemanticView, split: Node, index: int) -> Value | None:
    source: Any = split.args[0]
    shape = shape_of(source)
    dim = arguments(split, (None, None, split.kwargs.get("dim", 0)))[2] % len(shape)
    sizes: Any = split.args[1]
    if not isinstance(shape[dim], int):
        return None
    if isinstance(sizes, int):
        sizes = [min(sizes, shape[dim] - at) for at in range(0, shape[dim], sizes)]
    if not all(isinstance(size, int) for size in sizes):
        return None
    start = sum(sizes[:index])
    return _part(view, source, dim, start, start + sizes[index])
