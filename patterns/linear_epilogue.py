"""A linear and what is done with its result element by element: bias, activation, scale, product, residual, casts.

Any chain of pointwise operations behind one linear, such as the activation of an MLP or the residual added to what
attention and MLP give, is computed on the accumulator before it is written; a norm in front of x is folded in where
there is one. Parts of the linear, such as gate and up side by side or alternating, may meet in the chain. What others
read too, as they do the residual stream, ends the chain and is its result. Saved per call: the product [M, N], written
and read again, and a kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_compiler.linear_epilogue import PATTERN, find_linear_epilogue
from fusion_compiler.pattern import Example, RecognisedPattern


def activation(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, bias))


def residual_stream(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    h = residual + F.linear(x, w, bias)
    return F.rms_norm(h, (12,), eps=1e-5), h


def behind_a_norm(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return F.relu(F.linear(F.layer_norm(x, (8,)), w, bias)).square()


def bent(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    h = F.linear(x, w) * bias
    return torch.where(h > 0.0, h * h, torch.expm1(h)) - residual


def clamped_gate(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    h = F.linear(x, w, bias)
    gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


def read_elsewhere(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    h = F.linear(x, w, bias)
    return F.silu(h), h


def scaled_float8(x: Tensor, w: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
    return torch._scaled_mm(x, w.T, scale, scale, out_dtype=torch.bfloat16) + residual


def _float8() -> tuple[Tensor, ...]:
    x, w = (torch.randn(n, 32).to(torch.float8_e4m3fn) for n in (16, 48))
    return x, w, torch.tensor(0.5), torch.randn(16, 48, dtype=torch.bfloat16)


def _tensors(rows: int = 3) -> tuple[Tensor, ...]:
    return torch.randn(rows, 8), torch.randn(12, 8), torch.randn(12), torch.randn(rows, 12)


linear_epilogue = RecognisedPattern(
    name=PATTERN,
    function=activation,
    find=find_linear_epilogue,
    examples=(
        Example(_tensors),
        Example(lambda: _tensors(1)),
        Example(_tensors, residual_stream),
        Example(_tensors, behind_a_norm),
        Example(_tensors, bent),
        Example(_tensors, clamped_gate),
        Example(_tensors, read_elsewhere, refused="also read by"),
        Example(_float8, scaled_float8, refused="float8_e4m3fn activations"),
    ),
)
