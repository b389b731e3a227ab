"""A linear behind pointwise operations that nobody else needs: act(h)·Wᵀ + b, (silu(g) ⊙ u)·Wᵀ, (s · h)·Wᵀ.

The kernel computes its input while it reads it, so that the activation is neither a kernel nor a pass through memory.
Every block of columns computes it again: that pays for few rows, and where the activation cannot be the epilogue of
what computes h. Saved per call: the activation [M, K], written and read again, and its kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_compiler.activation_linear import PATTERN, find_activation_linear
from fusion_compiler.pattern import Example, RecognisedPattern


def activation(h: Tensor, up: Tensor, w: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return F.linear(F.gelu(h), w, bias)


def product(h: Tensor, up: Tensor, w: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return F.linear(F.silu(h) * up, w) + bias


def halves(h: Tensor, up: Tensor, w: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    gate, up = torch.cat([h, up], -1).chunk(2, -1)
    return F.linear(F.relu(gate).square() * up, w).tanh()


def scaled(h: Tensor, up: Tensor, w: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return F.linear(h * scale / up.sum(-1, keepdim=True), w)


def read_elsewhere(h: Tensor, up: Tensor, w: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    x = F.silu(h) * up
    return F.linear(x.tanh(), w), x


def outer_product(h: Tensor, up: Tensor, w: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return F.linear(h.sum(-1, keepdim=True) * scale, w)


def _tensors(rows: int = 3) -> tuple[Tensor, ...]:
    return torch.randn(rows, 8), torch.randn(rows, 8), torch.randn(12, 8), torch.randn(12), torch.randn(8)


activation_linear = RecognisedPattern(
    name=PATTERN,
    function=activation,
    find=find_activation_linear,
    examples=(
        Example(_tensors),
        Example(lambda: _tensors(1)),
        Example(_tensors, product),
        Example(_tensors, halves),
        Example(_tensors, scaled),
        Example(_tensors, read_elsewhere),
        Example(_tensors, outer_product, refused="no tensor with the elements of its rows"),
    ),
)
