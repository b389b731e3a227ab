"""Which ATen operators are taken apart before matching: all that Inductor takes apart, except matrix products.

At M = 1 (and for tiny products on a CPU) Inductor may write mm as multiply-and-sum, which its pointwise codegen likes
and a matcher does not; on a GPU it may pad the operands. So products stay whole while we look, and `finish` hands
Inductor's own decomposition or padding to those that nothing has claimed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from .torch_private.padding import padded

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default)

Table = dict[Any, Callable[..., Any]]


def table() -> Table:
    """Inductor's decompositions for the configuration in force, without those of matrix products."""
    return {op: rule for op, rule in select_decomp_table().items() if op not in _PRODUCTS}


def finish(graph_module: GraphModule, *, pads: bool = False) -> None:
    """Take apart the remaining matrix products exactly as Inductor would have done, or pad them where it `pads`."""
    rules = select_decomp_table()
    for node in list(graph_module.graph.nodes):
        if node.target not in _PRODUCTS or not isinstance(node.meta.get("val"), FakeTensor):
            continue
        rule = rules.get(node.target)
        if rule is None or not _rewritten(node, rule, rules):
            way = padded(node) if pads else None
            if way is not None:
                _rewritten(node, way, rules)
    graph_module.recompile()


def _rewritten(node: Node, rule: Callable[..., Any], rules: Table) -> bool:
    """Whether `rule` computes the product `node`, which is replaced then."""

    def product(*values: torch.Tensor) -> Any:
        by_node = dict(zip(node.all_input_nodes, values, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), by_node.__getitem__)
        return rule(*args, **kwargs)

    operands = [n.meta["val"] for n in node.all_input_nodes]
    with node.meta["val"].fake_mode:
        if product(*operands) is NotImplemented:
            return False
        traced = make_fx(product, decomposition_table=rules)(*operands)
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    with node.graph.inserting_before(node):
        for step in traced.graph.nodes:
            if step.op != "call_function":
                continue
            copies[step] = node.graph.node_copy(step, copies.__getitem__)
            copies[step].meta.update({k: v for k, v in node.meta.items() if k != "val"})
    node.replace_all_uses_with(copies[traced.graph.output_node().args[0]])
    node.graph.erase_node(node)
    return True
