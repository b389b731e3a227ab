"""Linears with codes and scales apart, as kernels like to read them: a block's 18 bytes are aligned to nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import blocks, q4_0, q8_0
from .linear import FORMATS, Linear, floating


class SplitLinear(torch.nn.Module):
    """The same y = x Wᵀ + b as `Linear`, of the same number of bytes.

    `codes` are uint8 [N, K/2] for Q4_0 (16 bytes a block: element j low, element j + 16 high) or int8 [N, K] for Q8_0,
    `scales` fp16 [N, K/32]. `raw` gives the blocks back, bit for bit.
    """

    codes: Tensor
    scales: Tensor
    bias: torch.nn.Parameter | None

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.form, self.bias = linear.form, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        held = blocks.of_rows(linear.raw, (q4_0 if self.form == q4_0.NAME else q8_0).BYTES, self.form)
        codes = held[..., 2:].flatten(1).contiguous()
        self.register_buffer("codes", codes if self.form == q4_0.NAME else codes.view(torch.int8))
        self.register_buffer("scales", held[..., :2].contiguous().view(torch.float16).squeeze(-1))

    @property
    def raw(self) -> Tensor:
        codes = self.codes.view(torch.uint8).view(*self.scales.shape, -1)
        return torch.cat([self.scales.unsqueeze(-1).view(torch.uint8), codes], -1).flatten(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SplitLinear:
        """As for any module, but `.to(dtype)`, `.half()` and their like leave the scales as they are."""
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        floating(x)
        codes = self.codes.view(*self.scales.shape, -1)
        if self.form == q4_0.NAME:
            codes = torch.cat([codes & 15, codes >> 4], -1).to(torch.int8) - 8
        weight = blocks.product(self.scales.unsqueeze(-1), codes, x.dtype)
        return torch.nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, form={self.form!r}, split"


def split(model: torch.nn.Module) -> list[str]:
    """Replaces every `Linear` inside `model` by a `SplitLinear`, one after the other, so that no second copy of the
    model is ever held; returns their names. The new weights are no longer mapped from a file."""
    return _each(model, (Linear,), SplitLinear)


def dequantise(model: torch.nn.Module, dtype: torch.dtype) -> list[str]:
    """Replaces every linear with quantised weights inside `model` by a plain one in `dtype`: four times the bytes for
    16 bits, and nothing left to do at each call. Returns their names."""

    def plain(held: Linear | SplitLinear) -> torch.nn.Linear:
        bias = held.bias is not None
        made = torch.nn.Linear(held.in_features, held.out_features, bias, device="meta", dtype=dtype)
        weight = FORMATS[held.form].dequantise(held.raw, dtype)
        made.weight = torch.nn.Parameter(weight, requires_grad=False)
        if held.bias is not None:
            made.bias = torch.nn.Parameter(held.bias.detach().to(dtype), requires_grad=False)
        return made

    return _each(model, (Linear, SplitLinear), plain)


def _each(model: torch.nn.Module, kinds: tuple[type, ...], made_of: Callable[[Any], torch.nn.Module]) -> list[str]:
    """One module that stands at several paths is made into one module."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds) and name:
            places.setdefault(id(module), []).append(name)
    for names in places.values():
        made = made_of(model.get_submodule(names[0]))
        for name in names:
            model.set_submodule(name, made)
    return [name for names in places.values() for name in names]
