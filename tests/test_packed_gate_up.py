"""Gate and up as parts of one linear: one after the other or alternating, in whatever way they are taken apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import fusion_compiler as fc
from fusion_compiler.backend import fusion_compiler
from fusion_compiler.machine import TABLE
from fusion_compiler.match import find_all
from fusion_compiler.pattern import trace
from fusion_compiler.patterns.gated_mlp import gated_mlp
from fusion_compiler.patterns.linear_epilogue import linear_epilogue
from fusion_compiler.semantics import SemanticView

Tensor = torch.Tensor
# starting a kernel is so dear there that everything is fused
DEAR = dataclasses.replace(TABLE["h200"], launch_overhead=1e-3)
SWIGLU: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "alternating": lambda h: (h[..., ::2], h[..., 1::2]),
    "pairs": lambda h: (h.unflatten(-1, (-1, 2))[..., 0], h.unflatten(-1, (-1, 2))[..., 1]),
    "unbound pairs": lambda h: h.view(*h.shape[:-1], -1, 2).unbind(-1),
}


def _compiled(function: Callable[..., Tensor], rows: int) -> fc.Report:
    """Compiles, runs in the interpreter, compares with eager in float64, returns the report."""
    torch._dynamo.reset()
    tensors = torch.randn(2, rows, 64), torch.randn(96, 64) / 8, torch.randn(96)
    x, w, b = (t.half() for t in tensors)
    run = torch.compile(
        function, backend=fusion_compiler, options={"machine": DEAR, "remainder": "eager", "strict": True}
    )
    with torch.no_grad():
        out, eager, exact = run(x, w, b), function(x, w, b), function(x.double(), w.double(), b.double())
    ours, own = ((t.double() - exact).norm() for t in (out, eager))
    assert ours <= 1.5 * own, ours / own
    return fc.last_report()


@pytest.mark.parametrize("rows", [1, 40], ids=["few rows", "tiles"])
@pytest.mark.parametrize("spelling", SWIGLU)
def test_alternating_features_are_read_where_they_lie(spelling: str, rows: int) -> None:
    def mlp(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        gate, up = SWIGLU[spelling](F.linear(x, w, b))
        return F.silu(gate) * up

    report = _compiled(mlp, rows)
    [decision] = report.fused
    assert decision.pattern == "gated_mlp"
    assert ("tile" in decision.kernel) == (rows == 40), decision.kernel


@pytest.mark.parametrize("apart", [lambda h: h.chunk(2, -1), SWIGLU["alternating"]], ids=["halves", "alternating"])
def test_any_pointwise_operations_on_gate_and_up(apart: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    """Clamped, as GPT-OSS has them."""

    def mlp(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        gate, up = apart(F.linear(x, w, b))
        gate, up = gate.clamp(max=1.0), up.clamp(-1.0, 1.0)
        return (up + 1) * (gate * torch.sigmoid(1.702 * gate))

    [decision] = _compiled(mlp, 3).fused
    assert decision.pattern == "linear_epilogue"


def test_unequal_steps_and_gaps_are_refused() -> None:
    x, w, v = torch.randn(3, 8), torch.randn(12, 8), torch.randn(6, 8)

    def in_by_out(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        h = x @ w.T.contiguous()
        return F.silu(h[..., ::2]) * h[..., 1::2]

    def mixed(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return F.silu(F.linear(x, w)[..., ::2]) * F.linear(x, v)

    for function, sentence in ((in_by_out, "with gaps"), (mixed, "every second of another")):
        matches, [near_miss] = find_all(SemanticView(trace(function, (x, w, v))), [gated_mlp])
        assert not matches and sentence in near_miss.reason


def test_parts_that_are_read_elsewhere_or_by_others_are_no_epilogue() -> None:
    def attention(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        q, k, v = F.linear(x, w).split([6, 3, 3], -1)
        return q.tanh(), k, v

    def kept(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h = F.linear(x, w)
        return h[..., ::2].relu() * h[..., 1::2].tanh(), h

    for function in (attention, kept):
        matches, _ = find_all(SemanticView(trace(function, (torch.randn(3, 8), torch.randn(12, 8)))), [linear_epilogue])
        assert not matches
