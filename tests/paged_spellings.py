"""How eager models spell attention over a paged cache: blocks gathered by a table, lengths hidden by a mask.

Each takes q [B, H, L, D], the caches [blocks, size, Hkv, D] or, where the name says `heads_first`, [blocks, Hkv, size,
D], the table [B, most blocks] and the lengths [B].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Paged = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """k and v [B, H, S, D] for all heads."""
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -math.inf)
    wide = torch.promote_types(q.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).to(q.dtype) @ v


def _before(lengths: Tensor, keys: int) -> Tensor:
    return torch.arange(keys, device=lengths.device) < lengths[:, None, None, None]


def _repeated(q: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, Hkv, S, D] for the heads of q."""
    return tuple(t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in tensors)


def indexed(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    batch = table.shape[0]
    k, v = (t[table].reshape(batch, -1, *t.shape[2:]).transpose(1, 2) for t in (keys, values))
    return _attend(q, *_repeated(q, k, v), _before(lengths, k.shape[2]))


def cut_off(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """Keys that the last block has too many are cut off."""
    longest = table.shape[1] * keys.shape[1] - 3
    k, v = (t[table].flatten(1, 2)[:, :longest].permute(0, 2, 1, 3) for t in (keys, values))
    return _attend(q, *_repeated(q, k, v), _before(lengths, longest))


def selected(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    k, v = (t.index_select(0, table.flatten()).view(table.shape[0], -1, *t.shape[2:]) for t in (keys, values))
    times = q.shape[1] // keys.shape[2]
    k, v = (t[:, :, :, None].expand(-1, -1, -1, times, -1).flatten(2, 3).transpose(1, 2) for t in (k, v))
    return _attend(q, k, v, _before(lengths, k.shape[2]))


def heads_first(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    k, v = (t[table].transpose(1, 2).flatten(2, 3) for t in (keys, values))
    return _attend(q, *_repeated(q, k, v), _before(lengths, k.shape[2]))


def heads_first_moved(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    k, v = (t[table].transpose(2, 3).flatten(1, 2).transpose(1, 2) for t in (keys, values))
    return _attend(q, *_repeated(q, k, v), _before(lengths, k.shape[2]))


def by_einsum(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    k, v = (t[table].flatten(1, 2) for t in (keys, values))
    grouped = q.unflatten(1, (keys.shape[2], -1))
    scores = torch.einsum("bhgqd,bkhd->bhgqk", grouped, k) * q.shape[-1] ** -0.5
    scores = torch.where(_before(lengths, k.shape[1])[:, None], scores, -math.inf)
    return torch.einsum("bhgqk,bkhd->bhgqd", scores.softmax(-1), v).flatten(1, 2)


SPELLINGS: tuple[Paged, ...] = (indexed, cut_off, selected, heads_first, heads_first_moved, by_einsum)
