"""Spellings of norms, alone and behind a residual, and of softmax; and what looks like one and is none.

Each is a function of rows x [..., K] and of `Weights`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spelled_graphs import Function, K, Weights
from torch import Tensor


def _mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def rms_llama(x: Tensor, w: Weights) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w.g * h.to(x.dtype)


def _rms_gemma(x: Tensor, w: Weights) -> Tensor:
    h = x.float() * torch.rsqrt(_mean_square(x.float()) + 1e-6)
    return (h * (1.0 + w.g.float())).type_as(x)


def _rms_t5(x: Tensor, w: Weights) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    h = x * torch.rsqrt(variance + 1e-6)
    return w.g * h.to(w.g.dtype)


RMS: dict[str, Function] = {
    "F.rms_norm": lambda x, w: F.rms_norm(x, x.shape[-1:], w.g, eps=1e-6),
    "F.rms_norm, no weight": lambda x, w: F.rms_norm(x, x.shape[-1:], eps=1e-6),
    "F.rms_norm, default eps": lambda x, w: F.rms_norm(x, x.shape[-1:], w.g),
    "Llama": rms_llama,
    "Gemma (1 + w)": _rms_gemma,
    "T5": _rms_t5,
    "weight after the cast": lambda x, w: (x.float() * torch.rsqrt(_mean_square(x.float()) + 1e-6) * w.g).to(x.dtype),
    "no weight": lambda x, w: x * torch.rsqrt(_mean_square(x) + 1e-6),
    "x · x": lambda x, w: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w.g,
    "square": lambda x, w: w.g * (torch.rsqrt(1e-6 + torch.square(x).mean(-1, True)) * x),
    "1 / sqrt": lambda x, w: x * (1 / torch.sqrt(_mean_square(x) + 1e-6)) * w.g,
    "/ sqrt": lambda x, w: x / torch.sqrt(_mean_square(x) + 1e-6) * w.g,
    "** -0.5": lambda x, w: x * (_mean_square(x) + 1e-6) ** -0.5 * w.g,
    "sum / n": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) * w.g,
    "norm² / n": lambda x, w: x * torch.rsqrt(x.norm(dim=-1, keepdim=True) ** 2 / x.shape[-1] + 1e-6) * w.g,
    "(norm · n^-½)²": lambda x, w: (
        x / torch.sqrt((x.norm(2, dim=-1, keepdim=True) * x.shape[-1] ** -0.5) ** 2 + 1e-6) * w.g
    ),
    "√n · x / √(Σ + n·eps)": lambda x, w: (
        math.sqrt(x.shape[-1]) * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + x.shape[-1] * 1e-6) * w.g
    ),
    "weight first": lambda x, w: (x * w.g) * torch.rsqrt(_mean_square(x) + 1e-6),
    "unsqueezed": lambda x, w: x * torch.rsqrt((x * x).mean(-1) + 1e-6).unsqueeze(-1) * w.g,
    "Σ · 1/n": lambda x, w: x / torch.sqrt((x * x).sum(-1, True) * (1 / x.shape[-1]) + 1e-6) * w.g,
    "Σ by einsum": lambda x, w: (
        x * torch.rsqrt(torch.einsum("...i,...i->...", x, x)[..., None] / x.shape[-1] + 1e-6) * w.g
    ),
    "|x|²": lambda x, w: x * torch.rsqrt(x.abs().pow(2).mean(-1, True) + 1e-6) * w.g,
    "reciprocal of sqrt": lambda x, w: x * torch.reciprocal(torch.sqrt(_mean_square(x) + 1e-6)) * w.g,
    "scale first": lambda x, w: x * (w.g * torch.rsqrt(_mean_square(x) + 1e-6)),
    "eps in a tensor": lambda x, w: x * torch.rsqrt(_mean_square(x) + torch.full((1,), 1e-6, dtype=x.dtype)) * w.g,
    "weight expanded": lambda x, w: x * torch.rsqrt(_mean_square(x) + 1e-6) * w.g.expand_as(x),
    "(1 + w) behind the cast": lambda x, w: (
        (x.float() * torch.rsqrt(_mean_square(x.float()) + 1e-6)).to(x.dtype) * (1 + w.g)
    ),
    "n + n · w": lambda x, w: (n := x * torch.rsqrt(_mean_square(x) + 1e-6)) + n * w.g,
    "F.rms_norm, 1 + w": lambda x, w: F.rms_norm(x, x.shape[-1:], 1 + w.g, 1e-6),
    "over two axes": lambda x, w: F.rms_norm(
        x.unflatten(-1, (4, -1)), (4, x.shape[-1] // 4), w.g.unflatten(0, (4, -1)), 1e-6
    ).flatten(-2),
    "residual in front": lambda x, w: rms_llama(x + torch.tanh(x), w),
}
LAYER: dict[str, Function] = {
    "F.layer_norm": lambda x, w: F.layer_norm(x, x.shape[-1:], w.g, w.b),
    "no bias": lambda x, w: F.layer_norm(x, x.shape[-1:], w.g),
    "no weight (OLMo)": lambda x, w: F.layer_norm(x.float(), x.shape[-1:], eps=1e-5).to(x.dtype),
    "by hand": lambda x, w: (
        (c := x - x.mean(-1, keepdim=True)) / torch.sqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5) * w.g + w.b
    ),
    "c · c": lambda x, w: (
        w.b + w.g * ((c := x - x.mean(-1, keepdim=True)) * torch.rsqrt((c * c).mean(-1, keepdim=True) + 1e-5))
    ),
    "var(unbiased=False)": lambda x, w: (
        (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * w.g + w.b
    ),
    "var_mean": lambda x, w: (
        (x - (s := torch.var_mean(x, -1, correction=0, keepdim=True))[1]) / torch.sqrt(s[0] + 1e-5) * w.g + w.b
    ),
    "E[x²] − E[x]²": lambda x, w: (
        (x - (m := x.mean(-1, keepdim=True))) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - m * m + 1e-5) * w.g + w.b
    ),
    "Σ/n": lambda x, w: (
        (c := x - x.sum(-1, keepdim=True) / (n := x.shape[-1])) * (c.square().sum(-1, True) / n + 1e-5) ** -0.5 * w.g
        + w.b
    ),
    "std²": lambda x, w: (
        (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.std(-1, keepdim=True, unbiased=False) ** 2 + 1e-5) * w.g + w.b
    ),
    "native_layer_norm": lambda x, w: torch.native_layer_norm(x, [x.shape[-1]], w.g, w.b, 1e-5)[0],
    "(1 + w)": lambda x, w: F.layer_norm(x, x.shape[-1:], w.g + 1, w.b),
    "(1 + w) by hand": lambda x, w: F.layer_norm(x, x.shape[-1:]) * (1 + w.g) + w.b,
    "RMSNorm of x − mean": lambda x, w: F.rms_norm(x - x.mean(-1, True), x.shape[-1:], w.g, 1e-5) + w.b,
    "variance of x − mean": lambda x, w: (
        (c := x - x.mean(-1, True)) * torch.rsqrt(c.var(-1, correction=0, keepdim=True) + 1e-5) * w.g + w.b
    ),
    "std_mean": lambda x, w: (
        (x - (s := torch.std_mean(x, -1, correction=0, keepdim=True))[1]) / torch.sqrt(s[0] ** 2 + 1e-5) * w.g + w.b
    ),
    "addcmul": lambda x, w: torch.addcmul(w.b, w.g, F.layer_norm(x, x.shape[-1:])),
    "in float32": lambda x, w: F.layer_norm(x.float(), x.shape[-1:], w.g.float(), w.b.float()).to(x.dtype),
}  # fmt: skip

NORM: dict[str, Function] = {f"RMSNorm: {name}": norm for name, norm in RMS.items()} | {
    f"LayerNorm: {name}": norm for name, norm in LAYER.items()
}


def behind_a_residual(norm: Function) -> Function:
    return lambda x, w: norm(x + torch.sin(x), w)


ADD_NORM = {name: behind_a_residual(norm) for name, norm in list(NORM.items())[::4]}
SOFTMAX: dict[str, Function] = {
    "torch.softmax": lambda x, w: torch.softmax(x, dim=-1),
    "positive dim": lambda x, w: torch.softmax(x, dim=x.dim() - 1),
    "in float32": lambda x, w: torch.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype),
    "scaled": lambda x, w: torch.softmax(x * 0.125, dim=-1),
    "temperature": lambda x, w: F.softmax(x / 0.7, dim=-1),
    "exp over sum": lambda x, w: (e := torch.exp(x - x.amax(-1, True))) / e.sum(-1, True),
    "max.values": lambda x, w: (e := torch.exp(x - x.max(-1, True).values)) / e.sum(-1, True),
    "reciprocal": lambda x, w: (e := torch.exp(x - x.amax(-1, True))) * e.sum(-1, True).reciprocal(),
    "unsqueezed": lambda x, w: (e := torch.exp(x - x.amax(-1).unsqueeze(-1))) / e.sum(-1)[..., None],
    "base two": lambda x, w: (e := torch.exp2((x - x.amax(-1, True)) * math.log2(math.e))) / e.sum(-1, True),
    "softmin": lambda x, w: F.softmin(x, dim=-1),
}
# ---- what is none -------------------------------------------------------------------------------
NOT_NORMS: dict[str, Function] = {
    "eps outside the root": lambda x, w: x / (torch.sqrt(_mean_square(x)) + 1e-2) * w.g,
    "eps a floor": lambda x, w: x * torch.rsqrt(_mean_square(x).clamp(min=1e-2)) * w.g,
    "F.normalize · √d": lambda x, w: F.normalize(x, dim=-1) * math.sqrt(K) * w.g,
    "x / max(norm, eps) · √d": lambda x, w: x / x.norm(dim=-1, keepdim=True).clamp(min=0.1) * math.sqrt(K) * w.g,
    "sum, not mean": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) * w.g,
    "wrong n": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (K - 1) + 1e-6) * w.g,
    "cube": lambda x, w: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-6) * w.g,
    "sqrt, not rsqrt": lambda x, w: x * torch.sqrt(_mean_square(x) + 1e-6) * w.g,
    "other axis": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6) * w.g,
    "over all": lambda x, w: x * torch.rsqrt(x.pow(2).mean() + 1e-6) * w.g,
    "other tensor": lambda x, w: (x + 1) * torch.rsqrt(_mean_square(x) + 1e-6) * w.g,
    "sample variance": lambda x, w: (
        (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=True) + 1e-5)
    ),
    "variance about another mean": lambda x, w: (
        (x - x.mean(-1, keepdim=True)) * torch.rsqrt((x - x.amax(-1, keepdim=True)).pow(2).mean(-1, keepdim=True))
    ),
    "std + eps": lambda x, w: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=False) + 1e-2) * w.g,
    "centred by half the mean": lambda x, w: (
        (x - 0.5 * x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * w.g
    ),
}  # fmt: skip
NOT_SOFTMAX: dict[str, Function] = {
    "other axis": lambda x, w: torch.softmax(x, dim=-2),
    "mean for max": lambda x, w: (e := torch.exp(x - x.mean(-1, True))) / e.sum(-1, True),
    "mean for sum": lambda x, w: (e := torch.exp(x - x.amax(-1, True))) / e.mean(-1, True),
    "maximum of all": lambda x, w: (e := torch.exp(x - x.amax())) / e.sum(-1, True),
    "sum of all": lambda x, w: (e := torch.exp(x - x.amax(-1, True))) / e.sum(),
    "base three": lambda x, w: (e := torch.pow(3.0, x - x.amax(-1, True))) / e.sum(-1, True),
}
