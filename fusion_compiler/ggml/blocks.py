"""What the block formats share: rows cut into blocks of 32, scales as two bytes, rounding as C's roundf."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32


def in_blocks(x: Tensor, form: str) -> Tensor:
    """x [..., K] as float32 [..., K/32, 32]. Raises ValueError where K does not divide or x is not finite."""
    if not x.is_floating_point():
        raise ValueError(f"{form} holds numbers: quantise floating-point tensors, not {x.dtype}")
    if x.dim() == 0 or x.shape[-1] % BLOCK:
        raise ValueError(f"{form} has blocks of {BLOCK}: the last size of {tuple(x.shape)} is not a multiple of it")
    if not torch.compiler.is_compiling() and not bool(x.isfinite().all()):
        raise ValueError(
            f"{form} has no code for inf and NaN, and the tensor has some: clamp it, or leave it unquantised"
        )
    return x.float().reshape(*x.shape[:-1], -1, BLOCK)


def of_rows(raw: Tensor, size: int, form: str) -> Tensor:
    """raw uint8 [..., K/32 · size] as [..., K/32, size]. Raises ValueError for what cannot be such bytes."""
    if raw.dtype != torch.uint8 or raw.dim() == 0 or raw.shape[-1] % size:
        raise ValueError(f"{form} is uint8 with {size} bytes a block, and this is {raw.dtype} {tuple(raw.shape)}")
    return raw.reshape(*raw.shape[:-1], -1, size)


def inverse(d: Tensor) -> Tensor:
    """1/d, and 0 for a block of zeros."""
    return torch.where(d == 0, 0.0, 1 / d)


def rounded(x: Tensor) -> Tensor:
    """The nearest integer, halves away from zero; torch.round takes halves to even."""
    whole = x.abs().floor()
    return x.sign() * (whole + (2 * (x.abs() - whole)).floor())


def of_eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """(d, codes) of blocks [..., 32], both float32: d = max|x| / 127, codes = x/d rounded."""
    d = x.abs().amax(-1, keepdim=True) / 127
    return d, rounded(x * inverse(d))


def product(d: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """d · codes in `dtype`, rounded to it, blocks [..., K/32, 32] as rows [..., K]."""
    return (d.to(dtype) * codes.to(dtype)).flatten(-2)


def half_bytes(x: Tensor, form: str) -> Tensor:
    """x [..., K/32, 1] rounded to fp16, as two bytes. Raises ValueError where fp16 cannot hold it."""
    stored = x.half()
    if not torch.compiler.is_compiling() and not bool(stored.isfinite().all()):
        raise ValueError(f"a scale of {form} exceeds fp16 (65504): scale the tensor down before it is quantised")
    return stored.view(torch.uint8)
