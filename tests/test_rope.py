"""Every spelling of rotary embedding is found, as `rope`; complex numbers are computed in real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rope_spellings import MATCHED, REFUSED, complex_polar, gpt_j, llama

import fusion_compiler as fc
from fusion_compiler import backend, kernels
from fusion_compiler.patterns.rope import rope
from fusion_compiler.rope import rope as computed

OTHERS = [p.name for p in fc.patterns() if p.name != "rope"]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, 5, 16).to(dtype), torch.randn(5, 8)


def run(function: Callable[..., Any], *given: torch.Tensor, dynamic: bool = False) -> tuple[torch.Tensor, fc.Report]:
    options = {"strict": True, "remainder": "eager", "disable": OTHERS, "verify": True}
    with torch.no_grad():
        out = torch.compile(function, backend=backend.fusion_compiler, options=options, dynamic=dynamic)(*given)
    made = fc.last_report()
    assert made is not None
    return out, made


@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize("name", MATCHED)
def test_found(name: str, dtype: torch.dtype, dynamic: bool) -> None:
    x, angles = inputs(dtype)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    out, made = run(MATCHED[name], x, angles)
    assert [d.pattern for d in made.decisions] == ["rope"], made
    assert ("Inductor" in made.decisions[0].reason) == (made.decisions[0].verdict == "kept")
    eager, exact = MATCHED[name](x, angles), MATCHED[name](x.double(), angles).double()
    assert (out - exact).norm() <= 1.5 * (eager - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("name", REFUSED)
def test_lookalike(name: str) -> None:
    _, made = run(REFUSED[name], *inputs())
    assert not made.decisions


def test_half_a_rotation_is_told() -> None:
    _, made = run(REFUSED["sine alone"], *inputs())
    [miss] = made.near_misses
    assert "write x·cos + rotate_half(x)·sin" in miss.reason and "rope_spellings.py" in miss.where


def test_complex_numbers_are_computed_in_real_ones() -> None:
    x, angles = torch.randn(2, 8, 64, 64, dtype=torch.bfloat16), torch.randn(64, 32)
    out, made = run(complex_polar, x, angles)
    [decision] = made.decisions
    assert decision.verdict == "fused" and "computed in real numbers" in decision.kernel
    assert decision.error is not None and decision.error < 1e-2
    torch.testing.assert_close(out, complex_polar(x, angles), rtol=1e-2, atol=1e-2)


def test_pairs_that_are_put_into_halves_stay_there() -> None:
    """They are turned, but no kernel of ours puts its results in another order than it reads."""

    def into_halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        turns = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * turns
        return torch.cat(torch.view_as_real(pairs).unbind(-1), -1).type_as(x)

    x, angles = torch.randn(2, 8, 64, 64, dtype=torch.bfloat16), torch.randn(64, 32)
    out, made = run(into_halves, x, angles)
    torch.testing.assert_close(out, into_halves(x, angles), rtol=1e-2, atol=1e-2)
    assert not made.fused and "joined otherwise" in made.decisions[0].reason


def test_as_many_heads_as_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """cos [B, S, D] broadcasts to x [B, H, S, D] too where B = H; [B, 1, S, D] is what is multiplied."""
    monkeypatch.setattr(kernels, "_kernels", {})
    fc.register_kernel("rope", lambda *given: computed(*given), cost=lambda *_: 1e-9)

    def llama_by_batch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        cos, sin = cos.reshape(4, 5, 16), sin.reshape(4, 5, 16)
        a, b = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]

    x, cos, sin = torch.randn(4, 4, 5, 16), torch.randn(20, 16), torch.randn(20, 16)
    out, made = run(llama_by_batch, x, cos, sin)
    assert [d.pattern for d in made.fused] == ["rope"]
    torch.testing.assert_close(out, llama_by_batch(x, cos, sin))


# ---- registered kernels ---------------------------------------------------------------------------
@pytest.mark.parametrize(("function", "interleaved"), [(llama, False), (gpt_j, True)])
def test_a_registered_kernel(
    function: Callable[..., torch.Tensor], interleaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_kernels", {})
    seen = []

    def mine(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
        seen.append((tuple(cos.shape), interleaved))
        return computed(x, cos, sin, interleaved)

    fc.register_kernel("rope", mine, cost=lambda *_: 1e-9)
    seen.clear()
    x, angles = inputs()
    out, made = run(function, x, angles)
    assert [d.kernel for d in made.decisions] == ["mine (registered)"]
    assert seen and seen[0][1] is interleaved
    torch.testing.assert_close(out, function(x, angles))
    assert next(p for p in fc.patterns() if p.name == "rope").kernels == ("mine",)


def test_what_is_wrong_with_a_kernel_is_said() -> None:
    with pytest.raises(fc.registry.KernelError, match="must take 4 arguments, x, cos, sin, interleaved"):
        fc.register_kernel(rope, lambda x, cos, sin: x)
