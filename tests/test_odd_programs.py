"""Programs that were drawn at random and once came out wrong, or stopped the compiler: each small, with its cause."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusion_compiler as fc
from fusion_compiler import backend, offers
from fusion_compiler.backend import fusion_compiler
from fusion_compiler.legality import COMPARED, mark_compared
from fusion_compiler.machine import TABLE
from fusion_compiler.report import Report


@pytest.fixture(autouse=True)
def _whatever_can_be_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that can be made pays."""
    offer = offers.offer

    def cheap(*args: Any) -> offers.Offer:
        found = offer(*args)
        free = (dataclasses.replace(c, seconds=1e-9, error=0.0, once=0.0) for c in found.candidates)
        return dataclasses.replace(found, candidates=tuple(free))

    monkeypatch.setattr(offers, "offer", cheap)
    monkeypatch.setattr(backend, "severed_seconds", lambda *a, **k: 0.0)


def run(fn: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Report]:
    machine = dataclasses.replace(TABLE["h200"], launch_overhead=1e-3)
    given = {"machine": machine, "remainder": "eager", "strict": True, **options}
    result = torch.compile(fn, backend=fusion_compiler, options=given)(*args)
    report = fc.last_report()
    assert report is not None
    return result, report


def check(fn: Callable[..., Any], *args: Tensor, **options: Any) -> Report:
    """Compares with eager and float64; a factor more than elsewhere, as these tensors are tiny."""
    eager, exact = fn(*args), fn(*(a.double() for a in args))
    result, report = run(fn, *args, **options)
    eps = torch.finfo(eager.dtype).eps
    assert result.shape == eager.shape and result.dtype == eager.dtype
    assert (result - exact).abs().max() <= 1.5 * (eager - exact).abs().max() + 8 * eps * exact.abs().max()
    return report


def test_a_product_with_nothing_is_no_activation_of_it() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(x, w) * 0.0
        return F.silu(y) * y + y

    check(fn, torch.randn(3, 16), torch.randn(8, 16))


@pytest.mark.parametrize("spell", [lambda y: torch.ones_like(y) * y, lambda y: y + torch.zeros_like(y)])
def test_inductor_writes_other_strides_over_those_of_a_part(spell: Callable[[Tensor], Tensor]) -> None:
    """It takes 1 · x for x and gives x what it knew of the product, which lies in one piece."""

    def fn(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        return F.rms_norm(spell((x @ w)[..., 1::2]), (12,), g)

    check(fn, torch.randn(1, 1, 48), torch.randn(48, 24), torch.randn(12))


def test_inductor_writes_other_strides_over_those_of_an_argument() -> None:
    def fn(x: Tensor, g: Tensor) -> Tensor:
        return F.layer_norm(torch.ones_like(x) * x, (12,), g)

    check(fn, torch.randn(3, 24)[:, ::2], torch.randn(12))


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="Inductor's joint passes take these casts out by themselves, and its own result is 0 there",
)
@pytest.mark.parametrize(
    "rest",
    [
        lambda y: F.relu(y - y.half().float()) * 1024,
        lambda y: (y > y.half().float()).float() + y,
        lambda y: torch.layer_norm(2 * y - (2 * y).half().float(), (16,), eps=1e-12),
    ],
)
def test_what_rounding_took_away_is_not_nothing(rest: Callable[[Tensor], Tensor]) -> None:
    """Values leave out casts; what differs from another value in these alone is none of them."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(rest(x), w)

    x, w = torch.randn(3, 16), torch.randn(8, 16)
    result, _ = run(fn, x, w)
    torch.testing.assert_close(result, fn(x, w), rtol=1e-4, atol=1e-4)


def test_a_result_that_is_split() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(3.7 - x, w)[..., 1::2]
        a, b = y.chunk(2, -1)
        return F.linear(a * b, v).sigmoid(), F.linear(y, u)

    args = (torch.randn(1, 1, 17), torch.randn(64, 17) / 4, torch.randn(24, 16) / 4, torch.randn(17, 32) / 4)
    for got, want in zip(run(fn, *args)[0], fn(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_result_that_is_returned_as_part_of_a_larger_one() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return torch.matmul(x + x.square(), w.t()).chunk(2, -1)[1]

    report = check(fn, torch.randn(1, 1, 24), torch.randn(16, 24))
    assert not report.failures


def test_values_that_are_one_column_repeated() -> None:
    """softmax(x·Aᵀ)·V where all columns of V are one: their stride is 0."""

    def fn(x: Tensor, keys: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(F.linear(x, keys), -1) @ value.expand(64, -1).T

    check(fn, torch.randn(2, 64), torch.randn(16, 64) / 8, torch.randn(1, 16))


def test_functions_of_tiny_numbers_keep_their_digits() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(x, w) * 1e-5
        return torch.tanh(y) + torch.tanh(y * 1e5) * 1e-9

    check(fn, torch.randn(2, 16), torch.randn(8, 16))


def test_the_logarithm_of_infinity() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return torch.log1p(F.linear(x, w).abs())

    x = torch.randn(2, 16)
    x[0, 0] = float("inf")
    result, _ = run(fn, x, torch.ones(8, 16))
    assert result[0].isinf().all() and result[1].isfinite().all()


def test_a_maximum_whose_gradient_goes_where_it_is_met() -> None:
    """The backward pass computes the norm anew, and has to find the number that the forward pass found greatest."""

    def fn(x: Tensor, g: Tensor, w: Tensor) -> Tensor:
        y = F.layer_norm(x, (32,), g)
        scale = y.abs().amax(-1, keepdim=True) / 127
        return F.linear(F.layer_norm(y / scale + y, (32,)), w)

    args = [t.requires_grad_() for t in (torch.randn(4, 32), torch.randn(32), torch.randn(8, 32))]
    before = len(fc.reports())
    got = torch.autograd.grad(run(fn, *args)[0].square().sum(), args)
    want = torch.autograd.grad(fn(*args).square().sum(), args)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    told = [d for d in fc.reports()[before].decisions if "equals its maximum" in d.reason]
    assert told and all(d.verdict == "kept" for d in told)


def test_pairs_turned_back_as_complex_numbers_in_the_backward_pass() -> None:
    """The gradient is multiplied with the conjugated angles, which are no view of real numbers."""

    def fn(x: Tensor, angles: Tensor) -> Tensor:
        turns = torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(torch.view_as_complex(x.reshape(2, 6, 4, 2)) * turns).flatten(-2)

    x, angles = torch.randn(2, 6, 8, requires_grad=True), torch.randn(6, 4)
    got = torch.autograd.grad(run(fn, x, angles)[0].square().sum() / 2, x)[0]
    torch.testing.assert_close(got, x.detach())


@pytest.mark.parametrize("dtype, marked", [(torch.float32, 2), (torch.int64, 0)])
def test_segments_that_are_equal_are_a_mask_and_no_maximum(trace: Any, dtype: torch.dtype, marked: int) -> None:
    gm = trace(lambda a: torch.eq(a + 1, a * 2), torch.ones(3, dtype=dtype))
    mark_compared(gm.graph)
    assert sum(COMPARED in node.meta for node in gm.graph.nodes) == marked
