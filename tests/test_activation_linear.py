"""Linears that compute their input themselves: found, right in Triton's interpreter, and judged for an H200."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_graphs import traced

import fusion_compiler as fc
from fusion_compiler.lowering.triton_codegen import matmul
from fusion_compiler.lowering.triton_codegen.plans import Plan
from fusion_compiler.machine import TABLE
from fusion_compiler.match import Match, find_all
from fusion_compiler.pattern import trace
from fusion_compiler.patterns.activation_linear import activation_linear
from fusion_compiler.semantics import SemanticView
from fusion_compiler.severed import severed_seconds
from fusion_compiler.splice import Builder, clean, replace

Tensor = torch.Tensor
Function = Callable[..., Tensor]
PLANS = {
    "gemv": Plan("gemv", 2, 16, 64, 4),
    "gemv in lanes": Plan("gemv", 2, 16, 64, 4, num_stages=3, lanes=8),
    "swap": Plan("swap", 16, 16, 64, 4, 3),
    "sliced": Plan("sliced", 16, 16, 16, 4, 3, slices=4),
}
FUNCTIONS: dict[str, Function] = {
    "gelu": lambda h, u, w, b, s: F.linear(F.gelu(h), w, b),
    "product, scaled behind": lambda h, u, w, b, s: F.linear(F.silu(h) * u, w) * b,
    "parts of one tensor": lambda h, u, w, b, s: F.linear(F.relu(torch.cat([h, u], -1).chunk(2, -1)[1]) * h, w),
    "scales of columns, rows and all": lambda h, u, w, b, s: F.linear(h * s * u.amax(-1, keepdim=True) * b.sum(), w),
    "not a number past K": lambda h, u, w, b, s: F.linear(1.0 / (h.abs() + u.square()), w),
}


def _tensors(rows: int, k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    shapes = (rows, k), (rows, k), (n, k), (n,), (k,)
    return tuple((torch.randn(s) / (k**0.5 if s == (n, k) else 1.0)).to(dtype) for s in shapes)


def _found(function: Function, tensors: tuple[Tensor, ...]) -> tuple[torch.fx.GraphModule, Match]:
    gm = trace(function, tensors)
    [match], near_misses = find_all(SemanticView(gm), [activation_linear])
    assert not near_misses
    return gm, match


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers(name: str, plan: Plan) -> None:
    for rows, k, n in ((2, 128, 96), (1, 130, 90)):  # all even, nothing even
        tensors = _tensors(rows, k, n, torch.float16)
        gm, match = _found(FUNCTIONS[name], tensors)
        builder = Builder(gm, match.site.output)
        replace(match.site, matmul.emit(match.op, plan, builder, match.site))
        clean(gm)
        assert sum("triton_kernel" in str(node.target) for node in gm.graph.nodes) == 1
        copies = [node for node in gm.graph.nodes if node.target is torch.ops.aten.clone.default]
        assert not copies, "rows that lie further apart are read where they lie"
        out, eager = gm(*tensors), FUNCTIONS[name](*tensors)
        exact = FUNCTIONS[name](*(t.double() for t in tensors))
        ours, own = ((t.double() - exact).norm() for t in (out, eager))
        assert ours <= 1.5 * own, ours / own


def test_what_others_read_is_an_input() -> None:
    def shared(h: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        x = F.silu(h) * u
        return F.linear(x.tanh(), w), x

    h, u, w, *_ = _tensors(3, 8, 12, torch.float32)
    _, match = _found(shared, (h, u, w))
    assert repr(match.op.activation) == "tanh(extra(index=0))"


@pytest.mark.parametrize(
    "function",
    [
        lambda h, u, w: F.linear(h, w),
        lambda h, u, w: F.linear(F.rms_norm(h, (8,)), w),
        lambda h, u, w: (F.linear(F.silu(h), w), F.linear(F.silu(h), w * 2)),
    ],
    ids=["nothing in front", "a norm", "an activation that two linears read"],
)  # fmt: skip
def test_not_found(function: Function) -> None:
    h, u, w, *_ = _tensors(3, 8, 12, torch.float32)
    assert not find_all(SemanticView(trace(function, (h, u, w))), [activation_linear])[0]


# ---- verdicts -----------------------------------------------------------------------------------
def _verdicts(function: Function, rows: int) -> dict[str, fc.report.Decision]:
    tensors = (torch.randn(rows, 4096), torch.randn(rows, 4096), torch.randn(4096, 4096))
    report = fc.explain(function, *(t.bfloat16() for t in tensors), machine="h200")
    return {d.pattern: d for d in report.decisions}


def test_one_row_pays_and_many_do_not() -> None:
    def mlp(h: Tensor, u: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.relu(h) * u, w)

    assert _verdicts(mlp, 1)["activation_linear"].verdict == "fused"
    assert _verdicts(lambda h, u, w: F.linear(F.gelu(h), w), 16)["activation_linear"].verdict == "kept"
    assert "compute the activation again" in _verdicts(mlp, 64)["activation_linear"].reason


def test_an_activation_in_anothers_kernel_saves_none() -> None:
    """Inductor multiplies in the kernel that reduces the row."""

    def mlp(h: Tensor, u: Tensor, w: Tensor) -> Tensor:
        return F.linear(h.abs().amax(-1, keepdim=True) * u, w)

    gm = traced(mlp, (2, 4096), (2, 4096), (4096, 4096), dtype=torch.bfloat16)
    [match], _ = find_all(SemanticView(gm), [activation_linear])
    alone, shared = (severed_seconds(match.site, [], TABLE["h200"], activation=a) for a in (False, True))
    assert alone == 0 and shared > 1e-6


def test_behind_a_linear_the_activation_is_its_epilogue() -> None:
    def mlp(h: Tensor, u: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(h, w)), w)

    found = _verdicts(mlp, 16)
    assert found["linear_epilogue"].verdict == "fused" and found["activation_linear"].verdict == "kept"
