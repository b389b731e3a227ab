"""What stands before an attention with a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .matmul import RowNorm


@dataclass(frozen=True)
class RopeCache:
    """What stands before an attention with a static cache: q and k turned, k and v written where they belong.

    q [B, H, L, D], k [B, Hkv, L, D], v [B, Hkv, L, Dv], the caches [B, Hkv, S, D] and [B, Hkv, S, Dv]; "out" are the
    turned queries. What of "q", "k", "v" and "out" `tokens_first` names stands as [B, L, heads, D]; cos and sin
    broadcast to the shape of q, as [B, L, heads, D] where it names "angles", or to half of its last axis. The halves
    (a, b) of D, or its even and odd elements where `interleaved`, become (a·cos − b·sin, b·cos + a·sin), after a norm
    of each head where there is one; of the first `rotary` elements of D, where that is not 0, and the others stay as
    they are.

    Token t goes to position `offset` + t where `index` is "none", further by what is read where it is "scalar" (one
    integer on the device) or "size" (a symbolic number), or to the t-th of the "indices"; "sequences" have indices of
    their own.

    Operands of a site, in this order: q, k, v, cos, sin, key cache, value cache, [the scalar, the size, indices [L], or
    those of "sequences", [B] or [B, L]], [norm weight of q], [norm weight of k]. `results` names the site's outputs in
    their order: "out", "keys", "values".
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    cache_length: int
    head_dim: int
    v_dim: int
    results: tuple[str, ...]
    dtype: torch.dtype
    interleaved: bool = False
    tokens_first: frozenset[str] = frozenset()
    index: str = "scalar"
    offset: int = 0
    rotary: int = 0
    q_norm: RowNorm | None = None
    k_norm: RowNorm | None = None
