"""What must not be fused, and the sentence that says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx import GraphModule, Node

from fusion_compiler.fused import Site
from fusion_compiler.legality import Legality

aten = torch.ops.aten
Trace = Callable[..., GraphModule]


def whole(gm: GraphModule, output: object, escaping: tuple[Node, ...] = ()) -> Site:
    """All calculations up to the last call of `output` as one site."""
    calls = gm.graph.find_nodes(op="call_function", target=output)
    last = calls[-1]
    interior: list[Node] = []
    stack = [last]
    while stack:
        node = stack.pop()
        if node.op != "placeholder" and node not in interior:
            interior.append(node)
            stack.extend(node.all_input_nodes)
    operands = tuple(n for n in gm.graph.nodes if n.op == "placeholder")
    return Site(operands, last, tuple(sorted(interior)), escaping)


def refusal(gm: GraphModule, site: Site) -> str:
    reason = Legality(gm.graph).check(site)
    assert reason is not None
    return reason


def test_a_plain_chain_is_legal(trace: Trace) -> None:
    gm = trace(lambda x, w: torch.tanh(x @ w), torch.randn(4, 8), torch.randn(8, 8))
    assert Legality(gm.graph).check(whole(gm, aten.tanh.default)) is None


def test_an_intermediate_used_elsewhere(trace: Trace) -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x @ w
        return torch.tanh(y), y + 1

    gm = trace(fn, torch.randn(4, 8), torch.randn(8, 8))
    mm = gm.graph.find_nodes(op="call_function", target=aten.mm.default)[0]
    mm.meta["stack_trace"] = '  File "model.py", line 3, in forward\n    y = x @ w\n'
    reason = refusal(gm, whole(gm, aten.tanh.default))
    assert "mm (model.py:3) is also used by add" in reason
    assert "compute it twice" in refusal(gm, whole(gm, aten.tanh.default, (mm,)))


def test_an_intermediate_that_is_returned(trace: Trace) -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * 2
        return torch.tanh(y), y

    gm = trace(fn, torch.randn(4, 8))
    assert "returned by the graph" in refusal(gm, whole(gm, aten.tanh.default))
    double = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)[0]
    assert Legality(gm.graph).check(whole(gm, aten.tanh.default, (double,))) is None, "cheap: may be computed twice"


def test_an_operand_overwritten_before_the_fused_kernel_runs(trace: Trace) -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        doubled = x * 2
        aten.copy_.default(x, y)
        return torch.tanh(doubled)

    gm = trace(fn, torch.randn(4), torch.randn(4))
    assert "overwrites" in refusal(gm, whole(gm, aten.tanh.default))

    def harmless(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result = torch.tanh(x * 2)
        aten.copy_.default(x, y)
        return result

    gm = trace(harmless, torch.randn(4), torch.randn(4))
    assert Legality(gm.graph).check(whole(gm, aten.tanh.default)) is None


def test_an_overwritten_view_of_an_operand(trace: Trace) -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        view = x[1:]
        doubled = x * 2
        aten.copy_.default(view, y)
        return torch.tanh(doubled)

    gm = trace(fn, torch.randn(4), torch.randn(3))
    assert "overwrites" in refusal(gm, whole(gm, aten.tanh.default))


def test_a_write_inside_the_region(trace: Trace) -> None:
    gm = trace(lambda x: torch.tanh(aten.add_.Tensor(x * 2, 1)), torch.randn(4))
    assert "in place" in refusal(gm, whole(gm, aten.tanh.default))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.randn(4, dtype=torch.complex64), "complex"),
        (lambda: torch.randn(4, dtype=torch.float64), "float64"),
        (lambda: torch.randn(0, 4), "empty"),
    ],
)
def test_values_that_fused_kernels_do_not_handle(trace: Trace, make: Callable[[], torch.Tensor], words: str) -> None:
    gm = trace(lambda x: torch.tanh(x * 2), make())
    assert words in refusal(gm, whole(gm, aten.tanh.default))


def test_random_numbers(trace: Trace) -> None:
    gm = trace(lambda x: torch.tanh(torch.rand_like(x) * x), torch.randn(4))
    assert "random" in refusal(gm, whole(gm, aten.tanh.default))


def test_an_operand_computed_after_the_output(trace: Trace) -> None:
    gm = trace(lambda x: (torch.tanh(x), x + 1), torch.randn(4))
    late = gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)[0]
    out = gm.graph.find_nodes(op="call_function", target=aten.tanh.default)[0]
    assert "only computed after" in refusal(gm, Site((late,), out, (out,)))
