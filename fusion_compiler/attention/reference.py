"""What a kernel registered for "attention" has to compute, and of which arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, softcap: float | None
) -> Tensor:
    """softmax(softcap·tanh(scale·q·kᵀ / softcap) + mask)·v, [B, H, Lq, Dv] in the dtype of q.

    q:         [B, H, Lq, D]
    k, v:      [B, Hkv, Lk, D] and [B, Hkv, Lk, Dv]; query head h reads head h // (H / Hkv), nothing is repeated
    mask:      None, or [B, H, Lq, Lk] in the dtype of q, added to the scores (it may be expanded, with strides of 0)
    is_causal: query i sees the keys j <= i, aligned to the first key; there is no mask then
    softcap:   None where the scores are not capped
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores.float(), dim=-1).to(q.dtype) @ v


def example() -> dict[str, Any]:
    """Arguments of `attention`."""
    q, k, v = torch.randn(2, 4, 12, 16), torch.randn(2, 2, 12, 16), torch.randn(2, 2, 12, 16)
    return {"q": q, "k": k, "v": v, "mask": None, "is_causal": False, "scale": 0.25, "softcap": None}
