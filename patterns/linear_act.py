"""A linear and its activation: act(x·Wᵀ + b), the first half of an MLP without a gate (GPT-2, BERT, ViT, T5 …).

The activation is taken of the accumulator before it is written, and a norm in front of x is folded in where there is
one. Saved per call: the product [M, N], written and read again, and a kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_compiler.pattern import Example, choice, pattern


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _tensors(rows: int = 3) -> tuple[Tensor, ...]:
    return torch.randn(rows, 8), torch.randn(12, 8), torch.randn(12)


def _behind_a_norm(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(F.layer_norm(x, (8,)), w, bias))


def _of_a_product(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w) * bias)


@pattern(
    name="linear_act",
    examples=[
        Example(_tensors),
        Example(lambda: _tensors(1)),
        Example(_tensors, _behind_a_norm),
        Example(_tensors, _of_a_product, refused="a linear was expected"),
    ],
)
def linear_act(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    act: Callable[[Tensor], Tensor] = choice(  # noqa: B008
        F.gelu, gelu_tanh, F.relu, F.silu, torch.sigmoid, quick_gelu, relu_squared
    ),
) -> Tensor:
    return act(F.linear(x, w, bias))
