"""Rotary embedding of queries and keys, and the write of keys and values into a static cache, as one kernel.

Inductor makes a kernel of each rotation and of each write, a microsecond or more apiece for a few kilobytes; per layer
of a decode step that is as much as the attention itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compiler.pattern import Example, RecognisedPattern
from fusion_compiler.rope_cache import find_rope_cache

Results = tuple[Tensor, ...]


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def static_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor
) -> Results:
    at = position + torch.arange(k.shape[2], device=k.device)
    turned = k * cos + rotate_half(k) * sin
    return q * cos + rotate_half(q) * sin, keys.index_copy(2, at, turned), values.index_copy(2, at, v)


def values_elsewhere(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor
) -> Results:
    at = position + torch.arange(k.shape[2], device=k.device)
    turned = k * cos + rotate_half(k) * sin
    return q * cos + rotate_half(q) * sin, keys.index_copy(2, at, turned), values.index_copy(2, at + 1, v)


def _tensors() -> tuple[Tensor, ...]:
    heads = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8)
    caches = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    return *heads, torch.randn(1, 8), torch.randn(1, 8), *caches, torch.tensor(3)


rope_cache = RecognisedPattern(
    name="rope_cache",
    function=static_cache,
    find=find_rope_cache,
    examples=(
        Example(_tensors),
        Example(_tensors, values_elsewhere, refused="no values are written at the same positions"),
    ),
)
