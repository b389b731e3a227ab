"""What `benchmarks.attention` measures: attention as models spell it, the same told to FlexAttention, and the cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import harness


def masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of later keys are filled with -inf."""
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def repeat_kv(x: Tensor, times: int) -> Tensor:
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)


def additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers' eager_attention_forward: repeated keys and values, and a mask of the dtype's least number added."""
    times = q.shape[1] // k.shape[1]
    if times > 1:
        k, v = repeat_kv(k, times), repeat_kv(v, times)
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    rows = torch.arange(q.shape[-2], device=q.device)[None, None, :, None]
    columns = torch.arange(k.shape[-2], device=q.device)[None, None, None, :]
    least = torch.finfo(q.dtype).min
    scores = scores + torch.where(columns <= rows, q.new_zeros(()), least)
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def gpt2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores divided by a tensor, and the least number put in by `where` behind a slice of a square of truths."""
    own, length = {"dtype": q.dtype, "device": q.device}, k.shape[-2]
    scores = torch.matmul(q, k.transpose(-1, -2)) / torch.full([], k.shape[-1] ** 0.5, **own)
    square = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().view(1, 1, length, length)
    least = torch.full([], torch.finfo(q.dtype).min, **own)
    scores = torch.where(square[:, :, length - q.shape[-2] : length, :length], scores, least)
    return torch.matmul(F.softmax(scores, dim=-1).type(v.dtype), v)


def bloom(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch and heads as one axis, and a product that adds to what is there."""
    batch, heads, length, width = q.shape
    q, k, v = (t.reshape(batch * heads, length, -1) for t in (q, k, v))
    scores = torch.baddbmm(q.new_zeros(1, 1, length), q, k.transpose(1, 2), beta=1.0, alpha=width**-0.5)
    hidden = torch.arange(length, device=q.device)[:, None] < torch.arange(length, device=q.device)
    scores = scores.view(batch, heads, length, length).masked_fill(hidden, torch.finfo(q.dtype).min)
    p = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(p.view(batch * heads, length, length), v).view(batch, heads, length, -1)


def opt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries scaled beforehand, a mask of the least number added, and what falls below the least number put back."""
    batch, heads, length, width = q.shape
    q, k, v = ((t * width**-0.5 if t is q else t).reshape(batch * heads, length, -1) for t in (q, k, v))
    least = torch.finfo(q.dtype).min
    positions = torch.arange(length, device=q.device)
    mask = torch.full((length, length), least, dtype=q.dtype, device=q.device)
    mask = mask.masked_fill(positions < (positions + 1).view(-1, 1), 0.0)
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, length, length) + mask
    scores = torch.max(scores, torch.full([], least, dtype=q.dtype, device=q.device)).view(-1, length, length)
    return torch.bmm(F.softmax(scores, dim=-1), v).view(batch, heads, length, -1)


def scored(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled scores with repeated keys, and the positions of queries and keys."""
    k = repeat_kv(k, q.shape[1] // k.shape[1])
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    return scores, torch.arange(q.shape[-2], device=q.device)[:, None], torch.arange(k.shape[-2], device=q.device)[None]


def weighted(scores: Tensor, seen: Tensor | None, v: Tensor) -> Tensor:
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    p = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    return torch.matmul(p, repeat_kv(v, scores.shape[1] // v.shape[1]))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weighted(scored(q, k)[0], None, v)


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores, rows, keys = scored(q, k)
    return weighted(torch.tanh(scores / CAP) * CAP, keys <= rows, v)


def slopes(heads: int, device: torch.device) -> Tensor:
    return torch.exp2(-8.0 / heads * torch.arange(1, heads + 1, device=device))


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores, rows, keys = scored(q, k)
    bias = slopes(q.shape[1], q.device)[:, None, None] * (keys - rows)
    return weighted(scores + bias.to(scores.dtype), keys <= rows, v)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores, rows, keys = scored(q, k)
    return weighted(scores, (keys <= rows) & (keys > rows - WINDOW), v)


def gemma2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A cap and a window at once."""
    scores, rows, keys = scored(q, k)
    return weighted(torch.tanh(scores / CAP) * CAP, (keys <= rows) & (keys > rows - WINDOW), v)


def sinks(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """GPT-OSS: a window, and one more score for each head that no value belongs to."""
    scores, rows, keys = scored(q, k)
    seen = (keys <= rows) & (keys > rows - NARROW)
    scores = scores + torch.where(seen, q.new_zeros(()), torch.finfo(q.dtype).min)
    beside = sink.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    joined = torch.cat([scores, beside], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    p = F.softmax(joined, dim=-1, dtype=joined.dtype)[..., :-1]
    return torch.matmul(p, repeat_kv(v, q.shape[1] // v.shape[1]))


def bucket(distance: Tensor) -> Tensor:
    """T5's bucket of a relative position, of 32: half for each sign, near ones exact, far ones by logarithm."""
    far = distance.abs()
    exact, most = 8, 128
    coarse = exact + (torch.log(far.float() / exact) / math.log(most / exact) * exact).long()
    return (distance > 0).long() * 16 + torch.where(far < exact, far, coarse.clamp(max=15))


def t5(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Scores that are not scaled, with a bias learnt for each bucket and head."""
    rows, keys = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    bias = F.embedding(bucket(keys - rows), table).permute(2, 0, 1)[None]
    return torch.matmul(F.softmax((q @ k.transpose(3, 2) + bias).float(), dim=-1).type_as(v), v)


def documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    scores, rows, keys = scored(q, k)
    return weighted(scores, (ids[:, None, :, None] == ids[:, None, None, :]) & (keys <= rows), v)


CAP, WINDOW, NARROW, DOCUMENT = 50.0, 1024, 128, 1024
CAUSAL = (additive, masked_fill, gpt2, bloom, opt)
SCORED = (plain, softcap, alibi, window, gemma2, sinks, documents)  # with grouped heads too


def flex(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention with the modification of the case; its lists of blocks are made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    name, per_head = case.spelling.__name__, slopes(case.heads, device)
    ids = case.ids(device)[0] if case.spelling is documents else None
    reach = {"window": WINDOW, "gemma2": WINDOW, "sinks": NARROW}.get(name)
    seen: dict[str, Callable[..., Any]] = dict.fromkeys(
        ("window", "gemma2", "sinks"), lambda b, h, q, k: (k <= q) & (k > q - reach)
    )
    seen["documents"] = lambda b, h, q, k: (k <= q) & (ids[q] == ids[k])
    capped = lambda s, b, h, q, k: CAP * torch.tanh(s / CAP)  # noqa: E731
    scores: dict[str, Callable[..., Any]] = {
        "softcap": capped,
        "gemma2": capped,
        "alibi": lambda s, b, h, q, k: s + per_head[h] * (k - q),
    }
    n = case.length
    mask = seen.get(name, lambda b, h, q, k: k <= q)
    blocks = None if case.spelling in (plain, t5) else create_block_mask(mask, None, None, n, n, device=device)
    grouped = case.heads != case.kv_heads

    def call(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        modify, scale = scores.get(name), None
        if name == "t5":
            modify, scale = lambda s, b, h, q, k: s + more[0][bucket(k - q), h], 1.0
        out, total = flex_attention(
            q, k, v, score_mod=modify, block_mask=blocks, scale=scale, enable_gqa=grouped, return_lse=True
        )
        return out * torch.sigmoid(total - more[0][:, None])[..., None].to(out.dtype) if name == "sinks" else out

    compiled: Callable[..., Tensor] = torch.compile(call, dynamic=False)
    return compiled


@dataclass(frozen=True)
class Case:
    spelling: Callable[..., Tensor]
    batch: int
    heads: int
    kv_heads: int
    length: int
    width: int
    dtype: torch.dtype
    v_width: int = 0  # that of the values, if it is another

    @property
    def name(self) -> str:
        width = f"{self.width}/{self.v_width}" if self.v_width else f"{self.width}"
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        spelling = "" if self.spelling is additive else f" {self.spelling.__name__}"
        return f"B{self.batch} H{heads} S{self.length} D{width} {str(self.dtype).removeprefix('torch.')}{spelling}"

    def ids(self, device: torch.device) -> Tensor:
        """Documents of DOCUMENT tokens each, one after the other; the same in every batch entry."""
        return (torch.arange(self.length, device=device) // DOCUMENT).expand(self.batch, -1).contiguous()

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        shapes = ((h, self.length, d) for h, d in zip(self.of_heads, self.widths, strict=True))
        q, k, v = (torch.randn(self.batch, *shape, device=device, dtype=self.dtype) for shape in shapes)
        more: dict[Any, Callable[[], Tensor]] = {
            documents: lambda: self.ids(device),
            sinks: lambda: torch.randn(self.heads, device=device, dtype=self.dtype),
            t5: lambda: torch.randn(32, self.heads, device=device, dtype=self.dtype),
        }
        if self.spelling is t5:
            q = q * self.width**-0.5  # as T5's weights have it
        return (q, k, v, more[self.spelling]()) if self.spelling in more else (q, k, v)

    @property
    def is_full(self) -> bool:
        """Whether it is plain or causal attention, which kernels of vendors compute too."""
        return self.spelling in (*CAUSAL, plain)

    @property
    def of_heads(self) -> tuple[int, int, int]:
        return self.heads, self.kv_heads, self.kv_heads

    @property
    def widths(self) -> tuple[int, int, int]:
        return self.width, self.width, self.v_width or self.width

    def keys(self) -> float:
        """Mean number of keys that a query sees."""
        if self.spelling in (plain, t5):
            return self.length
        reach = {window: WINDOW, gemma2: WINDOW, sinks: NARROW, documents: DOCUMENT}.get(self.spelling, self.length)
        reach = min(reach, self.length)
        return reach / 2 if self.spelling is documents else reach - reach**2 / (2 * self.length)

    @property
    def scores_bytes(self) -> int:
        return 4 * self.batch * self.heads * self.length**2

    def floor(self) -> float:
        """Every input read and the output written once; what is masked out needs no work."""
        rows = self.heads * (self.width + self.widths[2]) + self.kv_heads * (self.width + self.widths[2])
        moved = self.batch * self.length * rows * self.dtype.itemsize
        flops = 2 * self.batch * self.heads * self.length * self.keys() * (self.width + self.widths[2])
        return harness.floor_seconds(moved, flops, self.dtype)


LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SIZES = ((16, 64), (32, 64), (32, 128))  # heads and their width
BF16, FP32 = torch.bfloat16, torch.float32
GPU_CASES = (
    Case(masked_fill, 4, 32, 32, 1024, 128, BF16),
    Case(additive, 4, 32, 32, 1024, 128, BF16),
    Case(masked_fill, 4, 32, 32, 2048, 128, BF16),
    Case(additive, 4, 32, 32, 2048, 128, BF16),
    *(Case(s, 4, 32, 32, length, 128, BF16) for length in (1024, 2048) for s in (gpt2, bloom, opt)),
    Case(additive, 1, 32, 8, 8192, 128, BF16),
    *(Case(additive, max(1, 8192 // n), h, h, n, d, BF16) for h, d in SIZES for n in LENGTHS),
    Case(plain, 16, 16, 16, 512, 64, BF16),
    Case(plain, 8, 32, 32, 1024, 64, BF16),
    Case(plain, 4, 32, 32, 1024, 128, BF16),
    *(Case(s, 4, 32, 32, 2048, 128, BF16) for s in (plain, softcap, alibi, documents, window)),
    Case(plain, 1, 32, 8, 8192, 128, BF16),
    # what models do
    Case(gemma2, 1, 16, 8, 8192, 256, BF16),
    Case(sinks, 1, 64, 8, 8192, 64, BF16),
    Case(t5, 8, 16, 16, 1024, 64, BF16),
    Case(additive, 1, 32, 32, 4096, 192, BF16, 128),
    *(Case(gemma2, 4, 16, 16, 2048, d, BF16) for d in (32, 64, 80, 96, 192, 256)),
    # what is done to the scores, over the length
    *(Case(s, 1, 32, 8, length, 128, BF16) for length in LENGTHS for s in (softcap, alibi, window, documents)),
)
CPU_CASES = tuple(Case(additive, 1, 8, 2, length, 64, dtype) for length in (512, 2048) for dtype in (FP32, BF16))
TINY_CASES = (Case(masked_fill, 1, 2, 2, 64, 16, FP32), Case(additive, 1, 4, 2, 64, 16, FP32)) + tuple(
    Case(s, 1, 4, 2 if s in SCORED else 4, 64, 16, FP32)
    for s in (plain, gpt2, bloom, opt, softcap, alibi, window, documents, gemma2, sinks, t5)
)
