"""Activations to try quantised linears on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

KINDS: dict[str, Callable[[Sequence[int], torch.Generator], Tensor]] = {
    "uniform": lambda shape, g: torch.rand(*shape, generator=g) * 2 - 1,
    "normal": lambda shape, g: torch.randn(*shape, generator=g),
    # a few features a hundred times larger than the rest, as in the residual stream of trained transformers
    "outliers": lambda shape, g: (
        torch.randn(*shape, generator=g) * (1 + 99 * (torch.rand(shape[-1], generator=g) < 0.01))
    ),
    "zeros": lambda shape, g: torch.zeros(*shape),
}


def activations(kind: str, shape: Sequence[int], seed: int = 0) -> Tensor:
    """fp16 of `shape` on the CPU, the same for the same seed. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"no activations of kind {kind!r}; there are {', '.join(KINDS)}")
    return KINDS[kind](shape, torch.Generator().manual_seed(seed)).half()
