"""Small integers that a graph advances."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Counters:
    """Integers on the device, one a tensor, each advanced by its step of `steps`, in place: how full caches are.

    Operands of a site are the integers, its outputs the new ones; `results` tells of each output which operand's it is.
    """

    steps: tuple[int, ...]
    results: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
