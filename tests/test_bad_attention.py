"""Attention that a careless kernel would compute wrongly: the result is eager's, whatever the report says."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusion_compiler as fc
from fusion_compiler.backend import fusion_compiler
from fusion_compiler.machine import machine
from fusion_compiler.report import Report

HEADS, LENGTH, WIDTH = 4, 24, 16
Attention = Callable[..., torch.Tensor]


def run(fn: Attention, *args: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Report]:
    """The compiled result and its report, on a CPU where a kernel's launch is so dear that whatever can be fused is."""
    here = dataclasses.replace(machine("cpu"), launch_overhead=0.1)
    given = {"machine": here, "remainder": "eager", "strict": True, **options}
    result = torch.compile(fn, backend=fusion_compiler, options=given)(*args)
    report = fc.last_report()
    assert report is not None
    return result, report


def no_worse_than_eager(fn: Attention, *args: torch.Tensor, **options: Any) -> Report:
    result, report = run(fn, *args, **options)
    eager, exact = fn(*args), fn(*(a.double() if a.is_floating_point() else a for a in args))
    assert torch.equal(result.isnan(), eager.isnan())
    ours, theirs = ((t - exact).nan_to_num().square().mean().sqrt() for t in (result, eager))
    assert ours <= 1.5 * theirs + 1e-7 * exact.nan_to_num().abs().max()
    return report


def operands(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(2, HEADS, *shape) for shape in shapes]


def softmax_over(dim: int) -> Attention:
    return lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) * 0.25, dim=dim) @ v


# ---- kernels take the last dimension to be dense ------------------------------------------------
def test_keys_stored_transposed() -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k * 0.25, dim=-1) @ v

    report = no_worse_than_eager(fn, *operands((LENGTH, WIDTH), (WIDTH, 40), (40, WIDTH)))
    assert report.fused


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_operand_that_is_a_transposed_view(which: int) -> None:
    def fn(*given: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(-1, -2) if i == which else t for i, t in enumerate(given))
        hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        return torch.softmax((q @ k.transpose(-1, -2) * 0.25).masked_fill(hidden, float("-inf")), dim=-1) @ v

    shapes = [(WIDTH, LENGTH) if i == which else (LENGTH, WIDTH) for i in range(3)]
    no_worse_than_eager(fn, *operands(*shapes))


def test_squares_where_every_axis_could_be_another() -> None:
    n = 24
    given = [torch.randn(2, n, n, n) for _ in range(3)]
    spellings: list[Attention] = [
        lambda q, k, v: torch.softmax(q @ k * 0.2, -1) @ v,
        lambda q, k, v: torch.softmax(q.transpose(-1, -2) @ k * 0.2, -1) @ v,
        lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) * 0.2, -1) @ v.transpose(-1, -2),
        lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) * 0.2, -1).transpose(-1, -2) @ v,
        lambda q, k, v: v @ torch.softmax(q @ k.transpose(-1, -2) * 0.2, -1),
        lambda q, k, v: torch.softmax(q @ k.transpose(1, 2) * 0.2, -1) @ v,
        lambda q, k, v: torch.softmax((q @ k.transpose(-1, -2) * 0.2).transpose(1, 2), -1) @ v,
    ]
    for fn in spellings:
        torch._dynamo.reset()
        no_worse_than_eager(fn, *given)


# ---- which axis the softmax runs over -----------------------------------------------------------
@pytest.mark.parametrize("dim", [0, 1, -2, 2])
def test_a_softmax_over_another_axis(dim: int) -> None:
    report = no_worse_than_eager(softmax_over(dim), *operands(*[(LENGTH, WIDTH)] * 3))
    assert not report.fused


def heads_permuted_otherwise(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.softmax(q @ k.transpose(1, 3) * 0.25, dim=-1) @ v


def mask_of_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    n = q.shape[1]
    kept = (torch.arange(2 * n, device=q.device) % 3).view(2, n)
    q, k, v = (t.permute(0, 2, 1, 3) for t in (q, k, v))
    scores = q @ k.transpose(-2, -1) / 3.0
    return torch.softmax(scores.masked_fill((kept == 0).view(2, 1, n, 1).expand_as(scores), -1e9), dim=-1) @ v


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
@pytest.mark.parametrize(
    "fn", [softmax_over(-2), heads_permuted_otherwise, mask_of_queries], ids=["axis", "heads", "mask"]
)
def test_what_inductor_would_take_for_another_attention(fn: Attention, remainder: str) -> None:
    """Inductor's patterns of attention leave axes out, and compiled alone it gets these wrong (torch 2.11 and 2.13)."""
    n = 24
    no_worse_than_eager(fn, *(torch.randn(2, n, n, n) for _ in range(3)), remainder=remainder)


def test_inductor_still_rewrites_what_is_attention() -> None:
    counters = torch._dynamo.utils.counters
    counters.clear()
    no_worse_than_eager(softmax_over(-1), *operands(*[(LENGTH, WIDTH)] * 3), disable="all", remainder="inductor")
    assert counters["inductor"]["fuse_attention"] == 1


def test_a_negative_scale_in_front_of_a_causal_mask() -> None:
    """Kernels put −∞ in and take maxima before they scale."""

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        return torch.softmax((q @ k.transpose(-1, -2) * -0.25).masked_fill(hidden, float("-inf")), dim=-1) @ v

    report = no_worse_than_eager(fn, *operands(*[(LENGTH, WIDTH)] * 3))
    assert not report.fused and "multiply the queries by it instead" in report.decisions[0].reason


# ---- masks --------------------------------------------------------------------------------------
@pytest.mark.parametrize("fill", [float("-inf"), -1e9, -1e4])
@pytest.mark.parametrize(("queries", "keys", "diagonal"), [(24, 24, -1), (40, 24, 0), (24, 40, 5)])
def test_causal_masks_that_hide_whole_rows_or_reach_further(
    fill: float, queries: int, keys: int, diagonal: int
) -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(diagonal)
        return torch.softmax((q @ k.transpose(-1, -2) * 0.25).masked_fill(~seen, fill), dim=-1) @ v

    no_worse_than_eager(fn, *operands((queries, WIDTH), (keys, WIDTH), (keys, WIDTH)))


@pytest.mark.parametrize("shape", [(24, 24), (2, 1, 1, 24), (2, 4, 24, 1), (1,)])
@pytest.mark.parametrize("fill", [float("-inf"), 0.0])
def test_masks_read_from_tensors(shape: tuple[int, ...], fill: float) -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return torch.softmax((q @ k.transpose(-1, -2) * 0.25).masked_fill(hidden, fill), dim=-1) @ v

    hidden = torch.rand(shape) > 0.5
    if len(shape) > 1:
        hidden[..., -1:, :] = True  # a row that sees nothing
    no_worse_than_eager(fn, *operands(*[(24, WIDTH)] * 3), hidden)


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_added_like_any_other(number: float) -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) * 0.3 + number, dim=-1) @ v

    report = no_worse_than_eager(fn, *operands(*[(LENGTH, WIDTH)] * 3))
    assert not report.fused and "is added to every score" in str(report.near_misses)


def test_a_mask_of_truth_values_that_is_added() -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) * 0.3 + mask, dim=-1) @ v

    no_worse_than_eager(fn, *operands(*[(LENGTH, WIDTH)] * 3), torch.rand(LENGTH, LENGTH) > 0.5)


# ---- what the graph already calls fused ---------------------------------------------------------
def test_a_fused_attention_without_dropout_draws_nothing() -> None:
    def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    q, k, v = operands(*[(LENGTH, WIDTH)] * 3)
    report = no_worse_than_eager(grouped, q, k[:, :2].contiguous(), v[:, :2].contiguous())
    assert "random" not in str(report)


def test_dropout_stays_random() -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(torch.softmax(q @ k.transpose(-1, -2), dim=-1), 0.5) @ v

    given = operands(*[(LENGTH, WIDTH)] * 3)
    (first, report), (second, _) = run(fn, *given), run(fn, *given)
    assert not torch.equal(first, second) and not report.fused
    assert "model.eval()" in str(report.near_misses)


def test_random_numbers_are_those_of_eager_where_inductor_is_told_so() -> None:
    """The setting decides how dropout is taken apart."""

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    given = operands(*[(LENGTH, WIDTH)] * 3)
    torch.manual_seed(1)
    expected = fn(*given)
    torch.manual_seed(1)
    result, _ = run(fn, *given, inductor={"fallback_random": True})
    torch.testing.assert_close(result, expected)


# ---- state and threads --------------------------------------------------------------------------
def test_a_cache_written_between_the_products() -> None:
    def fn(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        keys[:, :, 3:4] = new
        scores = q @ keys.transpose(-1, -2) * 0.25
        keys[:, :, 5:6] = new
        values[:, :, 3:4] = new
        return torch.softmax(scores, dim=-1) @ values

    q, keys, values, new = operands((LENGTH, WIDTH), (LENGTH, WIDTH), (LENGTH, WIDTH), (1, WIDTH))
    mine, theirs = (keys.clone(), values.clone()), (keys.clone(), values.clone())
    result, _ = run(fn, q, *mine, new)
    torch.testing.assert_close(result, fn(q, *theirs, new), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_threads_that_compile_at_once() -> None:
    wrong: list[str] = []

    def work(length: int) -> None:
        given = operands(*[(length, WIDTH)] * 3)
        try:
            result, _ = run(lambda q, k, v: softmax_over(-1)(q, k, v) + length, *given)
            torch.testing.assert_close(result, softmax_over(-1)(*given) + length, rtol=1e-5, atol=1e-5)
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(16 + 8 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(fc.reports()) == 4


# ---- graphs that once broke a stage of the compiler ----------------------------------------------
def rotated_in_part(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A part of each head turns; with dynamic=True its width is a symbol."""

    def turned(x: torch.Tensor) -> torch.Tensor:
        n = x.shape[-1] // 4 * 2
        angles = torch.arange(x.shape[2])[:, None] * 0.1 ** torch.arange(n // 2)
        cos, sin = (torch.cat([t, t], -1).to(x.dtype) for t in (angles.cos(), angles.sin()))
        a, b = x[..., :n].chunk(2, -1)
        return torch.cat([x[..., :n] * cos + torch.cat([-b, a], -1) * sin, x[..., n:]], -1)

    return torch.softmax(turned(q) @ turned(k).transpose(-1, -2) * 0.25, -1) @ v


def mask_repeated_by_batch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1).repeat(q.shape[0], 1, 1)
    return torch.softmax((q @ k.transpose(-1, -2) * 0.25).masked_fill(hidden[:, None], float("-inf")), -1) @ v


def no_worse_than_eager_with_symbols(fn: Attention, *given: torch.Tensor) -> Report:
    options = {"machine": "h200", "remainder": "eager", "strict": True}
    result = torch.compile(fn, backend=fusion_compiler, options=options, dynamic=True)(*given)
    torch.testing.assert_close(result, fn(*given), rtol=1e-5, atol=1e-6)
    report = fc.last_report()
    assert report is not None
    return report


@pytest.mark.parametrize("fn", [rotated_in_part, mask_repeated_by_batch])
def test_every_size_symbolic(fn: Attention) -> None:
    no_worse_than_eager_with_symbols(fn, *operands(*[(LENGTH, WIDTH)] * 3))


def test_queries_that_are_read_in_another_order_of_heads() -> None:
    """Heads repeated as a whole: the queries of one key head are no run of heads, and no strides read them as one."""

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (torch.cat([t, t, t], 1) for t in (k, v))
        return torch.softmax(torch.tanh(q @ k.transpose(-1, -2) * 0.3), -1) @ v

    heads = torch.randn(2, 6, 16, WIDTH), torch.randn(2, 2, 7, WIDTH), torch.randn(2, 2, 7, WIDTH)
    starved = dataclasses.replace(machine("h100"), memory_bandwidth=1e6, l2_bandwidth=1e6)
    report = no_worse_than_eager(fn, *heads, machine=starved)
    assert any("decode" in d.kernel for d in report.fused), report


# ---- never silent --------------------------------------------------------------------------------
def test_one_head_whose_products_are_linears_is_told_of() -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.T, -1) @ v

    report = no_worse_than_eager_with_symbols(fn, *(torch.randn(LENGTH, WIDTH) for _ in range(3)))
    assert any(n.pattern == "attention" and "mark_static" in n.reason for n in report.near_misses), report


def test_probabilities_changed_far_in_front_of_the_product() -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(q @ k.transpose(-1, -2), -1).double().clamp(min=1e-3).float()
        return (v.transpose(-1, -2) @ p.transpose(-1, -2)).transpose(-1, -2)

    _, report = run(fn, *operands(*[(LENGTH, WIDTH)] * 3))
    assert any(n.pattern == "attention" and "clamp" in n.reason for n in report.near_misses), report
