"""Attention sinks: one more column beside the scores, which takes part in the softmax and meets no value.

softmax([scores | sink])[..., :-1] · v, or softmax([sink | scores])[..., 1:] · v
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import sympy
import torch
from torch.fx import Node

from . import axes
from .softmax import Softmax, less_maximum, uncast

aten = torch.ops.aten


def without_sink(found: Softmax) -> tuple[Softmax, Node] | None:
    """The softmax of the scores beside a sink, seen where the sink's probability is dropped, with the sink."""
    dropped, first = _column_dropped(found.node) or (None, False)
    if dropped is None or found.factor != 1.0 or found.by is not None or found.total:
        return None
    joined = uncast(found.scores)
    joined = uncast(less_maximum(joined, found.dim) or joined)
    if joined.target is not aten.cat.default or len(cast("list[Node]", joined.args[0])) != 2:
        return None
    scores, sink = cast("list[Node]", joined.args[0])[:: -1 if first else 1]
    rank = len(axes.shape_of(joined))
    dim = cast(int, joined.args[1] if len(joined.args) > 1 else 0) % rank
    if dim != found.dim % rank or dim != rank - 1 or not axes.same(axes.shape_of(sink)[dim], axes.ONE):
        return None
    return replace(found, node=dropped, scores=scores), sink


def _column_dropped(node: Node) -> tuple[Node, bool] | None:
    """The one reader of `node`, through casts, where it takes all but one column, and whether that is the first one."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.slice.Tensor:
            before, after = axes.shape_of(node), axes.shape_of(user)
            dim, start = (*user.args[1:], 0, 0)[:2]
            shorter = axes.same(before[-1] - sympy.Integer(1), after[-1])
            along_last = cast(int, dim) % len(before) == len(before) - 1
            return (user, bool(start == 1)) if along_last and shorter and start in (0, 1, None) else None
        if user.target not in axes.CASTS and user.target not in axes.COPIES:
            return None
        node = user
    return None
