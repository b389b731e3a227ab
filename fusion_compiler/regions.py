"""Parts of an FX graph as graphs of their own, and inputs for them: what `measure` compiles and times."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .cost.amounts import amount, at
from .torch_private.symbols import traced_values


def cut(nodes: Sequence[Node], outputs: Sequence[Node] = ()) -> tuple[GraphModule, Mapping[Node, Node]]:
    """`nodes` (in graph order) as a graph, with the copy of each node. What they read becomes an input, only
    constants are copied; it returns `outputs`, by default those of the nodes that others read."""
    inside = set(nodes)
    read = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    constants = [n for n in read if n.op == "call_function" and not n.all_input_nodes]
    graph, copies = Graph(), dict[Node, Node]()
    for node in read:
        if node not in constants:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
    for node in (*sorted(constants), *nodes):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    wanted = outputs or [n for n in nodes if any(user not in inside for user in n.users)]
    graph.output(tuple(t for n in wanted for t in _tensors(graph, copies[n])))
    return GraphModule(torch.nn.Module(), graph), copies


def _tensors(graph: Graph, node: Node) -> list[Node]:
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return [node]
    parts = value if isinstance(value, (tuple, list)) else ()
    return [
        graph.call_function(operator.getitem, (node, i)) for i, p in enumerate(parts) if isinstance(p, torch.Tensor)
    ]


def random_inputs(gm: GraphModule, seed: int) -> list[Any]:
    """An argument for every placeholder: of its shape, strides, dtype and device, as they were when tracing.

    Floating-point numbers are normal, integers 0 or 1: small enough for an index into whatever they point at.
    """
    return [_random(node, seed + i) for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))]


def _random(node: Node, seed: int) -> Any:
    value = node.meta.get("val")
    if isinstance(value, (int, torch.SymInt)):
        return traced_size(value)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"no input can be made up for {node.name}: it is {type(value).__name__} and no tensor")
    shape, stride = [traced_size(s) for s in value.shape], [traced_size(s) for s in value.stride()]
    offset = traced_size(value.storage_offset())
    extent = offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else offset
    generator = torch.Generator(value.device).manual_seed(seed)
    if value.dtype.is_floating_point:
        plain = value.dtype if value.dtype in (torch.float16, torch.bfloat16, torch.float64) else torch.float32
        stored = torch.randn(extent, dtype=plain, device=value.device, generator=generator).to(value.dtype)
    else:
        stored = torch.randint(0, 2, (extent,), device=value.device, generator=generator).to(value.dtype)
    return stored.as_strided(shape, stride, offset)


def traced_size(size: int | torch.SymInt) -> int:
    """A size as a number: the one seen when tracing, where it is symbolic."""
    return int(at(amount(size), traced_values(size))) if isinstance(size, torch.SymInt) else size
