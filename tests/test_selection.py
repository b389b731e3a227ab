"""Which of the fusions that overlap in a graph are carried out: the best total saving, without cycles."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_graphs import attention, traced
from torch import Tensor
from torch.fx import GraphModule, Node

import fusion_compiler as fc
from fusion_compiler import backend, splice
from fusion_compiler.candidates import Candidate, Traffic
from fusion_compiler.fused import Site
from fusion_compiler.legality import Legality
from fusion_compiler.pattern import trace
from fusion_compiler.report import Decision, Work

aten = torch.ops.aten


def planned(function: Any, *shapes: tuple[int, ...]) -> fc.Report:
    graph_module = traced(function, *shapes, dtype=torch.bfloat16)
    return backend.plan(graph_module, backend.parse_options({"machine": "h200", "strict": True}), "").report


def judged(graph_module: GraphModule, name: str, saving: float, *nodes: str, others: str = "") -> backend.Judged:
    """A fusion of these nodes of a chain, the last its output, that is said to save so much."""
    named = {n.name: n for n in graph_module.graph.nodes}
    interior = tuple(named[n] for n in nodes)
    operands = {s: None for n in interior for s in n.all_input_nodes if s not in interior}
    site = Site(tuple(operands), interior[-1], interior, others=tuple(named[n] for n in others.split()))
    before, after = Work(1, 1, 1, 1, 10.0), Work(1, 1, 1, 1, 10.0 - saving)
    decision = Decision(name, "fused", "it pays", name, before, after)

    def emit(builder: splice.Builder, at: Site) -> tuple[Node, ...]:
        """The same nodes once more."""
        made: dict[Node, Node] = dict(zip(operands, at.operands, strict=True))
        for node in interior:
            made[node] = builder.call(node.target, *[made.get(a, a) if isinstance(a, Node) else a for a in node.args])
        return tuple(made[n] for n in site.outputs)

    return backend.Judged(decision, site, Candidate(name, name, Traffic(1, 1, 1, 1), 1.0, emit))


def verdicts(graph_module: GraphModule, *fusions: backend.Judged) -> dict[str, str]:
    return {j.decision.pattern: j.decision.verdict for j in backend.choose(graph_module, fusions)}


def chain(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(torch.tanh(torch.cos(torch.sin(x))))


def test_the_largest_saving_is_left_where_its_neighbours_save_more_together() -> None:
    graph_module = trace(chain, (torch.randn(4),))
    fusions = [
        judged(graph_module, "left", 3.0, "sin", "cos"),
        judged(graph_module, "largest", 5.0, "cos", "tanh"),
        judged(graph_module, "right", 4.0, "tanh", "sigmoid"),
    ]
    assert verdicts(graph_module, *fusions) == {"left": "fused", "largest": "kept", "right": "fused"}
    chosen = backend.choose(graph_module, fusions)
    assert "takes some of the same nodes; together the chosen fusions save more" in chosen[1].decision.reason
    x = torch.randn(4)
    options = backend.parse_options({"strict": True})
    backend.splice_all(graph_module, [j for j in chosen if j.decision.verdict == "fused"], options)
    torch.testing.assert_close(graph_module(x), chain(x))


def crossed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.sin(x), torch.cos(x)
    return torch.add(a, torch.tanh(b)), torch.mul(b, torch.sigmoid(a))


def test_two_fusions_that_wait_for_each_other_are_not_both_taken() -> None:
    """Each alone is legal; as one node each, either would read what the other makes."""
    graph_module = trace(crossed, (torch.randn(4),))
    first = judged(graph_module, "first", 2.0, "sin", "add", others="sin")
    second = judged(graph_module, "second", 1.0, "cos", "mul", others="cos")
    assert verdicts(graph_module, first, second) == {"first": "fused", "second": "kept"}
    kept = backend.choose(graph_module, [first, second])[1].decision.reason
    assert "cyclic" in kept


def test_a_second_result_is_handed_to_its_reader() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.sin(x)
        return torch.tanh(torch.cos(h)), torch.cumsum(h, 0)

    graph_module, x = trace(function, (torch.randn(4),)), torch.randn(4)
    pair = judged(graph_module, "pair", 1.0, "sin", "cos", "tanh", others="sin")
    assert Legality(graph_module.graph).check(pair.site) is None
    backend.splice_all(graph_module, backend.choose(graph_module, [pair]), backend.parse_options({"strict": True}))
    for out, wanted in zip(graph_module(x), function(x), strict=True):
        torch.testing.assert_close(out, wanted)
    without = judged(graph_module, "single", 1.0, *[n.name for n in graph_module.graph.nodes if n.op == "call_function"
                                                    and n.target in (aten.sin.default, aten.cos.default)])  # fmt: skip
    assert "is also used by" in (Legality(graph_module.graph).check(without.site) or "")


def test_a_path_that_leaves_a_fusion_and_returns_is_refused() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        a = torch.sin(x)
        return operator.mul(torch.cos(a), torch.cumsum(a, 0))

    graph_module = trace(function, (torch.randn(4),))
    refusal = Legality(graph_module.graph).check(judged(graph_module, "hollow", 1.0, "sin", "cos", "mul").site)
    assert refusal is not None and "cumsum" in refusal


# ---- the built-in patterns ------------------------------------------------------------------------
def test_a_softmax_inside_an_attention_is_left_to_it() -> None:
    shape = (4, 32, 2048, 128)
    made = {d.pattern: d for d in planned(attention(), shape, shape, shape).decisions}
    assert made["attention"].verdict == "fused"
    assert "softmax" not in made or made["softmax"].verdict == "kept"


@pytest.mark.parametrize(("rows", "winner"), [(1, "gated_mlp"), (8192, "norm")])
def test_a_norm_goes_where_it_saves_most(rows: int, winner: str) -> None:
    """Folded into the products of one row; by itself where these are compute-bound."""

    def mlp(x: torch.Tensor, w: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w
        return F.silu(h @ gate.T) * (h @ up.T)

    made = planned(mlp, (rows, 4096), (4096,), (14336, 4096), (14336, 4096))
    assert [d.pattern for d in made.fused] == [winner], [(d.pattern, d.reason) for d in made.decisions]


def test_the_linear_behind_an_attention_of_one_query_can_be_fused_as_well() -> None:
    def step(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(q @ k.transpose(-1, -2) * 0.125, -1)
        return x + F.linear((p @ k).transpose(1, 2).reshape(1, 1, -1), w)

    report = planned(step, (1, 32, 1, 64), (1, 32, 4096, 64), (2048, 2048), (1, 1, 2048))
    assert sorted(d.pattern for d in report.fused) == ["attention", "linear_epilogue"]


def test_the_sum_in_front_of_the_last_norm_and_the_head_behind_it_are_both_fused() -> None:
    """Nobody but the norm reads the sum: its cast to float32 belongs to the norm, and not to the sum's kernel."""

    def end(x: torch.Tensor, residual: torch.Tensor, down: torch.Tensor, g: torch.Tensor, head: torch.Tensor) -> Any:
        wide = (residual + F.linear(x, down)).float()
        normed = g * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return F.linear(normed, head)

    report = planned(end, (1, 8192), (1, 2048), (2048, 8192), (2048,), (32000, 2048))
    assert sorted(d.pattern for d in report.fused) == ["linear_epilogue", "norm_linear"]


def test_only_what_is_carried_out_bounds_the_sizes_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A match whose nodes another fusion takes would have ranges of its own, which are nobody's business."""
    held: list[str] = []

    def holding(_: object, judged: Sequence[backend.Judged]) -> None:
        held.extend(j.decision.pattern for j in judged if j.span)
        raise NotImplementedError("seen enough: the graph runs as it is")

    def glu(x: Tensor, g: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        h = F.rms_norm(x, (2048,), g)
        return F.silu(h @ gate.T) * (h @ up.T)

    monkeypatch.setattr(backend, "hold_ranges", holding)
    shapes = ((16, 2048), (2048,), (4096, 2048), (4096, 2048))
    inputs = [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]
    torch._dynamo.mark_dynamic(inputs[0], 0)
    compiled = torch.compile(glu, backend=backend.fusion_compiler, options={"machine": "h200", "remainder": "eager"})
    with torch.no_grad():
        compiled(*inputs)
    assert held == ["gated_mlp"]
