"""Input that fused kernels do not take: the result is eager's, nothing is fused wrongly, and the report says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fusion_compiler as fc
from fusion_compiler.backend import fusion_compiler
from fusion_compiler.machine import TABLE
from fusion_compiler.report import Report

K, N = 512, 384


def gated_mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v


def run(fn: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Report]:
    """The compiled result and its report, as decided for an H200 and executed by eager and Triton's interpreter."""
    given = {"machine": "h200", "remainder": "eager", "strict": True, **options}
    result = torch.compile(fn, backend=fusion_compiler, options=given)(*args)
    report = fc.last_report()
    assert report is not None
    return result, report


def weights(dtype: torch.dtype = torch.float16, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, K, dtype=dtype) / K**0.5, torch.randn(n, K, dtype=dtype) / K**0.5


def sentences(report: Report) -> str:
    return "\n".join([*(d.reason for d in report.decisions), *(n.reason for n in report.near_misses), *report.notes])


def no_worse_than_eager(result: torch.Tensor, fn: Callable[..., torch.Tensor], *args: torch.Tensor) -> None:
    exact, eager = fn(*(a.double() for a in args)), fn(*args)
    assert result.dtype == eager.dtype and result.shape == eager.shape and result.stride() == eager.stride()
    assert (result - exact).abs().max() <= 1.5 * (eager - exact).abs().max() + torch.finfo(eager.dtype).tiny


def test_float64_keeps_its_precision() -> None:
    x, (gate, up) = torch.randn(1, K, dtype=torch.float64), weights(torch.float64)
    result, report = run(gated_mlp, x, gate, up)
    torch.testing.assert_close(result, gated_mlp(x, gate, up), rtol=1e-13, atol=1e-13)
    assert not report.fused and "float64" in sentences(report)


def test_complex_numbers() -> None:
    def rotate(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        z = torch.view_as_complex(x.reshape(4, -1, 2))
        return torch.view_as_real(z @ w)

    x, w = torch.randn(4, 16), torch.randn(8, 8, dtype=torch.complex64)
    result, report = run(rotate, x, w)
    torch.testing.assert_close(result, rotate(x, w), rtol=0, atol=0)
    assert not report.fused and "complex" in sentences(report)


@pytest.mark.parametrize("rows", [0, (0, 4), (4, 0)])
def test_nothing_to_compute(rows: Any) -> None:
    shape = (rows, K) if isinstance(rows, int) else (*rows, K)
    x, (gate, up) = torch.randn(shape, dtype=torch.float16), weights()
    result, report = run(gated_mlp, x, gate, up)
    assert result.shape == (*shape[:-1], N) and result.dtype == torch.float16
    assert not report.fused and "empty" in sentences(report)


def test_attention_over_an_empty_batch() -> None:
    q = torch.randn(0, 4, 64, 32)
    result, report = run(attention, q, q, q)
    assert result.shape == q.shape and not report.fused and "empty" in sentences(report)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(1, 2 * K, dtype=torch.float16)[:, ::2],
        lambda: torch.randn(K, 4, dtype=torch.float16).t(),
        lambda: torch.randn(4, 2 * K, dtype=torch.float16)[:, 3 : 3 + K],
        lambda: torch.randn(1, K, dtype=torch.float16).expand(4, K),
        lambda: torch.randn(2, K, 3, dtype=torch.float16).permute(0, 2, 1),
    ],
    ids=["every other column", "transposed", "a slice that starts anywhere", "expanded", "permuted"],
)
def test_odd_strides(make: Callable[[], torch.Tensor]) -> None:
    x, (gate, up) = make(), weights()
    result, _ = run(gated_mlp, x, gate, up, verify=True)
    no_worse_than_eager(result, gated_mlp, x, gate, up)


def test_odd_strides_of_weights() -> None:
    x = torch.randn(1, K, dtype=torch.float16)
    gate, up = torch.randn(N, 2 * K, dtype=torch.float16)[:, ::2] / K**0.5, weights()[0].t().contiguous().t()
    result, _ = run(gated_mlp, x, gate, up)
    no_worse_than_eager(result, gated_mlp, x, gate, up)


@pytest.mark.parametrize("transposed", [False, True])
def test_square_weights_have_their_layout_in_their_strides(transposed: bool) -> None:
    x, (gate, up) = torch.randn(1, K, dtype=torch.float16), weights(n=K)
    if transposed:
        gate, up = gate.t().contiguous().t(), up.t().contiguous().t()
    result, _ = run(gated_mlp, x, gate, up)
    no_worse_than_eager(result, gated_mlp, x, gate, up)


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(K)
        self.gate, self.up = torch.nn.Linear(K, N, bias=False), torch.nn.Linear(K, N, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return F.silu(self.gate(y)) * self.up(y)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_model_that_trains(rows: int) -> None:
    model, x = Mlp(), torch.randn(rows, K)
    eager = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    exact = Mlp().double()
    exact.load_state_dict(model.state_dict())
    reference = torch.autograd.grad(exact(x.double()).square().sum(), list(exact.parameters()))
    before = len(fc.reports())
    result, _ = run(model, x)
    ours = torch.autograd.grad(result.square().sum(), list(model.parameters()))
    for a, b, r in zip(ours, eager, reference, strict=True):
        assert (a - r).abs().max() <= 1.5 * (b - r).abs().max() + 1e-6 * r.abs().max()
    forward, backward = fc.reports()[before:]
    assert "saved for backward" in sentences(forward)
    assert backward.graph.endswith("(backward)")


def test_graph_breaks() -> None:
    def broken(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        y = gated_mlp(x, gate, up)
        torch._dynamo.graph_break()
        return gated_mlp(F.pad(y, (0, K - N)), gate, up)

    x, (gate, up) = torch.randn(1, K, dtype=torch.float16), weights()
    before = len(fc.reports())
    result, _ = run(broken, x, gate, up)
    no_worse_than_eager(result, broken, x, gate, up)
    assert len(fc.reports()) == before + 2


def test_an_intermediate_that_is_needed_elsewhere() -> None:
    def leaks(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = F.linear(x, gate)
        return F.silu(h) * F.linear(x, up), h

    x, (gate, up) = torch.randn(1, K, dtype=torch.float16), weights()
    (result, h), report = run(leaks, x, gate, up)
    no_worse_than_eager(result, gated_mlp, x, gate, up)
    torch.testing.assert_close(h, F.linear(x, gate), rtol=0, atol=0)
    assert [d.verdict for d in report.decisions if d.pattern == "gated_mlp"] in ([], ["kept"])
    assert "h" in sentences(report)


def test_an_input_changed_in_place_between() -> None:
    def changes(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        first = F.silu(F.linear(x, gate))
        x.mul_(2)
        return first * F.linear(x, up)

    x, (gate, up) = torch.randn(1, K, dtype=torch.float16), weights()
    mine, theirs = x.clone(), x.clone()
    result, _ = run(changes, mine, gate, up)
    expected = changes(theirs, gate, up)
    torch.testing.assert_close(result, expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(mine, theirs)


def test_kernels_for_a_machine_that_the_graph_does_not_run_on() -> None:
    x, (gate, up) = torch.randn(1, K, dtype=torch.float16), weights()
    result, report = run(gated_mlp, x, gate, up, remainder="inductor", strict=False)
    no_worse_than_eager(result, gated_mlp, x, gate, up)
    assert not report.fused and "the decisions are for h200, but the graph runs on cpu" in report.failures[0].error


# ---- shapes and sizes that only look like others ------------------------------------------------
def always(**options: Any) -> dict[str, Any]:
    """Options for an H200 whose launches are so dear that whatever can be fused is."""
    return {"machine": dataclasses.replace(TABLE["h200"], launch_overhead=1e-3), **options}


def test_two_dynamic_sizes_whose_product_outgrows_the_kernel() -> None:
    """The verdict is solved in one size; the kernel holds so many rows, whatever sizes they come from."""
    gate, up = (w.float() for w in weights())
    compiled = torch.compile(
        lambda x: gated_mlp(x, gate, up),
        backend=fusion_compiler,
        dynamic=True,
        options=always(remainder="eager", strict=True),
    )
    for shape in ((2, 3), (4, 5), (8, 8), (40, 2)):
        x = torch.randn(*shape, K)
        torch.testing.assert_close(compiled(x), gated_mlp(x, gate, up), rtol=1e-4, atol=1e-4)


def test_one_output_feature() -> None:
    x, (gate, up) = torch.randn(2, K, dtype=torch.float16), weights(n=1)
    result, report = run(gated_mlp, x, gate, up, **always())
    no_worse_than_eager(result, gated_mlp, x, gate, up)
    assert report.fused


def test_weights_whose_rows_lie_differently_far_apart() -> None:
    x, (gate, up) = torch.randn(2, K, dtype=torch.float16), weights()
    result, report = run(gated_mlp, x, gate[:1].expand(N, K), up, **always())
    no_worse_than_eager(result, gated_mlp, x, gate[:1].expand(N, K), up)
    assert all(d.pattern != "gated_mlp" for d in report.fused)  # one linear with its activation may be
    assert f"lie 0 and {K} elements apart" in sentences(report)


def test_a_size_that_depends_on_data() -> None:
    x, (gate, up) = torch.randn(4, K, dtype=torch.float16), weights()
    torch._dynamo.decorators.mark_unbacked(x, 0)
    result, report = run(gated_mlp, x, gate, up, **always())
    torch.testing.assert_close(result, gated_mlp(x, gate, up), rtol=1e-2, atol=1e-2)
    assert not report.fused and "known only when the graph runs" in sentences(report)


def test_a_nested_tensor() -> None:
    parts, (gate, up) = [torch.randn(m, K, dtype=torch.float16) for m in (2, 3)], weights()
    result, _ = run(gated_mlp, torch.nested.nested_tensor(parts, layout=torch.jagged), gate, up, **always())
    no_worse_than_eager(result.values(), gated_mlp, torch.cat(parts), gate, up)


def test_linears_of_different_dtypes() -> None:
    def fn(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(F.linear(x, gate)) * F.linear(x.float(), up)

    x, (gate, up) = torch.randn(2, K, dtype=torch.float16), weights()
    result, report = run(fn, x, gate, up.float(), **always())
    wide = x.double()
    exact = F.silu(wide @ gate.double().T) * (wide @ up.double().T)
    assert (result - exact).norm() <= 1.5 * (fn(x, gate, up.float()) - exact).norm()
    assert all(d.pattern != "gated_mlp" for d in report.fused) and "cast the model as a whole" in sentences(report)


@pytest.mark.parametrize("which", [0, 1])
def test_strides_that_32_bits_do_not_hold(which: int) -> None:
    """Memory is reserved for 4 GB and touched in few places."""
    given = [torch.randn(3, K, dtype=torch.float16), weights(n=17)[0]]
    rows, step = (len(given[which]), 2**30 if which == 0 else 2**27)
    far = torch.empty((rows - 1) * step + K, dtype=torch.float16).as_strided((rows, K), (step, 1))
    given[which] = far.copy_(given[which])
    x, gate = given
    result, report = run(gated_mlp, x, gate, gate, **always())
    torch.testing.assert_close(result, gated_mlp(x, gate, gate), rtol=1e-2, atol=1e-2)
    assert not report.fused and "reaches over 2³¹ elements" in sentences(report)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_spreads_as_in_eager(poison: float) -> None:
    x, (gate, up) = torch.randn(3, K, dtype=torch.float16), weights()
    x[1, 5], up[3, 4] = poison, poison
    result, report = run(gated_mlp, x, gate, up, **always())
    expected = gated_mlp(x, gate, up)
    assert report.fused and torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.isinf(), expected.isinf())


def test_one_function_with_two_sets_of_options() -> None:
    x, (gate, up) = torch.randn(2, K, dtype=torch.float16), weights()
    verdicts = []
    for options in (always(), always(disable="all"), always()):
        result, report = run(gated_mlp, x, gate, up, **options)
        no_worse_than_eager(result, gated_mlp, x, gate, up)
        verdicts.append(len(report.fused))
    assert verdicts[:2] == [1, 0]


def test_features_whose_number_is_symbolic() -> None:
    def beside(x: torch.Tensor, norm: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        h = F.layer_norm(x, (K,), norm)
        return torch.cat([F.silu(F.linear(h, gate)), F.linear(h, up)], -1)

    x, norm, (gate, up) = torch.randn(65, K, dtype=torch.float16), torch.randn(K, dtype=torch.float16), weights()
    for weight in (gate, up):
        torch._dynamo.mark_dynamic(weight, 0)
    result, report = run(beside, x, norm, gate, up)
    torch.testing.assert_close(result, beside(x, norm, gate, up), rtol=1e-2, atol=1e-2)
    assert "mark only the rows of the input as dynamic" in sentences(report)
