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
