"""A linear behind a row norm: norm(x)·Wᵀ + b, with RMSNorm or LayerNorm.

The statistics of a row are gathered while the matmul reads it, and scale the product afterwards: the norm costs no
kernel and no pass over x. Saved per call: the norm's read and write of [M, K] and its launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_compiler.fused import FusedOp, MatmulFamily, Site
from fusion_compiler.pattern import Example, choice, pattern

Norm = Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]


def rms(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def norm_folds(op: FusedOp, site: Site) -> str | None:
    """Without the norm this is a plain linear, and Inductor's."""
    if isinstance(op, MatmulFamily) and op.norm is None:
        return "the norm's input is not in the linear's dtype, so it cannot be folded in; cast the model as a whole"
    return None


def _tensors(rows: int = 3) -> tuple[Tensor, ...]:
    return torch.randn(rows, 8), torch.randn(12, 8), torch.randn(8), torch.randn(8), torch.randn(12)


def _mixed(x: Tensor, w: Tensor, norm_weight: Tensor, norm_bias: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.rms_norm(x, (8,), norm_weight, eps=1e-5).half(), w.half())


@pattern(
    name="norm_linear",
    constraints=[norm_folds],
    examples=[Example(_tensors), Example(lambda: _tensors(1)), Example(_tensors, _mixed, refused="dtype")],
)
def norm_linear(
    x: Tensor,
    w: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    offset: float = 0.0,
    norm: Norm = choice(rms, layer),  # noqa: B008
) -> Tensor:
    """`offset` is 1 where the norm's weight is stored as its distance from 1, as Gemma does."""
    scale = None if norm_weight is None else norm_weight + offset
    return F.linear(norm(x, scale, norm_bias, eps), w, bias)
