"""Random attentions through the generated flash kernel in Triton's interpreter: masks, what is added, caps, lengths,
groups of heads, widths, dtypes and tiles, against float64. With `max_examples` in the thousands it looks for bugs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention_properties import QUICK
from test_flash import check, find_attention, heads, traced
from torch import Tensor

from fusion_compiler.candidates import Unavailable
from fusion_compiler.lowering.triton_codegen import flash
from fusion_compiler.lowering.triton_codegen.flash.plan import Plan
from fusion_compiler.machine import machine

Positions = Callable[..., Tensor]

# of query and key, with a number of either sign and one above 0
SEEN: list[Callable[[Tensor, Tensor, int, int], Tensor]] = [
    lambda q, k, at, n: k == k,
    lambda q, k, at, n: k <= q,
    lambda q, k, at, n: k <= q + at,
    lambda q, k, at, n: (k <= q + at) & (k > q + at - n),
    lambda q, k, at, n: (k - q).abs() < n,
    lambda q, k, at, n: (k <= q) & (k // n == q // n),
    lambda q, k, at, n: (k <= q) | (k < n),
    lambda q, k, at, n: k < n,
    lambda q, k, at, n: (k <= q) & ((q - k) % (n + 1) != 1),
    lambda q, k, at, n: k != q + at,
    lambda q, k, at, n: (k - q) * (k - q) < n * n + 3,
    lambda q, k, at, n: (k * q) % 5 < 4,
]
# of query, key, a number, and one number for each head
ADDED: list[Callable[[Tensor, Tensor, int, Tensor], Tensor]] = [
    lambda q, k, at, s: torch.zeros(()),
    lambda q, k, at, s: s * (k - q),
    lambda q, k, at, s: s * (k + at),
    lambda q, k, at, s: s * (2 * k - 3 * q + at) - 0.5 * q,
    lambda q, k, at, s: 0.3 * (k - q) + 0.0 * s,
    lambda q, k, at, s: -s * (k - q).abs(),
    lambda q, k, at, s: -0.01 * s * (k - q) ** 2,
    lambda q, k, at, s: s * k - s.flip(0) * q + 0.2 * k,
]
HIDES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda s, seen: s.masked_fill(~seen, -math.inf),
    lambda s, seen: s.masked_fill(~seen, -60000.0 if s.dtype == torch.float16 else torch.finfo(torch.float32).min),
    lambda s, seen: s + torch.where(seen, 0.0, -math.inf).to(s.dtype),
    lambda s, seen: torch.where(seen, s, -math.inf),
]
# a second mask, of keys of which nothing is known: none, filled in, added, and added as a product
PADDINGS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda s, kept: s,
    lambda s, kept: s.masked_fill(kept == 0, -math.inf),
    lambda s, kept: s + torch.zeros_like(kept).masked_fill(kept == 0, torch.finfo(kept.dtype).min),
    lambda s, kept: s + (1.0 - kept) * torch.finfo(kept.dtype).min,
]
SOFTMAXES: list[Callable[[Tensor], Tensor]] = [
    lambda s: s.softmax(-1),
    lambda s: s.softmax(-1, dtype=torch.promote_types(s.dtype, torch.float32)),
    lambda s: (e := torch.exp(s - s.amax(-1, keepdim=True))) / e.sum(-1, keepdim=True),
]


@settings(QUICK, max_examples=15)
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 3), group=st.integers(1, 3),
    width=st.sampled_from([8, 16, 24, 32]), dtype=st.sampled_from([torch.float32, torch.float16]),
    lengths=st.tuples(st.sampled_from([16, 17, 33, 52]), st.sampled_from([0, 0, 3, 16, 33, 70])), narrow=st.booleans(),
    seen=st.sampled_from(SEEN), added=st.just(ADDED[0]) | st.sampled_from(ADDED), hide=st.sampled_from(HIDES),
    softmax=st.sampled_from(SOFTMAXES), cap=st.sampled_from([None, None, 2.0, 30.0]), at=st.integers(-20, 20),
    n=st.integers(1, 40), scale=st.sampled_from([0.25, 1.0, -0.5]),
    padding=st.sampled_from(PADDINGS), padding_first=st.booleans(),
    tile=st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 32]), st.booleans(), st.booleans()),
)  # fmt: skip
def test_numbers(
    batch: int, kv_heads: int, group: int, width: int, lengths: tuple[int, int], narrow: bool, seen: Positions,
    added: Positions, hide: Positions, softmax: Positions, cap: float | None, at: int, n: int, scale: float,
    dtype: torch.dtype, tile: tuple[int, int, bool, bool], padding: Positions, padding_first: bool,
) -> None:  # fmt: skip
    def attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, kept: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        s = q @ k.mT * scale
        s = torch.tanh(s / cap) * cap if cap is not None else s
        rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        s = s + added(rows, keys, at, slopes[:, None, None]).to(s.dtype)
        kept = kept.to(s.dtype)[:, None, None]
        s = padding(s, kept) if padding_first else s
        s = hide(s, seen(rows, keys, at, n))
        return softmax(s if padding_first else padding(s, kept)).to(v.dtype) @ v

    if cap is not None and dtype == torch.float32:
        cap = 2.0  # a cap is taken from 2 · cap, whose rounding grows with it; products by TF32 round more on a device
    length, keys = lengths[0], lengths[1] or lengths[0]
    args = (*heads(batch, kv_heads * group, kv_heads, length, keys, width, 16 if narrow else width, dtype=dtype),)
    more = torch.rand(kv_heads * group), (torch.rand(batch, keys) < 0.7).float()
    matches, _ = find_attention(traced(attention, *args, *more))
    if not matches or isinstance(flash.candidates(matches[0].op, machine("h200")), Unavailable):
        return  # as what is added is seen by nobody, or the queries are few
    native = tile[3] and cap is not None and dtype == torch.float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tl, "inline_asm_elementwise", lambda asm, how, args, *_: 1.0 - 2.0 / (1.0 + tl.exp(2.0 * args[0]))
        )
        check(attention, *args, *more, plan=Plan(tile[0], tile[1], 4, 2, tile[2] and width != 24, native=native))
