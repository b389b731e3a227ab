"""Attention of one new token per sequence over keys and values that lie in pages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float | None = None,
    *,
    layout: Literal["NHD", "HND"] = "NHD",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """softmax(scale · query · keysᵀ) · values of each sequence, [B, H, D] in the dtype of `query`.

    query:        [B, H, D], one token of each of B sequences
    caches:       [blocks, size, Hkv, D] for the layout "NHD", [blocks, Hkv, size, D] for "HND"; query head h reads
                  key head h // (H / Hkv). In the dtype of `query`, or int8 or float8 with scales
    block_table:  [B, most blocks], integers: key n of sequence b is key n % size of block `block_table[b, n // size]`
    context_lens: [B], integers: how many keys each sequence has. What lies beyond is not read; without keys the result
                  is 0
    scale:        1 / √D by default
    k_scale, v_scale: what codes are multiplied with, [] or [Hkv]

    On a CUDA device this is compiled as torch.compile with this backend would; called within a compiled function it is
    part of that. Raises ValueError where shapes do not fit each other.
    """
    _check(query, key_cache, value_cache, block_table, context_lens, layout, (k_scale, v_scale))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    run = _compiled() if query.is_cuda and not torch.compiler.is_compiling() else _gathered
    return run(query, key_cache, value_cache, block_table, context_lens, scale, layout == "HND", k_scale, v_scale)


def _check(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, layout: str,
    scales: tuple[Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    if layout not in ("NHD", "HND"):
        raise ValueError(f'layout is "NHD" or "HND", not {layout!r}')
    if query.dim() != 3 or keys.dim() != 4 or keys.shape != values.shape:
        raise ValueError(
            "query is [batch, heads, dim] and both caches have four dimensions; these are "
            f"{tuple(query.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    heads = keys.shape[2 if layout == "NHD" else 1]
    if query.shape[1] % heads or query.shape[2] != keys.shape[3]:
        raise ValueError(
            f"query {tuple(query.shape)} does not fit {heads} key heads of width {keys.shape[3]} "
            f"(layout {layout}, cache {tuple(keys.shape)})"
        )
    if table.dim() != 2 or lengths.dim() != 1 or not query.shape[0] == table.shape[0] == lengths.shape[0]:
        raise ValueError(
            f"block_table is [batch, blocks] and context_lens [batch] for the batch of {query.shape[0]}; these are "
            f"{tuple(table.shape)} and {tuple(lengths.shape)}"
        )
    if table.dtype not in (torch.int32, torch.int64) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"block_table and context_lens are int32 or int64, not {table.dtype} and {lengths.dtype}")
    for cache, scale in zip((keys, values), scales, strict=True):
        if scale is None and cache.dtype != query.dtype:
            raise ValueError(f"a cache in {cache.dtype} beside queries in {query.dtype} needs k_scale and v_scale")
        if scale is not None and tuple(scale.shape) not in ((), (1,), (heads,)):
            raise ValueError(f"a scale is one number or one per key head ({heads}), not {tuple(scale.shape)}")


def _gathered(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, context_lens: Tensor, scale: float,
    heads_first: bool, k_scale: Tensor | None, v_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The blocks of each sequence put one after another; what a cache holds beyond a length may be anything."""
    size, heads = (key_cache.shape[d] for d in ((2, 1) if heads_first else (1, 2)))
    keys = block_table.shape[1] * size
    visible = torch.arange(keys, device=query.device) < context_lens[:, None]

    def gather(cache: Tensor, factor: Tensor | None) -> Tensor:
        blocks = cache[block_table]
        held = blocks.transpose(1, 2).flatten(2, 3) if heads_first else blocks.flatten(1, 2).transpose(1, 2)
        if factor is not None:
            held = held.to(query.dtype) * factor.to(query.dtype).reshape(-1, 1, 1)
        held = held.masked_fill(~visible[:, None, :, None], 0.0)
        return held[:, :, None].expand(-1, -1, query.shape[1] // heads, -1, -1).flatten(1, 2)

    k, v = gather(key_cache, k_scale), gather(value_cache, v_scale)
    scores = query[:, :, None] @ k.transpose(2, 3) * scale
    scores = scores.masked_fill(~visible[:, None, None, :], float("-inf"))
    wide = torch.promote_types(query.dtype, torch.float32)
    hidden = (scores == float("-inf")).all(-1, keepdim=True)
    weights = torch.where(hidden, 0.0, torch.softmax(scores, -1, dtype=wide)).to(query.dtype)
    return (weights @ v)[:, :, 0]


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    from ..backend import fusion_compiler

    return torch.compile(_gathered, backend=fusion_compiler)
