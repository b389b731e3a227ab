"""Fits a new node into the place of another: equal shape, dtype and device, and strides that what follows can take.

Later nodes were traced for the strides of what was there before. A fused kernel often writes another order, such as
attention with its heads inside the rows, which the next transpose and copy would have made anyway. Following the new
strides through those nodes turns that copy into none; only where they would reach a graph output or a node that
depends on strides must the old layout be restored by a copy.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node, map_arg

from .fused import Site
from .splice import Builder, SpliceError, same_sizes, same_strides

aten = torch.ops.aten

# Operators whose result depends on how their input lies in memory, beyond strides of their own output.
STRIDE_BOUND = (aten.as_strided.default, aten.as_strided_scatter.default, aten.set_.source_Tensor, aten.copy_.default)


def fit(builder: Builder, site: Site, new: Node) -> Node:
    """`new`, or a copy of it in the layout of `site.output`; refused where it is another tensor.

    Shape, dtype and device must be equal. Where only the strides differ, either what follows is told of the new ones
    or the data is copied into the old ones.
    """
    old = site.output
    want, have = old.meta["val"], new.meta["val"]
    for what, a, b in (("dtype", want.dtype, have.dtype), ("device", want.device, have.device)):
        if a != b:
            raise SpliceError(f"the replacement of {old.name} has {what} {b}, the original has {a}")
    if not same_sizes(want.shape, have.shape):
        raise SpliceError(f"the replacement of {old.name} has shape {tuple(have.shape)}, not {tuple(want.shape)}")
    if same_strides(want, have) or adopt(builder, old, new):
        return new
    copied = _in_layout_of(builder, new, want)
    if not same_strides(want, copied.meta["val"]):
        raise SpliceError(
            f"the replacement of {old.name} has strides {have.stride()}, the original has {want.stride()}, "
            "which no permutation of contiguous data has"
        )
    return copied


def adopt(builder: Builder, old: Node, new: Node) -> bool:
    """Gives the nodes after `old` the fake values they have when they read `new` instead; False where that cannot be.

    Nothing is changed where the answer is False. `old` itself stays; replacing its uses is left to the caller.
    """
    changed: dict[Node, Any] = {old: new.meta["val"]}
    as_reshape: list[Node] = []
    for node in _readers(builder.gm.graph, changed):
        if node is new:
            continue
        found = _revalued(node, changed)
        if found is None:
            return False
        value, reshapes = found
        as_reshape += [node] * reshapes
        if not all(map(same_strides, _parts(value), _parts(node.meta["val"]))):
            changed[node] = value
    del changed[old]
    _give(changed, as_reshape)
    return True


def follow(graph: Graph, changed: dict[Node, Any]) -> None:
    """Gives the readers of nodes whose fake values have changed the values that follow, as far as these can be told."""
    as_reshape: list[Node] = []
    for node in _readers(graph, changed):
        found = _revalued(node, changed)
        if found is not None:
            changed[node], reshapes = found
            as_reshape += [node] * reshapes
    _give(changed, as_reshape)


def _readers(graph: Graph, changed: Mapping[Node, Any]) -> Iterator[Node]:
    """The nodes that read one of `changed`, which may grow meanwhile."""
    for node in list(graph.nodes):
        if node not in changed and any(n in changed for n in node.all_input_nodes):
            yield node


def _revalued(node: Node, changed: Mapping[Node, Any]) -> tuple[Any, bool] | None:
    """The value of `node` where some have the values in `changed`, and whether it is a reshape then and no view; None
    where it is not for any strides, or is another tensor."""
    if node.op != "call_function" or not (_takes_any_strides(node) or node.target is operator.getitem):
        return None
    target: Any = node.target
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: changed.get(n, n.meta["val"]))
    reshapes = False
    with torch.no_grad():
        try:
            value = target(*args, **kwargs)
        except (RuntimeError, ValueError):
            if target is not aten.view.default:
                return None
            value, reshapes = aten.reshape.default(*args, **kwargs), True
    parts, before = _parts(value), _parts(node.meta["val"])
    fits = len(parts) == len(before) and all(map(_same_shape, parts, before))
    return (value, reshapes) if fits else None


def _give(values: Mapping[Node, Any], as_reshape: Sequence[Node]) -> None:
    for node in as_reshape:
        node.target = aten.reshape.default
    for node, value in values.items():
        node.meta["val"] = value
        node.meta.pop("tensor_meta", None)


def _parts(value: Any) -> Sequence[Any]:
    """The parts of what was split, or the one value."""
    return value if isinstance(value, (list, tuple)) else (value,)


def _same_shape(a: Any, b: Any) -> bool:
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and same_sizes(a.shape, b.shape)


def _takes_any_strides(node: Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace in ("aten", "prims")
        and target not in STRIDE_BOUND
        and not target._schema.is_mutable
        and torch.Tag.needs_fixed_stride_order not in target.tags
        and torch.Tag.needs_exact_strides not in target.tags
    )


def _in_layout_of(builder: Builder, node: Node, like: torch.Tensor) -> Node:
    """`node` copied so that its dimensions lie in memory in the order they have in `like`."""
    strides = [_hint(s) for s in like.stride()]
    order = sorted(range(like.dim()), key=lambda d: strides[d], reverse=True)
    inverse = [order.index(d) for d in range(like.dim())]
    permuted = builder.call(aten.permute.default, node, order)
    dense = builder.call(aten.clone.default, permuted, memory_format=torch.contiguous_format)
    return builder.call(aten.permute.default, dense, inverse)


def _hint(size: int | torch.SymInt) -> int:
    """A number to sort by: the size itself or the example value that a symbolic size was traced with."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(size.node.hint) if size.node.hint is not None else len(sympy.Mul.make_args(expr))
