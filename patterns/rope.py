"""Rotary position embedding: the pairs (a, b) of a head's elements become (a·cos − b·sin, b·cos + a·sin).

Inductor writes it as one loop over x, cos and sin, which moves every byte once: it is found, reported and left there,
and a registered kernel may take it over. Complex numbers are none of Inductor's: written so, it is several kernels of
torch, and is computed in real numbers instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion_compiler.pattern import Example, RecognisedPattern
from fusion_compiler.rope import find_rope
from fusion_compiler.rope import rope as computed


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def llama(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def gpt_j(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


def parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (a, b), c, s = x.chunk(2, dim=-1), cos[..., :4], sin[..., :4]
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


def complex_numbers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turns = torch.complex(cos[..., ::2].contiguous(), sin[..., ::2].contiguous())
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns).flatten(-2)


def without_cosine(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x + rotate_half(x * cos) * sin


def _heads() -> tuple[Tensor, ...]:
    return torch.randn(2, 3, 5, 8), torch.randn(5, 8), torch.randn(5, 8)


def _arguments() -> dict[str, Any]:
    x, cos, sin = _heads()
    return {"x": x, "cos": cos, "sin": sin, "interleaved": False}


rope = RecognisedPattern(
    name="rope",
    computes=computed,
    arguments=_arguments,
    function=llama,
    find=find_rope,
    examples=(
        Example(_heads),
        Example(_heads, gpt_j),
        Example(_heads, parts),
        Example(_heads, complex_numbers),
        Example(_heads, without_cosine, refused="write x·cos + rotate_half(x)·sin"),
    ),
)
