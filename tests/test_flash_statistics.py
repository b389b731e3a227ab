"""The logarithm of the sum of exponentials as a second result of an attention."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import torch
from test_flash import SMALL, causal, heads, only, traced
from torch import Tensor

import fusion_compiler as fc
from fusion_compiler.attention.recognise import find_attention
from fusion_compiler.fused import Attention
from fusion_compiler.layout import fit
from fusion_compiler.lowering.triton_codegen import flash
from fusion_compiler.lowering.triton_codegen.flash.emit import emit
from fusion_compiler.machine import machine
from fusion_compiler.splice import Builder, clean, emitted, replace

Pair = tuple[Tensor, Tensor]


def scores(q: Tensor, k: Tensor, visible: Callable[[Tensor, Tensor], Tensor] = causal) -> Tensor:
    s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * 0.25
    rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    return s.masked_fill(~visible(rows, keys), -math.inf)


def beside(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    s = scores(q, k)
    return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)


def subtracted(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    s = scores(q, k)
    total = torch.logsumexp(s, -1, keepdim=True)
    return torch.exp(s - total) @ v, total


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    s = scores(q, k)
    top = s.amax(-1, keepdim=True)
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    return (p / total) @ v, (top + total.log()).squeeze(-1)


def nothing_seen(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    s = scores(q, k, lambda rows, keys: keys <= rows - 5)
    return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)


def heads_inside(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    """Scores [batch, queries, heads, keys], and the numbers for each row in two orders."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    s = torch.einsum("bqhd,bkhd->bqhk", q, k) * 0.25
    return torch.einsum("bqhk,bkhd->bqhd", torch.softmax(s, -1), v), torch.logsumexp(s, -1).transpose(1, 2) * 2


def sinks_that_scale(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    s = scores(q, k)
    total = torch.logsumexp(s, -1, keepdim=True)
    out = torch.softmax(s, -1) @ v
    return out * torch.sigmoid(total - 0.3), total


@pytest.mark.parametrize("function", [beside, subtracted, by_hand, nothing_seen, heads_inside, sinks_that_scale])
def test_numbers(function: Callable[..., Pair]) -> None:
    args = heads(2, 4, 4, 40, 40, 16)
    gm = traced(function, *args)
    match = only(gm)
    op = match.op
    assert isinstance(op, Attention) and sorted(op.results) == ["logarithm", "out"]
    [candidate, *_] = flash.candidates(op, machine("h200"))
    candidate = dataclasses.replace(candidate, emit=functools.partial(emit, op, SMALL))
    builder = Builder(gm, match.site.place, match.site.output)
    for site, node in list(emitted(candidate, builder, match.site)):
        replace(site, fit(builder, site, node))
    clean(gm)
    left = " ".join(str(n.target) for n in gm.graph.nodes)
    assert not any(word in left for word in ("amax", "exp.default", "bmm"))
    exact = function(*(a.double() for a in args))
    for ours, eager, wanted in zip(gm(*args), function(*args), exact, strict=True):
        assert ours.shape == eager.shape and torch.equal(ours.isnan(), eager.isnan())
        assert torch.equal(ours.isinf(), eager.isinf())
        error, own = ((t.double() - wanted).nan_to_num(posinf=0, neginf=0).norm() for t in (ours, eager))
        assert error <= 1.5 * own + 2e-7 * wanted.nan_to_num(posinf=0, neginf=0).norm()


def test_only_the_generated_kernel_gives_it() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Pair:
        s = q @ k.mT * 0.1
        return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)

    inputs = [torch.empty(1, 8, 2048, 64, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    [decision] = [d for d in fc.explain(function, *inputs, machine="h200").decisions if d.pattern == "attention"]
    assert decision.verdict == "fused" and "triton flash" in decision.kernel


def test_a_logarithm_that_only_the_softmax_reads_is_none() -> None:
    op = only(traced(lambda q, k, v: subtracted(q, k, v)[0], *heads(1, 2, 2, 40, 40, 16))).op
    assert isinstance(op, Attention) and op.logarithm is None


def finite(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    s = scores(q, k, lambda rows, keys: keys <= rows - 5).clamp(min=torch.finfo(torch.float32).min)
    s = (q @ k.mT * 0.25).masked_fill(torch.isinf(s), -1e9)
    return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)


def scaled_once_more(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    s = scores(q, k)
    return torch.softmax(s, -1) @ v, torch.logsumexp(s * 2, -1)


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    s = q @ k.mT
    return torch.softmax(s, -1) @ v, torch.logsumexp(s, -2)


@pytest.mark.parametrize("function", [finite, scaled_once_more, over_queries])
def test_another_logarithm_is_none_of_ours(function: Callable[..., Pair]) -> None:
    matches, missed = find_attention(traced(function, *heads(1, 2, 2, 40, 40, 16)))
    assert not matches and missed
    assert any("also read by" in m.reason or "finite numbers" in m.reason for m in missed)
