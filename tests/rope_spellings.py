"""Spellings of rotary position embedding, and what looks like one and is none.

Each is a function of x [B, H, S, D] and the angles [S, D/2].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor, Tensor], Tensor]


def rotate_half(x: Tensor) -> Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


def rotate_every_two(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _full(angles: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat((angles, angles), dim=-1)
    return both.cos(), both.sin()


def _every_two(angles: Tensor) -> tuple[Tensor, Tensor]:
    return angles.cos().repeat_interleave(2, dim=-1), angles.sin().repeat_interleave(2, dim=-1)


def llama(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = (t.to(x.dtype) for t in _full(angles))
    return x * cos + rotate_half(x) * sin


def llama_broadcast(x: Tensor, angles: Tensor) -> Tensor:
    """cos and sin per batch, with an axis for the heads, as transformers passes them."""
    cos, sin = (t[None].expand(x.shape[0], -1, -1).to(x.dtype).unsqueeze(1) for t in _full(angles))
    return (x * cos) + (rotate_half(x) * sin)


def in_float32(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = _full(angles)
    return (x.float() * cos + rotate_half(x.float()) * sin).to(x.dtype)


def sine_first(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = _full(angles)
    return (sin * rotate_half(x) + cos * x).to(x.dtype)


def of_a_sum(x: Tensor, angles: Tensor) -> Tensor:
    """As behind Gemma's norms, y · (1 + w): x itself is a sum of products."""
    return llama(x + x * 0.25 * x.abs(), angles)


def by_chunks(x: Tensor, angles: Tensor) -> Tensor:
    (a, b), c, s = x.chunk(2, dim=-1), angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


def by_split(x: Tensor, angles: Tensor) -> Tensor:
    (a, b), c, s = x.split(x.shape[-1] // 2, dim=-1), angles.cos(), angles.sin()
    return torch.cat([a * c - b * s, a * s + b * c], dim=-1).to(x.dtype)


def by_unflatten(x: Tensor, angles: Tensor) -> Tensor:
    (a, b), c, s = x.unflatten(-1, (2, -1)).unbind(-2), angles.cos(), angles.sin()
    return torch.stack((a * c - b * s, b * c + a * s), dim=-2).flatten(-2).type_as(x)


def minus_as_scale(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    cos, sin = _full(angles)
    return (x * cos + torch.cat((b * -1, a), dim=-1) * sin).to(x.dtype)


def sine_inside(x: Tensor, angles: Tensor) -> Tensor:
    (a, b), (cos, _), s = x.chunk(2, dim=-1), _full(angles), angles.sin()
    return (x * cos + torch.cat((-b * s, a * s), dim=-1)).to(x.dtype)


def gpt_j(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = (t.to(x.dtype) for t in _every_two(angles))
    return x * cos + rotate_every_two(x) * sin


def cohere(x: Tensor, angles: Tensor) -> Tensor:
    dtype, x = x.dtype, x.float()
    cos, sin = _every_two(angles)
    return (x * cos + rotate_every_two(x) * sin).to(dtype=dtype)


def pairs_stacked(x: Tensor, angles: Tensor) -> Tensor:
    a, b, c, s = x[..., ::2], x[..., 1::2], angles.cos(), angles.sin()
    return torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2).type_as(x)


def pairs_reshaped(x: Tensor, angles: Tensor) -> Tensor:
    """As reference implementations without complex numbers write it."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    turns = torch.stack((angles.cos(), angles.sin()), dim=-1)
    out = torch.stack(
        (
            pairs[..., 0] * turns[..., 0] - pairs[..., 1] * turns[..., 1],
            pairs[..., 1] * turns[..., 0] + pairs[..., 0] * turns[..., 1],
        ),
        -1,
    )
    return out.flatten(3).type_as(x)


def pairs_unbound(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    c, s = angles.cos(), angles.sin()
    return torch.cat(((a * c - b * s)[..., None], (b * c + a * s)[..., None]), dim=-1).reshape(x.shape).type_as(x)


def pairs_of_chunks(x: Tensor, angles: Tensor) -> Tensor:
    a, b = (t.squeeze(-1) for t in x.unflatten(-1, (-1, 2)).chunk(2, dim=-1))
    c, s = angles.cos(), angles.sin()
    return torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2).type_as(x)


def pairs_in_place(x: Tensor, angles: Tensor) -> Tensor:
    out, c, s = torch.empty_like(x), angles.cos(), angles.sin()
    out[..., ::2] = x[..., ::2] * c - x[..., 1::2] * s
    out[..., 1::2] = x[..., 1::2] * c + x[..., ::2] * s
    return out


def halves_in_place(x: Tensor, angles: Tensor) -> Tensor:
    out, c, s, d = torch.empty_like(x), angles.cos(), angles.sin(), x.shape[-1] // 2
    out[..., :d] = x[..., :d] * c - x[..., d:] * s
    out[..., d:] = x[..., d:] * c + x[..., :d] * s
    return out


def pairs_into_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Even and odd elements are turned and then stand in halves, as DeepSeek does."""
    b, h, s, d = x.shape
    x = x.view(b, h, s, d // 2, 2).transpose(4, 3).reshape(b, h, s, d)
    cos, sin = (t.to(x.dtype) for t in _full(angles))
    return x * cos + rotate_half(x) * sin


def complex_polar(x: Tensor, angles: Tensor) -> Tensor:
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


def complex_reshaped(x: Tensor, angles: Tensor) -> Tensor:
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turns = turns.view(1, 1, *turns.shape)
    return torch.view_as_real(turns * pairs).flatten(3).to(x.dtype)


def complex_stacked(x: Tensor, angles: Tensor) -> Tensor:
    turns = torch.view_as_complex(torch.stack((angles.cos(), angles.sin()), dim=-1))
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).reshape(x.shape).type_as(x)


def partial(x: Tensor, angles: Tensor) -> Tensor:
    """Half of the elements are turned, as in GPT-NeoX, Phi and StableLM."""
    turned, kept = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((llama(turned, angles[:, ::2]), kept), dim=-1)


def partial_pairs(x: Tensor, angles: Tensor) -> Tensor:
    turned, kept = x.split(x.shape[-1] // 2, dim=-1)
    return torch.cat((gpt_j(turned, angles[:, ::2]), kept), dim=-1)


def neox(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = (t[None, None, :, :] for t in _full(angles))
    return ((x * cos) + (rotate_half(x) * sin)).to(x.dtype)


def heads_inside(x: Tensor, angles: Tensor) -> Tensor:
    """[B, S, H, D], as before the transpose."""
    cos, sin = (t[:, None, :].to(x.dtype) for t in _full(angles))
    turned = x.transpose(1, 2).contiguous()
    return (turned * cos + rotate_half(turned) * sin).transpose(1, 2)


def scaled_angles(x: Tensor, angles: Tensor) -> Tensor:
    """cos and sin times an attention factor, as YaRN does."""
    cos, sin = (t * 1.2 for t in _full(angles))
    return (x * cos + rotate_half(x) * sin).to(x.dtype)


MATCHED: dict[str, Function] = {
    f.__name__.replace("_", " "): f
    for f in (
        llama, llama_broadcast, in_float32, sine_first, by_chunks, by_split, by_unflatten, minus_as_scale, sine_inside,
        gpt_j, cohere, pairs_stacked, pairs_reshaped, pairs_unbound, pairs_of_chunks, pairs_in_place, halves_in_place,
        pairs_into_halves, complex_polar, complex_reshaped, complex_stacked, partial, partial_pairs, neox, heads_inside,
        scaled_angles, of_a_sum,
    )
}  # fmt: skip

REFUSED: dict[str, Function] = {
    "reflection": lambda x, t: x * _full(t)[0] + torch.cat(x.chunk(2, -1)[::-1], -1) * _full(t)[1],
    "both minus": lambda x, t: x * _full(t)[0] + torch.cat([-c for c in x.chunk(2, -1)[::-1]], -1) * _full(t)[1],
    "two inputs": lambda x, t: x * _full(t)[0] + rotate_half(x + 1.0) * _full(t)[1],
    "halves not exchanged": lambda x, t: (
        x * _full(t)[0] + torch.cat((-x.chunk(2, -1)[0], x.chunk(2, -1)[1]), -1) * _full(t)[1]
    ),
    "sine alone": lambda x, t: x + rotate_half(x) * _full(t)[1],
    "pairs with halves": lambda x, t: x * _full(t)[0] + torch.cat((-x[..., 1::2], x[..., ::2]), -1) * _full(t)[1],
    "squared": lambda x, t: x * x * _full(t)[0] + rotate_half(x) * _full(t)[1],
}
