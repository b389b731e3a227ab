"""Matrix products stay whole while we match, and end as Inductor would have had them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compiler import decompositions
from fusion_compiler.torch_private import inductor

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


@pytest.mark.parametrize("product", ["mm", "bmm", "addmm"])
def test_products_are_padded_after_matching_where_inductor_would(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision is Inductor's, which measures on the device; here it is taken for granted."""
    from torch._inductor import config
    from torch._inductor.fx_passes import pad_mm

    asked: list[Any] = []

    def should_pad(match: Any, mat1: Any, mat2: Any, op: Any, input: Any = None) -> bool:
        if not config.shape_padding:
            return False
        asked.append(op)
        assert not pad_mm.should_exclude_padding_time(match, "mat1")  # looks at the match as the original does
        return True

    monkeypatch.setattr(pad_mm, "should_pad", should_pad)
    x, w, b = torch.randn(2, 5, 6), torch.randn(2, 6, 7), torch.randn(7)
    functions: dict[str, Any] = {
        "mm": lambda x, w, b: x[0] @ w[0],
        "bmm": lambda x, w, b: x @ w,
        "addmm": lambda x, w, b: torch.addmm(b, x[0], w[0]),
    }
    seen: list[list[Any]] = []

    def backend(gm: Any, inputs: Any) -> Any:
        def step(gm: Any, inputs: Any, *, pads: bool, **_: Any) -> Any:
            assert pads and not config.shape_padding
            seen.append([n.target for n in gm.graph.nodes])
            decompositions.finish(gm, pads=pads)
            seen.append([n.target for n in gm.graph.nodes])
            return inductor.run_eagerly(gm)

        return inductor.compile_graph(gm, inputs, step, {})

    function = functions[product]
    torch.testing.assert_close(torch.compile(function, backend=backend)(x, w, b), function(x, w, b))
    whole, finished = seen
    pad, op = torch.ops.aten.constant_pad_nd.default, getattr(torch.ops.aten, product)
    assert op.default in whole and pad not in whole and pad in finished
    assert asked == [op]
