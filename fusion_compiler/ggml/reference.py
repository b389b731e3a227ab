"""A quantised linear as ggml defines it, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from . import q4_0, q8_1


def exact(x: Tensor, raw: Tensor) -> Tensor:
    """x [..., K] times the Q4_0 weight raw [N, K/32 · 18], in float64 [..., N].

    x becomes Q8_1; a pair of blocks gives d4 · d8 · Σ (code4 − 8) · code8 with both d as stored, in fp16. By the
    definition of s that is d4 · (d8 · Σ code4 · code8 − 8 · s), but so s is not read, and cannot overflow. The sums
    over a block are integers; float64 holds everything else to 1e-16.
    """
    d4, codes4 = q4_0.parts(raw)
    d8, _, codes8 = q8_1.parts(q8_1.quantise(x))
    of_blocks = torch.einsum("...bj,nbj->...nb", codes8.double(), codes4.double())
    return torch.einsum("...nb,...b,nb->...n", of_blocks, d8.double().squeeze(-1), d4.double().squeeze(-1))
