"""A residual and the norm behind it: h = x + residual, norm(h), where h itself is used again.

One kernel reads both terms once and writes the sum and its norm: h is no obstacle but a second result. Where a matrix
product stands on either side, as in every transformer, this is all that the residual stream costs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_compiler.pattern import Example, choice, pattern

Norm = Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]


def rms(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _tensors(rows: int = 3) -> tuple[Tensor, ...]:
    return torch.randn(rows, 8), torch.randn(rows, 8), torch.randn(8), torch.randn(8)


def _scaled(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x * residual, (8,), weight, bias)


def _behind_a_bias() -> tuple[Tensor, ...]:
    return torch.randn(3, 8), torch.randn(3, 8), torch.randn(8, 8), torch.randn(8)


def _linear_behind(x: Tensor, residual: Tensor, w: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    h = F.linear(x, w, bias) + residual
    return F.rms_norm(h, (8,), eps=1e-5), h


@pattern(
    name="add_norm",
    examples=[
        Example(_tensors),
        Example(lambda: _tensors(1)),
        Example(_behind_a_bias, _linear_behind),
        Example(_tensors, _scaled, refused="a sum was expected here"),
    ],
)
def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    offset: float = 0.0,
    norm: Norm = choice(rms, layer),  # noqa: B008
) -> tuple[Tensor, Tensor]:
    """`offset` is 1 where the weight is stored as its distance from 1, as Gemma does."""
    h = x + residual
    return norm(h, None if weight is None else weight + offset, bias, eps), h
