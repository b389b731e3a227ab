"""A row norm by itself: RMSNorm or LayerNorm of the last axis, with weight and bias or without.

One kernel that keeps the row in registers reads x once. Where rows are longer than Inductor keeps (about a thousand
elements) its kernel reads them once for the statistics and once more to use them.
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
    return torch.randn(rows, 8), torch.randn(8), torch.randn(8)


def _eps_outside_the_root(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-2) * weight


def _weight_of_every_element(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.rms_norm(x, (8,)) * (x + 1.0)


@pattern(
    name="norm",
    examples=[
        Example(_tensors),
        Example(lambda: _tensors(1)),
        Example(_tensors, _weight_of_every_element),
        Example(_tensors, _eps_outside_the_root, refused="written so, it is found"),
    ],
)
def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    offset: float = 0.0,
    norm: Norm = choice(rms, layer),  # noqa: B008
) -> Tensor:
    """`offset` is 1 where the weight is stored as its distance from 1, as Gemma does."""
    return norm(x, None if weight is None else weight + offset, bias, eps)
