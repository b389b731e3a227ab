"""Q4_0: weights of 4 bits, 18 bytes for 32."""

from __future__ import annotations

import torch
from torch import Tensor

from . import blocks

NAME = "Q4_0"
BYTES = 18


def quantise(x: Tensor) -> Tensor:
    """x [..., K] as uint8 [..., K/32 · 18], bit for bit as ggml does it.

    With m the first element of largest magnitude, d = m / −8, so that m itself is exact; code = ⌊x/d + 8.5⌋, at most
    15. The codes are made with d in float32; only the stored d is rounded.

    Raises ValueError where K is no multiple of 32, or x is not finite.
    """
    x = blocks.in_blocks(x, NAME)
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    d = largest / -8
    codes = (x * blocks.inverse(d) + 8.5).trunc().to(torch.uint8).clamp(max=15)
    low, high = codes.chunk(2, -1)
    return torch.cat([blocks.half_bytes(d, NAME), low | (high << 4)], -1).flatten(-2)


def parts(raw: Tensor) -> tuple[Tensor, Tensor]:
    """(d fp16 [..., K/32, 1], codes less 8 as int8 [..., K/32, 32]). Raises ValueError for what are not such bytes."""
    d, pairs = torch.split(blocks.of_rows(raw, BYTES, NAME), [2, 16], -1)
    shifts = torch.tensor([[0], [4]], dtype=torch.uint8, device=raw.device)
    codes = (pairs.unsqueeze(-2) >> shifts) & 15
    return d.contiguous().view(torch.float16), codes.flatten(-2).to(torch.int8) - 8


def dequantise(raw: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """raw uint8 [..., K/32 · 18] as [..., K] in `dtype`, the product rounded to it."""
    return blocks.product(*parts(raw), dtype)
