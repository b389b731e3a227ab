"""Q8_0: weights of 8 bits, 34 bytes for 32."""

from __future__ import annotations

import torch
from torch import Tensor

from . import blocks

NAME = "Q8_0"
BYTES = 34


def quantise(x: Tensor) -> Tensor:
    """x [..., K] as uint8 [..., K/32 · 34], bit for bit as ggml does it: d = max|x| / 127, code = x/d rounded.

    Raises ValueError where K is no multiple of 32, or x is not finite.
    """
    d, codes = blocks.of_eight_bits(blocks.in_blocks(x, NAME))
    return torch.cat([blocks.half_bytes(d, NAME), codes.to(torch.int8).view(torch.uint8)], -1).flatten(-2)


def parts(raw: Tensor) -> tuple[Tensor, Tensor]:
    """(d fp16 [..., K/32, 1], codes int8 [..., K/32, 32]). Raises ValueError for what are not such bytes."""
    d, codes = torch.split(blocks.of_rows(raw, BYTES, NAME), [2, 32], -1)
    return d.contiguous().view(torch.float16), codes.view(torch.int8)


def dequantise(raw: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """raw uint8 [..., K/32 · 34] as [..., K] in `dtype`, the product rounded to it."""
    return blocks.product(*parts(raw), dtype)
