"""A linear whose weight is computed from codes of 4 or 8 bits: x · (scale · (code − zero))ᵀ + b, in any spelling.

What the weight is made of is proved from how the graph computes it, element by element; codes of 8 bits are integers
or float8. A kernel that reads the codes moves a quarter or half of the bytes of a dequantised weight, and never writes
that weight to memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_compiler.pattern import Example, RecognisedPattern
from fusion_compiler.quantised import find_quantised


def split_blocks(x: Tensor, qs: Tensor, d: Tensor) -> Tensor:
    """Q4_0 with its codes [N, K/32, 16] and scales [N, K/32] apart."""
    codes = torch.cat([qs & 15, qs >> 4], -1).to(x.dtype) - 8
    return F.linear(x, (codes * d[..., None].to(x.dtype)).flatten(1))


def words_along_k(x: Tensor, qs: Tensor, d: Tensor) -> Tensor:
    words = qs.view(torch.int32)
    shifts = torch.arange(0, 32, 4, device=x.device, dtype=torch.int32)
    codes = (words[..., None] >> shifts & 15).flatten(-2).to(x.dtype)
    return F.linear(x, ((codes - 8) * d[..., None].to(x.dtype)).flatten(1))


def scaled_twice(x: Tensor, qs: Tensor, d: Tensor) -> Tensor:
    codes = torch.cat([qs & 15, qs >> 4], -1).to(x.dtype) - 8
    return F.linear(x, (codes * d[..., None].to(x.dtype) * d[:, :1, None].to(x.dtype)).flatten(1))


def odd_order(x: Tensor, qs: Tensor, d: Tensor) -> Tensor:
    codes = torch.cat([qs >> 4, qs & 15], -1).to(x.dtype) - 8
    return F.linear(x, (codes * d[..., None].to(x.dtype)).flatten(1))


def _tensors() -> tuple[Tensor, ...]:
    return torch.randn(3, 64), torch.randint(0, 256, (8, 2, 16), dtype=torch.uint8), torch.rand(8, 2)


quantised_linear = RecognisedPattern(
    name="quantised_linear",
    function=split_blocks,
    find=find_quantised,
    examples=(
        Example(_tensors),
        Example(_tensors, words_along_k),
        Example(_tensors, scaled_twice, refused="multiply them into one"),
        Example(_tensors, odd_order, refused="an order that kernels do not read"),
    ),
)
