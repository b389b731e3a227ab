"""What runs around Inductor's joint passes (`config.joint_custom_pre_pass`, `joint_custom_post_pass`).

Where one of these passes finds that x · 1 is x, it writes what it knew of the product over what is known of x, strides
included. Inductor computes all values anew before it looks at them; we look before. So what a node had when the passes
began is given back to it afterwards, and its readers get the values that follow from that.
Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

from ..layout import follow
from ..legality import mark_compared
from ..splice import same_strides
from .attention_rewrite import check_attention

_known: WeakKeyDictionary[Graph, dict[Node, Any]] = WeakKeyDictionary()


def around(before: Any, after: Any) -> dict[str, Any]:
    """Inductor's settings with our passes in the place of those that the user configured there, which run first."""
    return {"joint_custom_pre_pass": Before(before), "joint_custom_post_pass": After(after)}


class _Pass(CustomGraphPass):
    def __init__(self, configured: Any = None) -> None:
        several = isinstance(configured, (list, tuple))
        self.configured = tuple(configured) if several else () if configured is None else (configured,)

    def __call__(self, graph: Graph) -> None:
        for configured in self.configured:
            configured(graph)
        self.run(graph)

    def run(self, graph: Graph) -> None:
        raise NotImplementedError

    def uuid(self) -> Any:
        known = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.configured]
        return None if None in known else (type(self).__qualname__, *known)


class Before(_Pass):
    """Remembers the values of all nodes, and has Inductor's rewrites of attention checked."""

    def run(self, graph: Graph) -> None:
        _known[graph] = {node: node.meta.get("val") for node in graph.nodes}
        check_attention()


class After(_Pass):
    """Gives values back that were overwritten, and marks what a backward pass compares exactly."""

    def run(self, graph: Graph) -> None:
        known = _known.pop(graph, {})
        overwritten: dict[Node, Any] = {}
        for node in graph.nodes:
            before, now = known.get(node), node.meta.get("val")
            if before is now or not isinstance(before, torch.Tensor) or not isinstance(now, torch.Tensor):
                continue
            if before.shape == now.shape and before.dtype == now.dtype and not same_strides(before, now):
                node.meta["val"] = overwritten[node] = before
        follow(graph, overwritten)
        if any(node.name.startswith("tangents") for node in graph.find_nodes(op="placeholder")):
            mark_compared(graph)
