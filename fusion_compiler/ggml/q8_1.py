"""Q8_1: activations of 8 bits with the sum of each block, 36 bytes for 32."""

from __future__ import annotations

import torch
from torch import Tensor

from . import blocks

NAME = "Q8_1"
BYTES = 36


def quantise(x: Tensor) -> Tensor:
    """x [..., K] as uint8 [..., K/32 · 36]: d and the codes as in Q8_0, and s = d · Σ codes with d in float32.

    Raises ValueError where K is no multiple of 32, or x is not finite, or a sum exceeds fp16.
    """
    d, codes = blocks.of_eight_bits(blocks.in_blocks(x, NAME))
    s = d * codes.sum(-1, keepdim=True)
    held = [*(blocks.half_bytes(v, NAME) for v in (d, s)), codes.to(torch.int8).view(torch.uint8)]
    return torch.cat(held, -1).flatten(-2)


def parts(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(d fp16 [..., K/32, 1], s alike, codes int8 [..., K/32, 32]). Raises ValueError for what are not such bytes."""
    d, s, codes = torch.split(blocks.of_rows(raw, BYTES, NAME), [2, 2, 32], -1)
    return d.contiguous().view(torch.float16), s.contiguous().view(torch.float16), codes.view(torch.int8)


def dequantise(raw: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """raw uint8 [..., K/32 · 36] as [..., K] in `dtype`, the product rounded to it."""
    d, _, codes = parts(raw)
    return blocks.product(d, codes, dtype)
