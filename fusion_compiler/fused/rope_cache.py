"""What stands before an attention with a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .matmul import RowNorm


@dataclass(frozen=True)
class CacheStep:
    """An operation on new rows of a cache, the result of which is rounded to `dtype`: with a `number`, or a product or
    quotient with the scale where there is none. In half precision a scale of no dimensions is rounded first."""

    function: Literal["mul", "div", "add", "round", "clamp_min", "clamp_max", "cast"]
    dtype: torch.dtype
    number: float | None = None

    @property
    def scales(self) -> bool:
        """Whether it takes the scale."""
        return self.function in ("mul", "div") and self.number is None


@dataclass(frozen=True)
class CacheCodes:
    """How rows become the codes that both caches hold: the products of the rotation and their sum are rounded to
    `product`, and what is `turned` to its dtype; then come the steps of `keys`, and to what is read those of `values`.
    The last one is the cast to codes."""

    product: torch.dtype
    turned: torch.dtype
    keys: tuple[CacheStep, ...]
    values: tuple[CacheStep, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[-1].dtype

    @property
    def scales(self) -> tuple[str, ...]:
        """The names of the scales that there are."""
        sides = (("key_scale", self.keys), ("value_scale", self.values))
        return tuple(name for name, steps in sides if any(step.scales for step in steps))


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
    those of "sequences", [B] or [B, L]], [norm weight of q], [norm weight of k], [scale of keys], [scale of values].
    The scales are one for each head at most, [B or 1, Hkv or 1, 1, 1] or with fewer axes, as [B, 1, Hkv, 1] where
    `tokens_first` names "key_scale" or "value_scale". `results` names the site's outputs in their order: "out", "keys",
    "values". `dtype` is that of the turned queries, and of the caches where they hold no `codes`.
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
    codes: CacheCodes | None = None
