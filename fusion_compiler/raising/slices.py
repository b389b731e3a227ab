"""Parts of tensors: slices, splits and gates. Part of a linear is a linear with part of its weight."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..algebra import Value
from ..shapes import TRANSPARENT_DTYPES, Features, Product, count, extent, shape_of
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
    if not all(isinstance(v, int) for v in (dim, start, end, step, shape[dim])):
        return None
    size = shape[dim]
    start = start % size if start < 0 else start
    end = end % size if end < 0 else min(end, size)
    if step != 1:
        return _part_of_linear(view, source, dim % len(shape), range(start, end, step))
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
    """Elements start … end−1 of one axis."""
    shape = shape_of(source)
    value = view.value(source)
    if (start, end) == (0, shape[dim]):
        return value
    part = _part_of_linear(view, source, dim, range(start, end))
    return part or view.algebra.make("slice", value, dim=dim, shape=shape, start=start, end=end)


def _part_of_linear(view: SemanticView, source: Node, dim: int, taken: range) -> Value | None:
    """Part of a linear's outputs is a linear with part of its weight; None where it is no such part."""
    shape = shape_of(source)
    linear, bias = _linear_and_bias(view.value(source))
    if linear is None or (bias is not None and bias.op != "bcast" and any(size != 1 for size in shape[:-1])):
        return None  # no linear, or a residual of many rows
    width = view.products(linear)[0].features.count
    features = _features(shape, dim, taken, width)
    if features is None:
        return None
    part = _output_features(view, linear, features)
    if bias is None:
        return part
    rows = bias.attr("groups", ())[:-1]  # none in a single row
    held = _columns(view, bias.args[0] if rows else bias, 0, (width,), features)
    return view.algebra.add(part, view.algebra.bcast(held, (*rows, (features.count, True))))


def _features(shape: Sequence[Any], dim: int, taken: range, width: Any) -> Features | None:
    """Which of `width` features the elements `taken` of an axis are, where these lie at even distances."""
    inner = count(shape[dim + 1 :])
    if isinstance(inner, int) and inner * shape[dim] == width:  # the axis runs over all features
        if taken.step == 1:
            return Features(taken.start * inner, len(taken) * inner)
        return Features(taken.start, len(taken), taken.step) if inner == 1 else None
    if inner == 1 and len(taken) == 1 and dim > 0 and shape[dim - 1] * shape[dim] == width:  # one of each pair
        return Features(taken.start, shape[dim - 1], shape[dim])
    return None


def _columns(view: SemanticView, value: Value, dim: int, shape: Sequence[Any], features: Features) -> Value:
    first, step = features.first, features.step
    apart = {"step": step} if step != 1 else {}
    end = first + features.count * step
    return view.algebra.make("slice", value, dim=dim, shape=tuple(shape), start=first, end=end, **apart)


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


def _output_features(view: SemanticView, linear: Value, features: Features) -> Value:
    """The linear that gives some features of `linear`."""
    x, weight = linear.args
    stored = view.products(linear)[0].weight.meta["val"]
    k, n = (extent(s) for s in stored.shape[-2:])
    kn = linear.attr("kn")
    shape, dim = ((k, n), 1) if kn else ((n, k), 0)
    value = view.algebra.make("linear", x, _columns(view, weight, dim, shape, features), kn=kn)
    known = view._products.setdefault(id(value), [])
    part = features.first, features.count, features.step
    known += [Product(p.node, p.x, p.weight, p.features.part(*part)) for p in view.products(linear)]
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
