"""Attention of packed sequences: the function, its generated kernel in Triton's interpreter, and the eager spelling."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusion_compiler as fc
from fusion_compiler.attention.direct import reference
from fusion_compiler.lowering.triton_codegen.flash import varlen
from fusion_compiler.lowering.triton_codegen.flash.plan import Plan
from fusion_compiler.machine import TABLE

SMALL = Plan(32, 16, 4, 2)


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def packed(
    q_lens: list[int], k_lens: list[int], heads: int, kv_heads: int, dim: int, v_dim: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    q = torch.randn(sum(q_lens), heads, dim, dtype=dtype)
    k = torch.randn(sum(k_lens), kv_heads, dim, dtype=dtype)
    v = torch.randn(sum(k_lens), kv_heads, v_dim, dtype=dtype)
    return q, k, v, cumulative(q_lens), cumulative(k_lens)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, **said: Any) -> Tensor:
    """Each sequence alone, in float64."""
    outs = []
    group = q.shape[1] // k.shape[1]
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        qs, ks, vs = (t.double().transpose(0, 1) for t in (q[a:b], k[c:d], v[c:d]))
        s = qs @ ks.repeat_interleave(group, 0).mT * said.get("scale", q.shape[2] ** -0.5)
        if said.get("softcap"):
            s = said["softcap"] * torch.tanh(s / said["softcap"])
        own = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        seen, keys = torch.ones(b - a, d - c, dtype=torch.bool), torch.arange(d - c)
        if said.get("causal"):
            seen &= keys <= own
        if said.get("window"):
            seen &= keys > own - said["window"]
        p = s.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
        outs.append((p @ vs.repeat_interleave(group, 0)).transpose(0, 1))
    return torch.cat(outs)


def on_gpu(monkeypatch: pytest.MonkeyPatch, plan: Plan = SMALL) -> Callable[..., Tensor]:
    """The function with the kernel that a GPU would run."""
    monkeypatch.setattr(varlen, "planned", lambda packed, machine: plan)
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)  # the interpreter runs what is not traced

    def call(
        *tensors: Tensor, causal: bool = False, window: Any = None, softcap: Any = None, scale: Any = None
    ) -> Tensor:
        done = varlen.varlen_attention(*tensors, causal, window, softcap, scale or tensors[0].shape[2] ** -0.5)
        assert isinstance(done, Tensor), done
        return done

    return call


SAID: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 9},
    "capped": {"causal": True, "softcap": 2.0, "scale": 1.0},
}
MIXED = [33, 1, 0, 20, 1], [33, 70, 5, 48, 1]  # a prompt, a step of decoding, nothing, more of a prompt, a first token
SHAPES = {"prompts": ([40, 7, 65], [40, 7, 65]), "mixed": MIXED, "more queries than keys": ([20, 9], [7, 0])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("lengths", SHAPES)
@pytest.mark.parametrize("said", SAID)
def test_numbers(said: str, lengths: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    args = packed(*SHAPES[lengths], 4, 2, 16, 16, dtype)
    wanted = one_by_one(*args, **SAID[said])
    eager = fc.varlen_attention(*args, **SAID[said])
    ours = on_gpu(monkeypatch)(*args, **SAID[said])
    assert ours.shape == eager.shape == wanted.shape and ours.dtype == eager.dtype == dtype
    error, own = ((t.double() - wanted).norm() for t in (ours, eager))
    assert own <= 1e-2 * wanted.norm()
    assert error <= 1.5 * own + 2e-7 * wanted.norm(), (float(error), float(own))


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "v_dim"), [(3, 3, 24, 40), (6, 2, 80, 80), (7, 1, 16, 16)])
def test_groups_and_widths(heads: int, kv_heads: int, dim: int, v_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    args = packed(*MIXED, heads, kv_heads, dim, v_dim, torch.float32)
    torch.testing.assert_close(on_gpu(monkeypatch)(*args, causal=True), one_by_one(*args, causal=True).float())


def test_many_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a program looks at together."""
    lengths = torch.randint(0, 4, (140,)).tolist()
    args = packed(lengths, lengths, 2, 2, 16, 16, torch.float32)
    torch.testing.assert_close(on_gpu(monkeypatch)(*args, causal=True), one_by_one(*args, causal=True).float())


def test_what_lies_in_larger_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v as views of one projection."""
    qkv = torch.randn(50, 3, 4, 16)
    lengths = cumulative([30, 20])
    args = (*qkv.unbind(1), lengths, lengths)
    torch.testing.assert_close(on_gpu(monkeypatch)(*args, causal=True), one_by_one(*args, causal=True).float())


def test_sequences_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even what is no number."""
    args = packed([20, 21], [20, 21], 2, 2, 16, 16, torch.float32)
    args[2][20:] = torch.nan
    ours = on_gpu(monkeypatch)(*args)
    assert ours[:20].isfinite().all() and ours[20:].isnan().all()


def test_compiled_without_a_gpu() -> None:
    args = packed(*SHAPES["prompts"], 4, 2, 16, 16, torch.float32)
    compiled = torch.compile(lambda *a: fc.varlen_attention(*a, causal=True) * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), 2 * one_by_one(*args, causal=True).float())


def test_the_eager_spelling_needs_no_function() -> None:
    """A model that masks by cumulative lengths gets a generated kernel too."""

    def spelled(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return reference(q, k, v, lengths, lengths, True, None, None, 0.1)

    tensors = [torch.empty(2048, 8, 64, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    report = fc.explain(spelled, *tensors, cumulative([700, 1348]), machine="h200")
    [decision] = [d for d in report.decisions if d.pattern == "attention"]
    assert decision.verdict == "fused" and "triton flash" in decision.kernel


BAD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "rank": (lambda a: {"q": a["q"][None]}, r"\[total, heads, dim\]"),
    "heads": (lambda a: {"q": a["q"][:, :3]}, "a multiple of these heads"),
    "width": (lambda a: {"k": a["k"][..., :8]}, "the width of q"),
    "dtype": (lambda a: {"k": a["k"].half()}, "one floating-point dtype"),
    "lengths": (lambda a: {"cu_seqlens_q": a["cu_seqlens_q"].float()}, "must be int32 or int64"),
    "number of lengths": (lambda a: {"cu_seqlens_q": a["cu_seqlens_q"][1:]}, "tell of 2 and 3 sequences"),
    "window": (lambda a: {"window": 4}, "needs causal=True"),
    "softcap": (lambda a: {"softcap": 0.0}, "above 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_said(case: str) -> None:
    change, message = BAD[case]
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    given = dict(zip(names, packed(*SHAPES["prompts"], 4, 2, 16, 16, torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        fc.varlen_attention(**(given | change(given)))


def test_why_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "machine", lambda: TABLE["h200"])
    args = packed(*SHAPES["prompts"], 2, 2, 16, 16, torch.float64)
    assert "not torch.float64" in varlen.varlen_attention(*args, True, None, None, 0.1)
