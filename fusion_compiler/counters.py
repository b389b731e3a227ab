"""Finds integers on the device that the graph advances: each layer of a static cache counts its positions by itself."""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import Node

from .fused import Counters, Site
from .match import Match, NearMiss
from .semantics import SemanticView
from .shapes import shape_of

aten = torch.ops.aten
PATTERN = "counters"
INTEGERS = (torch.int32, torch.int64)


def find_counters(view: SemanticView) -> tuple[list[Match], list[NearMiss]]:
    """One match of all integers on a device that are advanced, where there are several."""
    found: dict[torch.device, list[Node]] = {}
    misses = []
    for node in filter(_advances, view.graph_module.graph.nodes):
        reader = next((user for user in node.users if user.target is not aten.copy_.default), None)
        if reader is None:
            found.setdefault(node.meta["val"].device, []).append(node)
        else:
            reason = f"{reader.name} reads what {node.args[0]} becomes, which has to be made where it is needed"
            misses.append(NearMiss(PATTERN, node, reason, reader))
    return [_match(nodes) for nodes in found.values() if len(nodes) > 1], misses


def _advances(node: Node) -> bool:
    """Whether `node` is an input of one integer plus a constant, which becomes that input's new value."""
    if node.target is not aten.add.Tensor or node.kwargs or node.meta["val"].dtype not in INTEGERS:
        return False
    counter, step = node.args
    if not isinstance(counter, Node) or counter.op != "placeholder" or type(step) is not int:
        return False
    return all(n == 1 for n in shape_of(node)) and any(
        user.target is aten.copy_.default and user.args == (counter, node) for user in node.users
    )


def _match(nodes: list[Node]) -> Match:
    last, others = nodes[-1], tuple(nodes[:-1])
    counted = [cast("tuple[Node, int]", n.args) for n in nodes]
    counters, steps = (tuple(part) for part in zip(*counted, strict=True))
    dtypes = tuple(n.meta["val"].dtype for n in nodes)
    op = Counters(steps, (len(nodes) - 1, *range(len(nodes) - 1)), dtypes)
    return Match(PATTERN, op, Site(counters, last, tuple(nodes), others=others))
