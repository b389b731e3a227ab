"""What only a GPU can show of linears: bfloat16 on the matrix unit, blocks that wait for each other, float8."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_gpu import agree, check, pytestmark, randn, through, wide
from torch import Tensor

import fusion_compiler as fc
from fusion_compiler.lowering.triton_codegen import predict

__all__ = ["pytestmark"]
BRAIN = torch.bfloat16


def layer(x: Tensor, g: Tensor, b: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, x.shape[-1:], g, b), w)


def down(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    return F.linear(x, w) + r


@pytest.mark.parametrize("rows", [2, 13, 16])
def test_a_mean_that_is_taken_off_afterwards(rows: int) -> None:
    """From none to one that only leaves the redone pass any digits; in every row, or in one."""
    k, n = 1024, 4096
    norm_and_weight = randn(k), randn(k), randn(n, k, scale=k**-0.5)
    for mean in (0.0, 0.5, 1.4, 3.0, 50.0):
        x = torch.randn(rows, k, device="cuda")
        for shifted in (x + mean, torch.cat([x[1:], x[:1] + mean])):
            torch._dynamo.reset()
            check(layer, (shifted.to(BRAIN), *norm_and_weight))
            [decision] = [d for d in fc.last_report().fused if d.pattern == "norm_linear"]
            assert decision.kernel.endswith("g") or rows == 2, "the products of x with itself give the deviation"


def test_outliers_and_rows_of_one_number() -> None:
    k, n = 1024, 4096
    x = torch.randn(16, k, device="cuda")
    x[3, 17], x[5], x[6, :64], x[7] = 500.0, 0.0, 100.0, 1e4 * torch.randn(k, device="cuda")
    check(layer, (x.to(BRAIN), randn(k), randn(k), randn(n, k, scale=k**-0.5)))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_blocks_that_share_k_leave_their_zeros_behind(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several in one graph, called again and again, and on two streams at a time."""
    known = predict.plans  # other machines prefer others
    monkeypatch.setattr(predict, "plans", lambda *given: (p for p in known(*given) if p.kind == "split"))
    k, n = 8192, 2048

    def layers(x: Tensor, r: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        # linears of one input would share a kernel
        return tuple(down(x * 0.5**i, w, r) for i, w in enumerate(weights))

    weights = [randn(n, k, scale=k**-0.5) for _ in range(3)]
    run = through(layers, mode=mode)
    inputs = [(randn(32, k), randn(32, n), *weights) for _ in range(4)]
    for given in inputs * 3:
        torch.compiler.cudagraph_mark_step_begin()
        check(layers, given, run)
    assert {d.kernel.split()[1][:5] for d in fc.last_report().fused} == {"split"}
    if mode == "default":
        streams = [torch.cuda.Stream() for _ in inputs]
        torch.cuda.synchronize()
        results: list[list[tuple[Tensor, ...]]] = [[] for _ in inputs]
        with torch.no_grad():
            for _ in range(20):
                for stream, given, out in zip(streams, inputs, results, strict=True):
                    with torch.cuda.stream(stream):
                        out.append(run(*given))
        torch.cuda.synchronize()
        for given, out in zip(inputs, results, strict=True):
            assert all(map(torch.equal, sum(out, ()), out[0] * len(out))), "the order of sums is always the same"
            with torch.no_grad():
                agree(out[0], layers(*given), layers(*wide(given)))


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_activations_in_front(rows: int) -> None:
    for fn in (
        lambda h, u, w: F.linear(F.gelu(h), w),
        lambda h, u, w: F.linear(F.silu(h) * u, w),
        lambda h, u, w: F.linear((h + u).relu().square(), w),
    ):
        torch._dynamo.reset()
        check(fn, (randn(rows, 1024), randn(rows, 1024), randn(256, 1024, scale=1024**-0.5)))
        assert "activation_linear" in [d.pattern for d in fc.last_report().fused]


@pytest.mark.parametrize("rows", [1, 16, 100])
def test_gate_and_up_that_alternate(rows: int) -> None:
    def mlp(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = F.linear(x, w, b)
        return F.silu(h[..., ::2]) * h[..., 1::2]

    check(mlp, (randn(rows, 512), randn(400, 512, scale=512**-0.5), randn(400)))
    assert "gated_mlp" in [d.pattern for d in fc.last_report().fused]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_weights_in_float8(dtype: torch.dtype) -> None:
    def linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, (codes.to(scale.dtype) * scale[:, None]).to(x.dtype))

    codes, scale = torch.randn(200, 512, device="cuda").to(dtype), torch.rand(200, device="cuda")
    for rows in (1, 7, 16, 64):
        torch._dynamo.reset()
        x = randn(rows, 512)
        with torch.no_grad():
            got, exact = through(linear)(x, codes, scale), x.double() @ (codes.double() * scale.double()[:, None]).T
            agree(got, linear(x, codes, scale), exact)
        assert "quantised_linear" in [d.pattern for d in fc.last_report().fused]
