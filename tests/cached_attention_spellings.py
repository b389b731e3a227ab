"""Spellings of attention over a static cache: keys and values are written at a position, later positions are masked.

Each takes q [B, H, L, D], the caches k, v [B, H, S, D] after the write, and `visible` [1, 1, L, S], True where a key
may be seen; `step` is what stands around all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Cached = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _least(q: Tensor) -> float:
    return torch.finfo(q.dtype).min


def _additive(q: Tensor, visible: Tensor) -> Tensor:
    return torch.where(visible, torch.tensor(0.0, dtype=q.dtype), torch.tensor(_least(q), dtype=q.dtype))


def added(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5 + _additive(q, visible)).softmax(-1) @ v


def added_first(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return torch.softmax(_additive(q, visible) + q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


def softmax_in_float(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5 + _additive(q, visible)
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.matmul(F.softmax(scores, dim=-1, dtype=wide).to(q.dtype), v)


def masked_fill(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -math.inf).softmax(-1) @ v


def masked_fill_least(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(visible.logical_not(), _least(q)).softmax(-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return torch.where(visible, scores, torch.tensor(-math.inf, dtype=q.dtype)).softmax(-1) @ v


def masked_before_scaling(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return ((q @ k.mT).masked_fill(~visible, -math.inf) * q.shape[-1] ** -0.5).softmax(-1) @ v


def one_minus(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5 + (1.0 - visible.to(q.dtype)) * _least(q)).softmax(-1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(q.shape[-1] ** -0.5).masked_fill(~visible, -math.inf)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


def by_hand(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5 + _additive(q, visible)
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def k_prescaled(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return (q @ (k * q.shape[-1] ** -0.5).mT).masked_fill(~visible, -math.inf).softmax(-1) @ v


def both_prescaled(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    root = q.shape[-1] ** -0.25
    return ((q * root) @ (k * root).mT + _additive(q, visible)).softmax(-1) @ v


def merged_heads(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    a, b, c = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    scores = torch.bmm(a, b.transpose(1, 2)) * q.shape[-1] ** -0.5
    return torch.bmm(torch.softmax(scores + _additive(q, visible)[0], -1), c).view(*q.shape)


def not_below_least(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5 + _additive(q, visible)
    return torch.max(scores, torch.tensor(_least(q), dtype=q.dtype)).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


CACHED: tuple[Cached, ...] = (
    added, added_first, softmax_in_float, masked_fill, masked_fill_least, chosen, masked_before_scaling, one_minus,
    einsum, by_hand, k_prescaled, both_prescaled, merged_heads, not_below_least, sdpa,
)  # fmt: skip


def step(core: Cached, q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    """The new keys and values go to `position` …, heads are repeated, and each query sees what is not after it."""
    at = position + torch.arange(k.shape[2])
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    visible = torch.arange(keys.shape[2])[None, None, None, :] <= at[None, None, :, None]
    groups = q.shape[1] // keys.shape[1]

    def repeat(x: Tensor) -> Tensor:
        b, h, s, d = x.shape
        return x if groups == 1 else x[:, :, None].expand(b, h, groups, s, d).reshape(b, h * groups, s, d)

    return core(q, repeat(keys), repeat(values), visible).transpose(1, 2).flatten(2)
