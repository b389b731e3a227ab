"""Matrix products stay whole while we match, and end as Inductor would have had them."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compiler import decompositions

aten = torch.ops.aten


def targets(graph_module: torch.fx.GraphModule) -> list[Any]:
    return [n.target for n in graph_module.graph.nodes if n.op == "call_function"]


def test_a_tiny_product_is_taken_apart_after_matching_as_inductor_does() -> None:
    inputs = torch.randn(1), torch.randn(1, 8), torch.randn(8, 1)
    whole = make_fx(torch.addmm, decomposition_table=decompositions.table(), tracing_mode="fake")(*inputs)
    assert targets(whole) == [aten.addmm.default]
    inductors = make_fx(torch.addmm, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
    assert aten.addmm.default not in targets(inductors), "Inductor no longer takes this one apart: find another example"
    decompositions.finish(whole)
    whole.graph.lint()
    assert targets(whole) == targets(inductors)
    torch.testing.assert_close(whole(*inputs), torch.addmm(*inputs))


def test_a_product_that_inductor_leaves_whole_is_left_whole() -> None:
    inputs = torch.randn(4, 8), torch.randn(8, 6)
    whole = make_fx(torch.mm, decomposition_table=decompositions.table(), tracing_mode="fake")(*inputs)
    decompositions.finish(whole)
    assert targets(whole) == [aten.mm.default]
