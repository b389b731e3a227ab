"""The gated MLP of Llama-like transformers: act(x·W_gateᵀ + b_gate) · (x·W_upᵀ + b_up).

Both products, the activation and the product of the two become one kernel that reads x once, with a norm in front of x
folded in where there is one. Saved per call: the two [M, N] intermediates, written and read again, and the norm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_compiler.pattern import Example, choice, pattern


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _tensors(rows: int = 3) -> tuple[Tensor, ...]:
    return torch.randn(rows, 8), torch.randn(12, 8), torch.randn(12, 8), torch.randn(12), torch.randn(12)


def _two_inputs(x: Tensor, w_gate: Tensor, w_up: Tensor, b_gate: Tensor, b_up: Tensor) -> Tensor:
    return F.silu(F.linear(x, w_gate)) * F.linear(x + 1.0, w_up)


def _behind_a_norm(x: Tensor, w_gate: Tensor, w_up: Tensor, b_gate: Tensor, b_up: Tensor) -> Tensor:
    h = F.rms_norm(x, (8,), eps=1e-5)
    return F.linear(h, w_up) * F.gelu(F.linear(h, w_gate))


@pattern(
    name="gated_mlp",
    examples=[
        Example(_tensors),
        Example(lambda: _tensors(1)),
        Example(_tensors, _behind_a_norm),
        Example(_tensors, _two_inputs, refused="must be the same tensor"),
    ],
)
def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    act: Callable[[Tensor], Tensor] = choice(F.silu, F.gelu, gelu_tanh, F.relu, torch.sigmoid, relu_squared),  # noqa: B008
) -> Tensor:
    return act(F.linear(x, w_gate, b_gate)) * F.linear(x, w_up, b_up)
