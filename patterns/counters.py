"""Integers on the device that several layers advance, all by one kernel.

Each layer of transformers' static cache counts its positions in a tensor of its own. Inductor launches a kernel for
each, which takes longer to start than to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compiler.counters import find_counters
from fusion_compiler.pattern import Example, RecognisedPattern


def advance(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    y = x * first + second
    first.add_(1)
    second.add_(1)
    return y


def read_afterwards(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    first.add_(1)
    second.add_(1)
    return x * first + second


def _tensors() -> tuple[Tensor, ...]:
    return torch.randn(4), torch.tensor(3), torch.tensor(5)


counters = RecognisedPattern(
    name="counters",
    function=advance,
    find=find_counters,
    examples=(Example(_tensors), Example(_tensors, read_afterwards, refused="where it is needed")),
)
