"""What only a GPU can show of attention of many queries: keys through descriptors, packed sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import test_flash as flash
import test_flash_modifications as modified
import test_flash_statistics as statistics
import test_varlen as varlen
import torch
from test_gpu import agree, pytestmark

import fusion_compiler as fc
from fusion_compiler.lowering.triton_codegen.flash.plan import Plan

__all__ = ["pytestmark"]
HALVES = (torch.float16, torch.bfloat16)
PLANS = [Plan(64, 64, 4, 3, descriptors) for descriptors in (True, False)]
LENGTH = 200


@pytest.fixture
def _cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(modified, "LENGTH", LENGTH)
    before = torch.get_default_device()
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(before)


@pytest.fixture
def _tf32() -> Iterator[None]:
    """Without it float32 is not served."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.label)
@pytest.mark.parametrize("case", modified.CASES)
def test_modifications(case: str, plan: Plan, dtype: torch.dtype) -> None:
    function, more, _, listed = modified.CASES[case]
    args = (*flash.heads(2, 4, 4, LENGTH, LENGTH, 64, dtype=dtype), *more())
    flash.check(function, *args, plan=dataclasses.replace(plan, listed=listed))


@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.label)
@pytest.mark.parametrize("mask", flash.MASKS)
def test_masks(mask: str, plan: Plan, dtype: torch.dtype) -> None:
    for width, v_width in ((64, 64), (128, 128), (80, 80), (192, 128)):
        args = flash.heads(2, 4, 2, LENGTH, LENGTH, width, v_width, dtype=dtype)
        whole = plan if width in (64, 128) else dataclasses.replace(plan, descriptors=False, num_stages=2)
        flash.check(flash.attention(flash.MASKS[mask][0]), *args, plan=whole)


@pytest.mark.usefixtures("_cuda")
def test_rows_that_see_nothing() -> None:
    seen = modified.unknown(2, 1)
    for dtype in HALVES:
        args = flash.heads(2, 4, 4, LENGTH, LENGTH, 64, dtype=dtype)
        flash.check(flash.attention(lambda q, k: k <= q - 20), *args, plan=PLANS[0])
        for least in (torch.finfo(torch.float32).min, -torch.inf):
            added = torch.zeros(seen.shape).masked_fill(~seen, least)
            flash.check(modified.biased, *args, added, plan=PLANS[0])


@pytest.mark.usefixtures("_cuda", "_tf32")
def test_the_logarithm_of_sums() -> None:
    for function in (statistics.beside, statistics.subtracted, statistics.nothing_seen, statistics.heads_inside):
        statistics.test_numbers(function)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("said", varlen.SAID)
def test_packed_sequences(said: str, dtype: torch.dtype) -> None:
    lengths = [300, 1, 64, 1, 129], [300, 700, 64, 65, 500]
    compiled: Any = torch.compile(fc.varlen_attention, backend="inductor", dynamic=False)
    for heads, kv_heads, dim, v_dim in ((4, 2, 64, 64), (8, 8, 128, 128), (7, 1, 80, 64)):
        args = varlen.packed(*lengths, heads, kv_heads, dim, v_dim, dtype)
        exact, eager = varlen.one_by_one(*args, **varlen.SAID[said]), fc.varlen_attention(*args, **varlen.SAID[said])
        for function in (fc.varlen_attention, compiled):
            agree(function(*(a.cuda() for a in args), **varlen.SAID[said]).cpu(), eager, exact, said)
