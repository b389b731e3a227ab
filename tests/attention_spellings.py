"""Spellings of attention: cores from q, k, v of equal heads to the result, and what is put around them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def scale_of(q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1])


def hidden(q: Tensor, k: Tensor) -> Tensor:
    """True above the diagonal."""
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)


def least(q: Tensor) -> float:
    return torch.finfo(q.dtype).min


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * scale_of(q)


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v


def multiplied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


def q_prescaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q * scale_of(q)) @ k.mT, -1) @ v


def k_prescaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ (k * scale_of(q)).mT, -1) @ v


def both_prescaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root = math.sqrt(scale_of(q))
    return torch.softmax((q * root) @ (k * root).mT, -1) @ v


def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(scale_of(q)).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", p, v)


def merged_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b, c = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    p = torch.softmax(torch.bmm(a, b.transpose(1, 2)) * scale_of(q), -1)
    return torch.bmm(p, c).view(q.shape)


def added_in_the_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b, c = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    mask = torch.full((q.shape[2], k.shape[2]), least(q), dtype=q.dtype).triu(1)
    s = torch.baddbmm(mask, a, b.transpose(1, 2), beta=1, alpha=scale_of(q))
    return (s.softmax(-1) @ c).view(q.shape)


def softmax_in_float(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def maximum_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - s.max(-1).values.unsqueeze(-1).detach()).exp()
    return e * e.sum(-1, keepdim=True).reciprocal() @ v


def divided_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e @ v / e.sum(-1)[..., None]


def in_base_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k) * math.log2(math.e)
    e = torch.exp2(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True) @ v


def less_its_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.exp(s - torch.logsumexp(s, -1, keepdim=True)) @ v


def exponential_of_log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).log_softmax(-1).exp() @ v


def scale_computed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / torch.sqrt(torch.tensor(q.shape[-1], dtype=q.dtype)), -1) @ v


def transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.softmax(k @ q.mT * scale_of(q), -2)
    return p.mT @ v


def values_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ scores(q, k).softmax(-1).mT).mT


def masked_fill_triu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(hidden(q, k), float("-inf")).softmax(-1) @ v


def masked_fill_tril(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lower = torch.tril(torch.ones(q.shape[-2], k.shape[-2]))
    return scores(q, k).masked_fill(lower == 0, float("-inf")).softmax(-1) @ v


def masked_before_scaling(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).masked_fill(hidden(q, k), float("-inf")) * scale_of(q)).softmax(-1) @ v


def where_least(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(hidden(q, k), torch.tensor(least(q), dtype=q.dtype), scores(q, k)).softmax(-1) @ v


def added_triu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.triu(torch.full((q.shape[-2], k.shape[-2]), float("-inf"), dtype=q.dtype), diagonal=1)
    return (scores(q, k) + mask).softmax(-1) @ v


def mask_comes_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype).masked_fill(hidden(q, k), least(q))
    return (mask + scores(q, k)).softmax(-1) @ v


def one_minus_tril(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.ones(1, 1, q.shape[-2], k.shape[-2], dtype=q.dtype).tril()
    return (scores(q, k) + (1.0 - seen) * least(q)).softmax(-1) @ v


def one_minus_tril_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=q.dtype).tril()
    return (scores(q, k) - 1e9 * (1.0 - seen)).softmax(-1) @ v


def compared_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    positions = torch.arange(q.shape[-2])
    allowed = torch.arange(k.shape[-2])[None, None, None, :] <= positions[None, None, :, None]
    mask = torch.where(allowed, torch.tensor(0.0, dtype=q.dtype), torch.tensor(least(q), dtype=q.dtype))
    return (scores(q, k) + mask).softmax(-1) @ v


def mask_times_later_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[-2], k.shape[-2]), least(q), dtype=q.dtype)
    mask = mask * (torch.arange(k.shape[-2]) > torch.arange(q.shape[-2]).reshape(-1, 1))
    return (scores(q, k) + mask[None, None]).softmax(-1) @ v


def not_below_least(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[-2], k.shape[-2]), least(q), dtype=q.dtype).triu(1)
    return torch.max(scores(q, k) + mask, torch.tensor(least(q), dtype=q.dtype)).softmax(-1) @ v


def packed_and_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    position = torch.arange(q.shape[-2])[None]
    packed = (torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    rows, columns = position[0][:, None], torch.arange(k.shape[-2])[None]
    allowed = (columns <= rows) & (packed[0][rows] == packed[0][columns])
    return scores(q, k).masked_fill(~allowed, least(q)).softmax(-1) @ v


def sdpa_with_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden(q, k))


CAUSAL: tuple[Core, ...] = (
    masked_fill_triu, masked_fill_tril, masked_before_scaling, where_least, added_triu, mask_comes_first,
    one_minus_tril, one_minus_tril_subtracted, compared_positions, mask_times_later_positions, not_below_least,
    packed_and_causal, added_in_the_product, sdpa_with_mask,
)  # fmt: skip
UNMASKED: tuple[Core, ...] = (
    divided, multiplied, q_prescaled, k_prescaled, both_prescaled, unscaled, einsum, merged_heads, softmax_in_float,
    by_hand, maximum_detached, in_base_two, divided_last, less_its_logsumexp, exponential_of_log_softmax,
    scale_computed, transposed, values_first,
)  # fmt: skip


# ---- what is put around a core ------------------------------------------------------------------
def plain(core: Core, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return core(q, k, v)


def repeated_by_expand(core: Core, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def repeat(x: Tensor) -> Tensor:
        b, h, s, d = x.shape
        return x[:, :, None].expand(b, h, q.shape[1] // h, s, d).reshape(b, q.shape[1], s, d)

    return core(q, repeat(k), repeat(v)).transpose(1, 2).flatten(2)


def repeated_by_interleave(core: Core, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[1] // k.shape[1]
    return core(q, k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1))


def tiled(core: Core, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[1] // k.shape[1]
    return core(q, k.repeat(1, n, 1, 1), v.repeat(1, n, 1, 1))


def rotated(core: Core, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rotary embedding, heads split from a projection, grouped."""

    def rotate(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), frequency).to(x.dtype)
        cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    return repeated_by_expand(core, rotate(q), rotate(k), v)


AROUND = (plain, repeated_by_expand, repeated_by_interleave, tiled, rotated)
