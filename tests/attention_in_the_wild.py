"""Attention as it stands in real code, each with what it is to be recognised as, or the sentence that says why not.

`WILD[name]` has a function, its inputs for a dtype, and either fields of `Attention` and its `Mask` or part of a
sentence. Sizes tell the axes apart: batch 3, heads 4, length 24, width 16.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, H, L, D = 3, 4, 24, 16
DYNAMIC = (B, L, B * H)  # sizes that are marked dynamic where they are

Inputs = Callable[[torch.dtype], tuple[Any, ...]]


@dataclass(frozen=True)
class Written:
    """`expected`: fields of the op (`heads`, `softcap`, …) and of its mask, or None where `sentence` is expected."""

    function: Callable[..., Any]
    inputs: Inputs
    expected: dict[str, Any] | None
    sentence: str = ""


WILD: dict[str, Written] = {}


def written(inputs: Inputs, sentence: str = "", **expected: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        expectation = None if sentence else {"kind": "none", "heads": H, "kv_heads": H, **expected}
        WILD[function.__name__] = Written(function, inputs, expectation, sentence)
        return function

    return add


def heads(kv_heads: int = H, *more: Callable[[torch.dtype], Any]) -> Inputs:
    """q, k, v [B, H, L, D] and further tensors."""
    shapes = ((B, H, L, D), (B, kv_heads, L, D), (B, kv_heads, L, D))
    return lambda dtype: (*(torch.randn(s, dtype=dtype) for s in shapes), *(m(dtype) for m in more))


def rows_first(kv_heads: int = H) -> Inputs:
    """q, k, v [B, L, H, D]."""
    shapes = ((B, L, H, D), (B, L, kv_heads, D), (B, L, kv_heads, D))
    return lambda dtype: tuple(torch.randn(s, dtype=dtype) for s in shapes)


def of(*shapes: tuple[int, ...]) -> Inputs:
    return lambda dtype: tuple(torch.randn(s, dtype=dtype) for s in shapes)


def floats(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.randn(shape, dtype=dtype)


def exactly(value: Tensor) -> Callable[[torch.dtype], Tensor]:
    return lambda _: value.clone()


def below(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def scaled(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * q.shape[-1] ** -0.5


LENGTHS = torch.tensor([5, 9, 24])
NOT_PADDED = torch.arange(L)[None] < LENGTHS[:, None]

# ---- einsum, layouts, folded heads ---------------------------------------------------------------


@written(rows_first())
def einsum_of_rows_first(q, k, v):
    p = (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


@written(rows_first(), kind="causal")
def einsum_with_other_letters(q, k, v):
    dots = torch.einsum("bihd,bjhd->bhij", q * q.shape[-1] ** -0.5, k)
    dots = dots.masked_fill(~below(q.shape[1]), -torch.finfo(dots.dtype).max)
    return torch.einsum("bhij,bjhd->bihd", dots.softmax(-1), v)


@written(heads(2), kv_heads=2)
def einsum_of_groups(q, k, v):
    b, h, n, d = q.shape
    grouped = q.view(b, k.shape[1], -1, n, d)
    p = (torch.einsum("bgrqd,bgkd->bgrqk", grouped, k) * d**-0.5).softmax(-1)
    return torch.einsum("bgrqk,bgkd->bgrqd", p, v).reshape(b, h, n, d)


@written(rows_first(2), kind="causal", kv_heads=2)
def einsum_of_groups_rows_first(q, k, v):
    b, n, h, d = q.shape
    grouped = q.view(b, n, k.shape[2], -1, d)
    p = (torch.einsum("bqgrd,bkgd->bgrqk", grouped, k) * d**-0.5).masked_fill(~below(n), -math.inf).softmax(-1)
    return torch.einsum("bgrqk,bkgd->bqgrd", p, v).reshape(b, n, h * d)


@written(heads(2), kv_heads=2)
def einsum_of_tiled_groups(q, k, v):
    b, h, n, d = q.shape
    p = (torch.einsum("brgqd,bgkd->brgqk", q.view(b, -1, k.shape[1], n, d), k) * d**-0.5).softmax(-1)
    return torch.einsum("brgqk,bgkd->brgqd", p, v).reshape(b, h, n, d)


@written(heads(1), kind="causal", kv_heads=1)
def one_key_head_with_heads_in_the_rows(q, k, v):
    b, h, n, d = q.shape
    rows = q.transpose(1, 2).reshape(b, n * h, d)
    s = (rows @ k[:, 0].transpose(1, 2) * d**-0.5).view(b, n, h, n)
    p = torch.where(below(n)[:, None], s, torch.finfo(s.dtype).min).softmax(-1)
    return (p.view(b, n * h, n) @ v[:, 0]).view(b, n, h, d)


@written(of((B * H, L, D), (B * H, L, D), (B * H, L, D)), heads=B * H, kv_heads=B * H)
def folded_with_baddbmm(q, k, v):
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    return torch.bmm(torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5).softmax(-1), v)


@written(of((L, D), (L, D), (L, D)), kind="causal", heads=1, kv_heads=1)
def one_head(q, k, v):
    s = q @ k.T * q.shape[-1] ** -0.5
    return s.masked_fill(torch.tril(torch.ones_like(s)) == 0, -math.inf).softmax(-1) @ v


@written(of((B, L, D), (B, L, D), (B, L, D)), kind="causal", heads=B, kv_heads=B)
def one_head_of_a_batch(q, k, v):
    s = q @ k.transpose(-2, -1) * D**-0.5
    return s.masked_fill(~below(q.shape[1]), -math.inf).softmax(-1) @ v


@written(of((B, L, 3 * H * D)))
def packed_and_permuted(x):
    q, k, v = x.reshape(x.shape[0], x.shape[1], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    return (torch.softmax(q * D**-0.5 @ k.transpose(-2, -1), -1) @ v).transpose(1, 2).flatten(2)


@written(of((B, L, H * 3 * D)), kind="causal")
def packed_by_head(x):
    q, k, v = x.view(x.shape[0], x.shape[1], H, 3 * D).transpose(1, 2).chunk(3, -1)
    return (scaled(q, k).masked_fill(~below(x.shape[1]), -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


@written(of((B, 7, H * D), (B, L, H * D), (B, L, H * D)), q_len=7)
def cross_attention_unflattened(q, k, v):
    q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in (q, k, v))
    return (scaled(q, k).softmax(-1) @ v).transpose(1, 2).flatten(-2)


@written(of((B, D, 4, 6), (B, D, 4, 6), (B, D, 4, 6)), heads=B, kv_heads=B, q_len=24)
def pixels_of_an_image(q, k, v):
    b, c, h, w = q.shape
    p = torch.bmm(q.reshape(b, c, h * w).permute(0, 2, 1), k.reshape(b, c, h * w)).mul(c**-0.5).softmax(dim=2)
    return torch.bmm(v.reshape(b, c, h * w), p.permute(0, 2, 1)).reshape(b, c, h, w)


@written(of((B, 3 * H * D, L)), heads=B * H, kv_heads=B * H)
def channels_first_with_split_roots(x):
    q, k, v = x.reshape(-1, 3 * D, x.shape[-1]).split(D, 1)
    root = 1 / math.sqrt(math.sqrt(D))
    p = torch.einsum("bct,bcs->bts", q * root, k * root).float().softmax(-1).type(x.dtype)
    return torch.einsum("bts,bcs->bct", p, v).reshape(x.shape[0], -1, x.shape[-1])


@written(heads())
def mapped_over_batch_and_heads(q, k, v):
    return torch.vmap(torch.vmap(lambda q, k, v: torch.softmax(q @ k.T * D**-0.5, -1) @ v))(q, k, v)


@written(heads(2), kind="causal", kv_heads=2)
def stacked_repeats(q, k, v):
    k, v = (torch.stack([t, t], 2).flatten(1, 2) for t in (k, v))
    return scaled(q, k).masked_fill(~below(q.shape[2]), -math.inf).softmax(-1) @ v


@written(heads(2), kind="causal", kv_heads=2)
def joined_repeats(q, k, v):
    k, v = (torch.cat([t, t], 1) for t in (k, v))
    return scaled(q, k).masked_fill(~below(q.shape[2]), -math.inf).softmax(-1) @ v


# ---- scales and softmaxes ------------------------------------------------------------------------
@written(heads())
def scale_of_a_constant_tensor(q, k, v):
    return torch.softmax(q @ k.mT / torch.full([], k.shape[-1] ** 0.5, dtype=k.dtype), -1) @ v


@written(heads(H, floats()), scale_operand=True)
def temperature(q, k, v, t):
    return torch.softmax(q @ k.mT * t, -1) @ v


@written(heads(H, floats(1)), scale_operand=True, scale_divides=True)
def divided_by_a_temperature(q, k, v, t):
    return torch.softmax(q @ k.mT / t.exp(), -1) @ v


@written(heads(H, floats(H, 1, 1)), kind="causal", scale_operand=True)
def scale_by_head(q, k, v, scale):
    s = q @ k.mT * scale.clamp(max=math.log(100.0)).exp()
    return s.masked_fill(~below(q.shape[2]), -math.inf).softmax(-1) @ v


@written(heads(2, floats(B, 1, L, 1)), kv_heads=2, scale_operand=True, scale_divides=True)
def divided_by_a_number_of_the_row(q, k, v, t):
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    return (q @ k.mT / (1 + t.abs())).softmax(-1) @ v


@written(rows_first(), scale_operand=True)
def scale_by_position(q, k, v):
    t = torch.log(torch.arange(1, q.shape[1] + 1)).to(q.dtype) + 1
    return torch.einsum("bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", q, k) * t[:, None]).softmax(-1), v)


@written(heads(), kind="causal", scale=1.0)
def normalised_queries_and_keys(q, k, v):
    q, k = (F.rms_norm(t, (t.shape[-1],)) for t in (q, k))
    return (q @ k.mT).masked_fill(~below(q.shape[2]), -math.inf).softmax(-1) @ v


@written(of((B, H, L, 40), (B, H, L, 40), (B, H, L, D)), kind="causal", head_dim=40, v_dim=16)
def values_of_another_width(q, k, v):
    return scaled(q, k).masked_fill(~below(q.shape[2]), -math.inf).softmax(-1) @ v


@written(heads(), kind="causal", softcap=30.0)
def capped_scores(q, k, v):
    s = torch.tanh(scaled(q, k) / 30.0) * 30.0
    return (s + torch.full((q.shape[2],) * 2, -math.inf, dtype=q.dtype).triu(1)).softmax(-1) @ v


@written(heads())
def queries_and_keys_in_float(q, k, v):
    return torch.softmax(scaled(q.float(), k.float()), -1).to(v.dtype) @ v


# ---- masks ---------------------------------------------------------------------------------------
@written(heads(), kind="causal", window=5)
def window_of_a_band(q, k, v):
    band = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(0).triu(-4)
    return scaled(q, k).masked_fill(~band, -math.inf).softmax(-1) @ v


@written(heads(), kind="causal", window=5)
def window_of_two_masks(q, k, v):
    full = torch.full((q.shape[2], q.shape[2]), -math.inf, dtype=q.dtype)
    return (scaled(q, k) + full.triu(1) + full.tril(-5)).softmax(-1) @ v


@written(heads(), kind="causal", offset=3, window=7)
def window_on_both_sides(q, k, v):
    i = torch.arange(q.shape[2])
    return scaled(q, k).masked_fill((i[:, None] - i).abs() > 3, -math.inf).softmax(-1) @ v


@written(heads(), kind="causal", chunk=8)
def chunks(q, k, v):
    i = torch.arange(q.shape[2])
    seen = (i <= i[:, None]) & (i // 8 == i[:, None] // 8)
    return scaled(q, k).masked_fill(~seen, -math.inf).softmax(-1) @ v


@written(heads(H, exactly(LENGTHS)), kind="length", padding=0)
def padding_by_length(q, k, v, lengths):
    seen = torch.arange(k.shape[2])[None] < lengths[:, None]
    return scaled(q, k).masked_fill(~seen[:, None, None], -math.inf).softmax(-1) @ v


@written(heads(H, exactly(LENGTHS)), kind="causal", padding=0)
def padding_by_length_and_causal(q, k, v, lengths):
    seen = (torch.arange(k.shape[2])[None] < lengths[:, None])[:, None, None] & below(q.shape[2])
    return scaled(q, k).masked_fill(~seen, -math.inf).softmax(-1) @ v


@written(heads(H, exactly(NOT_PADDED)), kind="tensor", tensor="hidden", empty_rows="nan")
def padding_by_mask(q, k, v, seen):
    return scaled(q, k).masked_fill(~seen[:, None, None], -math.inf).softmax(-1) @ v


@written(heads(H, exactly(LENGTHS)), kind="tensor", tensor="visible", empty_rows="none")
def prefixes(q, k, v, lengths):
    i = torch.arange(q.shape[2])
    seen = (i <= i[:, None]) | (i[None, None] < lengths[:, None, None])
    return torch.where(seen[:, None], scaled(q, k), -math.inf).softmax(-1) @ v


@written(heads(H, exactly((torch.arange(L) // 7).expand(B, L))), kind="tensor", tensor="hidden", empty_rows="none")
def documents(q, k, v, document):
    seen = (document[:, :, None] == document[:, None]) & below(q.shape[2])
    return scaled(q, k).masked_fill(~seen[:, None], -math.inf).softmax(-1) @ v


@written(heads(), kind="tensor", tensor="none")
def hidden_too_weakly(q, k, v):
    return scaled(q, k).masked_fill(~below(q.shape[2]), -1e4).softmax(-1) @ v


@written(heads(H, exactly(torch.tril(torch.ones(1, 1, 64, 64, dtype=torch.bool)))), kind="tensor", tensor="visible")
def buffer_of_a_triangle(q, k, v, bias):
    n = q.shape[2]
    least = torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype)
    return torch.where(bias[:, :, :n, :n], scaled(q, k), least).softmax(-1) @ v


# ---- terms of the score --------------------------------------------------------------------------
@written(of((B * H, L, D), (B * H, L, D), (B * H, L, D), (B * H, 1, L)), kind="tensor", heads=B * H, kv_heads=B * H)
def slopes_of_bloom(q, k, v, alibi):
    n = q.shape[1]
    s = alibi.baddbmm(q, k.transpose(1, 2), beta=1.0, alpha=D**-0.5).view(-1, H, n, n)
    s = s + torch.full((n, n), torch.finfo(s.dtype).min, dtype=s.dtype).triu(1)
    return torch.bmm(torch.softmax(s, -1, dtype=torch.float32).to(v.dtype).view(-1, n, n), v)


@written(heads(), kind="tensor")
def slopes_of_mpt(q, k, v):
    n = q.shape[2]
    slopes = 2.0 ** (-8 * torch.arange(1, H + 1) / H)
    bias = (slopes[:, None, None] * torch.arange(1 - n, 1)).to(q.dtype)
    return (scaled(q, k) + bias).masked_fill(~below(n), torch.finfo(q.dtype).min).softmax(-1) @ v


@written(heads(H, floats(8, H)), kind="tensor", tensor="additive")
def bias_by_distance(q, k, v, table):
    i = torch.arange(q.shape[2])
    bias = F.embedding((i - i[:, None]).clamp(-4, 3) + 4, table).permute(2, 0, 1)[None]
    return torch.softmax(q @ k.mT + bias, -1) @ v


@written(heads(H, floats(H)), kind="tensor", tensor="additive")
def bias_by_head(q, k, v, bias):
    return torch.softmax(scaled(q, k) + bias[None, :, None, None], -1) @ v


@written(heads(H, floats(1, H, L, L)), kind="tensor", tensor="none")
def bias_and_mask(q, k, v, bias):
    return (scaled(q, k) + bias + torch.full((L, L), -math.inf, dtype=q.dtype).triu(1)).softmax(-1) @ v


# ---- torch's own ---------------------------------------------------------------------------------
@written(heads(2), "reads grouped heads already")
def sdpa_of_groups(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@written(heads(2), kind="causal", kv_heads=2)
def sdpa_of_repeats(q, k, v):
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@written(heads(), kind="causal", window=4)
def sdpa_with_a_window(q, k, v):
    i = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(i <= i[:, None]) & (i > i[:, None] - 4))


@written(of((B * H, L, D), (B * H, L, D), (B * H, L, D)), heads=B * H, kv_heads=B * H, scale=D**-0.5)
def sdpa_of_three_dimensions(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def multihead(**given: Any) -> Callable[[Tensor], Any]:
    module = nn.MultiheadAttention(H * D, H, batch_first=True).eval()
    modules = {t: copy.deepcopy(module).to(t) for t in (torch.float32, torch.float16, torch.bfloat16)}

    def function(x: Tensor) -> Any:
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return modules[x.dtype](x, x, x, attn_mask=hidden, **given)

    return function


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: function(x)[0]


WILD["module_without_weights"] = Written(
    alone(multihead(need_weights=False)), of((B, L, H * D)), {"kind": "causal", "heads": H, "kv_heads": H}
)
WILD["module_with_unread_weights"] = Written(
    alone(multihead()), of((B, L, H * D)), {"kind": "causal", "heads": H, "kv_heads": H}
)
WILD["module_with_weights"] = Written(multihead(), of((B, L, H * D)), None, "need_weights=False")
WILD["encoder_layer"] = Written(
    lambda x: ENCODER.to(x.dtype)(x), of((B, L, H * D)), None, "set_fastpath_enabled(False)"
)
ENCODER = nn.TransformerEncoderLayer(H * D, H, 32, batch_first=True).eval()


# ---- what is no attention, and says why ----------------------------------------------------------
@written(heads(), "runs over another axis")
def softmax_over_queries(q, k, v):
    return scaled(q, k).softmax(-2) @ v


@written(heads(), "also read by output")
def probabilities_returned(q, k, v):
    p = scaled(q, k).softmax(-1)
    return p @ v, p


@written(heads(), "joined along their last dimension")
def probabilities_used_twice(q, k, v):
    p = scaled(q, k).softmax(-1)
    return p @ v + p @ torch.sin(v)


@written(heads(), "model.eval()")
def dropout_active(q, k, v):
    return F.dropout(scaled(q, k).softmax(-1), 0.1, training=True) @ v


@written(heads(H, floats(H, 1, 1)), "can scale the result")
def heads_masked_out(q, k, v, kept):
    return (scaled(q, k).softmax(-1) * kept) @ v


@written(heads(H, floats(L)), "keys can be scaled before the product")
def scale_by_key(q, k, v, scale):
    return torch.softmax(q @ k.mT * scale, -1) @ v


@written(heads(H, floats(H)), kind="tensor", tensor="none")
def sinks(q, k, v, sink):
    s = torch.cat([scaled(q, k), sink.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)], -1)
    return (s - s.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


@written(heads(), "add_zero_attn")
def softmax_off_by_one(q, k, v):
    e = scaled(q, k).exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


@written(heads(), "flex_attention's score_mod")
def scores_rectified(q, k, v):
    return F.relu(scaled(q, k)).softmax(-1) @ v


@written(heads(H, floats(H, H)), "does not run over one axis")
def heads_that_talk(q, k, v, mix):
    return torch.einsum("bhqk,hg->bgqk", scaled(q, k), mix).softmax(-1) @ v


@written(heads(), "scores are written out anyway")
def only_the_largest_scores(q, k, v):
    s = scaled(q, k)
    return s.masked_fill(s < s.topk(4, -1).values[..., -1:], -math.inf).softmax(-1) @ v


@written(heads(), "no queries and keys are multiplied")
def linear_attention(q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)
