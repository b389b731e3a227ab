"""Kernels registered for attention, and patterns of attention that users declare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusion_compiler as fc
from fusion_compiler import backend, kernels
from fusion_compiler.attention.reference import attention as reference

SEEN: list[tuple[bool, bool, float | None]] = []


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_kernels", {})
    SEEN.clear()


def mine(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, softcap: float | None
) -> Tensor:
    SEEN.append((mask is not None, is_causal, softcap))
    return reference(q, k, v, mask, is_causal, scale, softcap)


def run(function: Callable[..., Tensor], *inputs: Tensor, **more: Any) -> tuple[Tensor, fc.Report]:
    options = {"strict": True, "remainder": "eager", "verify": True, **more}
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(function, backend=backend.fusion_compiler, options=options)(*inputs)
    made = fc.last_report()
    assert made is not None
    return out, made


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * 0.25
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(q @ k[:, :1].mT * 0.25 / 5.0) * 5.0, -1) @ v[:, :1]


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(q @ k.repeat_interleave(2, 1).mT * 0.25 + bias, -1) @ v.repeat_interleave(2, 1)


def heads() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 12, 16), torch.randn(2, 2, 12, 16), torch.randn(2, 2, 12, 16)


@pytest.mark.parametrize(
    ("function", "more", "seen"),
    [(grouped, (), (False, True, None)), (capped, (), (False, False, 5.0)), (biased, (4, 12, 12), (True, False, None))],
)
def test_a_registered_kernel(
    function: Callable[..., Tensor], more: tuple[int, ...], seen: tuple[bool, bool, float | None]
) -> None:
    fc.register_kernel("attention", mine, machines=["cpu"], cost=lambda machine, op: 1e-9)
    SEEN.clear()
    inputs = (*heads(), *([torch.randn(more)] if more else []))
    out, made = run(function, *inputs)
    assert [d.kernel for d in made.fused] == ["mine (registered)"]
    assert SEEN[0] == seen
    wanted = function(*(t.double() for t in inputs))
    assert (out - wanted).abs().max() <= 1.5 * (function(*inputs) - wanted).abs().max() + 1e-6


def test_a_kernel_for_another_machine_or_too_dear_is_not_taken() -> None:
    fc.register_kernel("attention", mine, machines=["cuda"], name="there", cost=lambda machine, op: 1e-9)
    fc.register_kernel("attention", mine, name="dear", cost=lambda machine, op: float("inf"))
    _, made = run(grouped, *heads())
    assert not any("registered" in d.kernel for d in made.decisions)


def test_what_is_wrong_with_a_kernel_is_said() -> None:
    with pytest.raises(fc.registry.KernelError, match="must take 7 arguments, q, k, v, mask, is_causal, scale"):
        fc.register_kernel("attention", lambda q, k, v: q)
    with pytest.raises(fc.registry.KernelError, match=r"returns float32 \[2, 4, 12, 12\]"):
        fc.register_kernel("attention", lambda q, k, v, *_: q @ k.repeat_interleave(2, 1).mT)


def test_sdpa_itself_can_be_registered() -> None:
    def sdpa(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, softcap: float | None
    ) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=True)

    fc.register_kernel("attention", sdpa, cost=lambda machine, op: float("inf") if op.softcap else 1e-9)
    _, made = run(grouped, *heads())
    assert [d.kernel for d in made.fused] == ["sdpa (registered)"]
    _, made = run(capped, *heads())
    assert not made.fused


# ---- declared patterns ----------------------------------------------------------------------------
def qkv() -> tuple[Tensor, ...]:
    return torch.randn(2, 4, 12, 16), torch.randn(2, 4, 12, 16), torch.randn(2, 4, 12, 16)


@fc.pattern(name="alibi", examples=[fc.Example(lambda: (*qkv(), torch.randn(4)))])
def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    distance = torch.arange(k.shape[-2])[None, :] - torch.arange(q.shape[-2])[:, None]
    return torch.softmax(q @ k.mT * 0.25 + slopes[:, None, None] * distance, -1) @ v


@fc.pattern(
    name="softcapped", examples=[fc.Example(qkv)], constraints=[lambda op: "too wide" if op.v_dim > 64 else None]
)
def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(30.0 * torch.tanh(q @ k.mT / 30.0), -1) @ v


ONLY = [p.name for p in fc.patterns()]


def test_a_declared_score_modification_needs_no_kernel() -> None:
    def model(x: Tensor, slopes: Tensor) -> Tensor:
        bias = slopes.view(4, 1, 1) * (torch.arange(1024).view(1, -1) - torch.arange(1024).view(-1, 1)).float()
        return torch.matmul(F.softmax(bias + torch.einsum("bhqd,bhkd->bhqk", x, x) / 4, dim=-1), x)

    inputs = torch.randn(1, 4, 1024, 16), torch.rand(4)
    out, made = run(model, *inputs, patterns=[alibi], disable=ONLY)
    [decision] = made.decisions
    assert decision.pattern == "alibi" and "scaled_dot_product" in decision.kernel, decision.reason
    wanted = model(*(t.double() for t in inputs))
    assert (out - wanted).abs().max() <= 1.5 * (model(*inputs) - wanted).abs().max() + 1e-6


def test_capped_scores_are_kept_with_a_sentence_and_the_cure() -> None:
    _, made = run(capped, *heads(), patterns=[softcapped], disable=ONLY)
    [decision] = made.decisions
    assert (decision.pattern, decision.verdict) == ("softcapped", "kept")
    assert "no SDPA kernel caps scores (softcap 5)" in decision.reason and "register_kernel" in decision.reason
    fc.register_kernel(softcapped, mine, cost=lambda machine, op: 1e-9)
    _, made = run(capped, *heads(), patterns=[softcapped], disable=ONLY)
    assert [d.kernel for d in made.fused] == ["mine (registered)"]


def test_another_modification_is_a_near_miss() -> None:
    _, made = run(grouped, *heads(), patterns=[alibi, softcapped], disable=ONLY)
    assert not made.decisions
    assert sorted((n.pattern, n.reason.split(";")[0]) for n in made.near_misses) == [
        ("alibi", "the scores have a causal mask here, and a tensor added to them in the pattern"),
        ("softcapped", "the scores are not capped here, otherwise than in the pattern"),
    ]


def test_a_constraint_looks_at_the_attention() -> None:
    wide = torch.randn(1, 2, 8, 16), torch.randn(1, 1, 8, 16), torch.randn(1, 1, 8, 80)
    _, made = run(capped, *wide, patterns=[softcapped], disable=ONLY)
    assert [n.reason for n in made.near_misses] == ["too wide"]


@pytest.mark.parametrize("pattern", [alibi, softcapped])
def test_on_a_gpu_a_kernel_is_generated_for_a_declared_modification(pattern: fc.Pattern) -> None:
    inputs = [torch.empty(1, 16, 2048, 64, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    more = [torch.empty(16, dtype=torch.bfloat16, device="meta")] if pattern is alibi else []
    options = {"patterns": [pattern], "disable": ONLY}
    [decision] = fc.explain(pattern.function, *inputs, *more, machine="h200", options=options).decisions
    assert (decision.pattern, decision.verdict) == (pattern.name, "fused")
    assert "triton flash" in decision.kernel and decision.after is not None
    assert decision.after.seconds < decision.before.seconds / 3
