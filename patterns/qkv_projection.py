"""Linears of one and the same input, each with a result of its own: x·W_qᵀ, x·W_kᵀ, x·W_vᵀ.

One launch walks all weights, of whatever widths, where they lie: nothing is copied or concatenated. x is read once and
a norm in front of it is folded in. Saved per call: all launches but one, and the norm. The gate and up projections of
an MLP whose product cannot be fused are found too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_compiler.pattern import Example, RecognisedPattern
from fusion_compiler.siblings import PATTERN, find_siblings

Tensors = tuple[Tensor, ...]


def projections(x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, norm: Tensor) -> Tensors:
    return F.linear(x, q, bias), F.linear(x, k), F.linear(x, v)


def behind_a_norm(x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, norm: Tensor) -> Tensors:
    h = F.rms_norm(x, (8,), norm, 1e-5)
    return F.linear(h, q, bias).view(*x.shape[:-1], 2, 6).transpose(-2, -3), h @ k.T, F.linear(h, v)


def gate_and_up(x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, norm: Tensor) -> Tensors:
    return F.silu(F.linear(x, k)), F.linear(x, v)


def stored_otherwise(x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, norm: Tensor) -> Tensors:
    return F.linear(x, q), x @ k.T.contiguous()


def _tensors(rows: int = 3) -> Tensors:
    return torch.randn(rows, 8), *(torch.randn(n, 8) for n in (12, 4, 4)), torch.randn(12), torch.randn(8)


qkv_projection = RecognisedPattern(
    name=PATTERN,
    function=projections,
    find=find_siblings,
    examples=(
        Example(_tensors),
        Example(lambda: _tensors(1)),
        Example(_tensors, behind_a_norm),
        Example(_tensors, gate_and_up),
        Example(_tensors, stored_otherwise, refused="stored otherwise"),
    ),
)
