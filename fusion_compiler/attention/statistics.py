"""The logarithm of the sum of exponentials beside an attention, where a graph uses it: parts of a cache that are merged
later, ring attention, sinks that scale the result.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import cast

import torch
from torch.fx import Node

from ..fused import Attention
from . import axes
from .softmax import Softmax, logarithm_of_sum, same_scores, uncast, unscaled

aten = torch.ops.aten

_STEPS = axes.CASTS | axes.RESHAPES | axes.COPIES | {
    aten.expand.default, aten.amax.default, aten.max.dim, operator.getitem, aten.abs.default, aten.eq.Scalar,
    aten.where.self, aten.sub.Tensor, aten.exp.default, aten.sum.dim_IntList, aten.log.default, aten.add.Tensor,
}  # fmt: skip


def logarithm(found: Softmax) -> Node | None:
    """log Σ exp(x) over the rows of the softmax of x, in the shape of x without that dimension or with 1 there."""
    x = uncast(found.scores)
    whole = axes.shape_of(x)
    dim = found.dim % len(whole)
    shapes = (*whole[:dim], *whole[dim + 1 :]), (*whole[:dim], axes.ONE, *whole[dim + 1 :])
    for node in _behind(unscaled(found)[0]):
        parts = logarithm_of_sum(node) if node.target in (aten.log.default, aten.add.Tensor) else None
        if parts is None or dim != cast("list[int]", parts[1].args[1])[0] % len(whole):
            continue
        if not same_scores(found, Softmax(found.node, parts[0], dim)):
            continue
        held = [node, *node.all_input_nodes]
        if any(all(axes.same_shape(axes.shape_of(n), shape) for n in held) for shape in shapes):
            return node
    return None


def unknown_logarithm(op: Attention) -> str:
    """Why a kernel that hides keys would give another logarithm than the scores have; empty where it gives the same."""
    made = op.modification
    if made is not None and made.sink is not None:
        return "it leaves out the sink that stands beside the scores"
    if op.mask.empty_rows == "mean" or (made is not None and (made.finite or made.unknown)):
        return "keys may be hidden by finite numbers, which a row that sees no key adds up; hide them with −inf"
    return ""


def _behind(x: Node) -> Iterator[Node]:
    """What is computed from x by the steps of such a logarithm, sums that are shifted before those that are not."""
    reached, stack = set[Node](), [x]
    while stack:
        for user in stack.pop().users:
            if user not in reached and (user.target in _STEPS or axes.scaling(user) is not None):
                reached.add(user)
                stack.append(user)
    return iter(sorted(reached, key=lambda n: (n.target is not aten.add.Tensor, n)))
