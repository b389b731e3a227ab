"""A linear whose weight stays in ggml's blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import blocks, q4_0, q8_0


@dataclass(frozen=True)
class WeightFormat:
    """A format for weights: `size` bytes a block, and what makes numbers of them."""

    size: int
    dequantise: Callable[[Tensor, torch.dtype], Tensor]


FORMATS = {form.NAME: WeightFormat(form.BYTES, form.dequantise) for form in (q4_0, q8_0)}


def floating(x: Tensor) -> None:
    """Raises TypeError for an x in whose type a weight would lose its scales."""
    if not x.is_floating_point():
        raise TypeError(f"a quantised linear multiplies floating-point x, and this is {x.dtype}: convert it first")


class Linear(torch.nn.Module):
    """y = x Wᵀ + b with W in blocks: x [..., K] of any floating type, y [..., N] of the same.

    `raw` uint8 [N, K/32 · bytes] is held as it is, without a copy; `bias` is [N] or None. `form` names the format,
    "Q4_0" or "Q8_0". In eager the weight is dequantised at every call.

    Raises ValueError for an unknown format, bytes that do not divide into its blocks, or a bias of another length;
    when called, TypeError for an x of integers, whose type has no place for the scales.
    """

    raw: Tensor
    bias: torch.nn.Parameter | None

    def __init__(self, raw: Tensor, bias: Tensor | None = None, *, form: str = "Q4_0") -> None:
        super().__init__()
        if form not in FORMATS:
            raise ValueError(f"no linear for the format {form!r}; there are {', '.join(FORMATS)}")
        if raw.dim() != 2:
            raise ValueError(f"the bytes of a weight are [N, K/32 · bytes], and these are {tuple(raw.shape)}")
        rows = blocks.of_rows(raw, FORMATS[form].size, form)
        if bias is not None and bias.shape != (raw.shape[0],):
            raise ValueError(f"the bias is {tuple(bias.shape)} and the weight has {raw.shape[0]} rows")
        self.form = form
        self.out_features, self.in_features = raw.shape[0], rows.shape[1] * blocks.BLOCK
        self.register_buffer("raw", raw)
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        floating(x)
        weight = FORMATS[self.form].dequantise(self.raw, x.dtype)
        return torch.nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, form={self.form!r}"
