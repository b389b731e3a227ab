"""Attention: softmax(scale · q·kᵀ, masked)·v, as models write it with two matmuls and a softmax between them.

One flash kernel reads q, k and v once and never writes the scores: O(L) memory instead of O(L²). K and V repeated for
grouped heads are read un-repeated, and a mask that is proved to be causal is not read at all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusion_compiler.attention import attention as computed
from fusion_compiler.attention import example, find_attention
from fusion_compiler.match import Match, NearMiss
from fusion_compiler.pattern import Example, RecognisedPattern
from fusion_compiler.semantics import SemanticView


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1) @ v


def causal_masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) * 0.25
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1) @ v


def grouped_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product(q, k[:, :1].repeat_interleave(4, dim=1), v[:, :1].repeat_interleave(4, dim=1))


def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2), dim=-2) @ v


def _heads() -> tuple[Tensor, ...]:
    return torch.randn(2, 4, 12, 16), torch.randn(2, 4, 12, 16), torch.randn(2, 4, 12, 16)


def _find(view: SemanticView) -> tuple[list[Match], list[NearMiss]]:
    return find_attention(view.graph_module)


attention = RecognisedPattern(
    name="attention",
    function=scaled_dot_product,
    computes=computed,
    arguments=example,
    find=_find,
    examples=(
        Example(_heads),
        Example(_heads, causal_masked_fill),
        Example(_heads, grouped_heads),
        Example(_heads, softmax_over_queries, refused="softmax"),
    ),
)
