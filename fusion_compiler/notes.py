"""What the user should know of a graph as a whole, whatever becomes of its matches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from .legality import is_empty
from .report import where

_UNFUSED: tuple[tuple[str, Callable[[Node], bool]], ...] = (
    ("complex", lambda node: node.meta["val"].is_complex()),
    ("float64", lambda node: node.meta["val"].dtype == torch.float64 and node.meta["val"].dim() > 0),
    ("empty", is_empty),
)


def notes(gm: GraphModule, *, trains: bool) -> tuple[str, ...]:
    """What the user should know of a graph as a whole."""
    found = []
    if trains:
        found.append("part of a training step: intermediates saved for backward stay, so less can be fused")
    for kind, holds in _UNFUSED:
        named = [n for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor) and holds(n)]
        if named:
            some = f"{named[0].name} at {where(named[0])}"
            found.append(f"{kind} tensors are left to Inductor; there are {len(named)} here, the first is {some}")
    bodies = [n for n in gm.graph.nodes if any(_is_body(gm, a) for a in n.all_input_nodes)]
    if bodies:
        found.append(
            f"bodies of {bodies[0].target} are left to Inductor; there are {len(bodies)} here, the first at "
            f"{where(bodies[0])}; what is computed outside of them can be fused"
        )
    return tuple(found)


def _is_body(gm: GraphModule, node: Node) -> bool:
    """Whether a node is a graph that a higher-order operator calls: cond, while_loop, a nested_compile_region."""
    return node.op == "get_attr" and isinstance(getattr(gm, str(node.target), None), GraphModule)
