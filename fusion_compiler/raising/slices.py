"""Parts of tensors: slices, splits and gates. Part of a linear is a linear with part of its weight."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..algebra import Value
from ..shapes import TRANSPARENT_DTYPES, Product, count, extent, shape_of
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


@rule(aten.select.int)
def _select(view: SemanticView, node: Node) -> Value | None:
    source, dim, index = arguments(node)
    shape = shape_of(source)
    if not isinstance(index, int) or not isinstance(shape[dim], int):
        return None
    index %= shape[dim]
    return _part(view, source, dim % len(shape), index, index + 1)


@rule(aten.glu.default)
def _glu(view: SemanticView, node: Node) -> Value | None:
    """a · sigmoid(b) of the halves of an axis."""
    source, dim = arguments(node, (None, -1))
    shape = shape_of(source)
    size = shape[dim]
    if not isinstance(size, int) or node.meta["val"].dtype not in TRANSPARENT_DTYPES:
        return None
    a, b = (_part(view, source, dim % len(shape), at, at + size // 2) for at in (0, size // 2))
    return view.algebra.mul(a, view.algebra.unary("sigmoid", b))


def _part(view: SemanticView, source: Node, dim: int, start: int, end: int) -> Value:
    """Elements start … end−1 of one axis. Part of a linear's outputs is a linear with part of its weight."""
    shape = shape_of(source)
    value = view.value(source)
    if (start, end) == (0, shape[dim]):
        return value
    linear, bias = _linear_and_bias(value)
    if bias is not None and bias.op != "bcast" and any(size != 1 for size in shape[:-1]):
        linear = None  # a residual of many rows
    if linear is not None:
        first, last = view.products(linear)[0].features
        inner = count(shape[dim + 1 :])
        if isinstance(inner, int) and inner * shape[dim] == last - first:  # the axis runs over all of its features
            start, end = start * inner, end * inner
            part = _output_features(view, linear, start, end)
            if bias is None:
                return part
            rows = bias.attr("groups", ())[:-1]  # none in a single row
            source_bias = bias.args[0] if rows else bias
            held = view.algebra.make("slice", source_bias, dim=0, shape=(last - first,), start=start, end=end)
            return view.algebra.add(part, view.algebra.bcast(held, (*rows, (end - start, True))))
    return view.algebra.make("slice", value, dim=dim, shape=shape, start=start, end=end)


def _linear_and_bias(value: Value) -> tuple[Value | None, Value | None]:
    """(linear, bias) of a linear or of `linear + bias` with the bias repeated along the rows, else (None, None)."""
    if value.op == "linear":
        return value, None
    if value.op == "add" and len(value.args) == 2:
        for linear, bias in (value.args, value.args[::-1]):
            if linear.op == "linear" and (
                bias.op == "leaf" or (bias.op == "bcast" and [k for _, k in bias.attr("groups")] == [False, True])
            ):
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
    if source.target is aten.unbind.int:
        whole, dim = arguments(source, (None, 0))
        return _part(view, whole, dim % len(shape_of(whole)), index, index + 1)
    if source.target in (aten.split_with_sizes.default, aten.split.Tensor):
        return _split_part(view, source, index)
    if source.target is aten.max.dim and index == 0 and source.meta["val"][0].dtype in TRANSPARENT_DTYPES:
        size = innermost(source)
        return None if size is None else view.algebra.make("amax", view.value(source.all_input_nodes[0]), size=size)
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
