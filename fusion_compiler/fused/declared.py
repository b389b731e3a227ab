"""What a user's pattern computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from .size import Size


@dataclass(frozen=True)
class Declared:
    """What a pattern's own function computes of these arguments; only kernels registered for the pattern compute it.

    `arguments` are those of the function in its own order: fake tensors, bound numbers, chosen alternatives, None where
    an optional parameter is absent. The operands of a site are the tensors among them, in order; a `transposed` operand
    is stored the other way round and is transposed before it is passed. The function's result has the elements
    of the site's output in the same order, and maybe another shape; of a function with several results `kept` gives
    the positions of those that the site's outputs are, in their order.
    """

    pattern: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = field(compare=False)
    transposed: tuple[bool, ...]  # one per operand
    dtype: torch.dtype  # of the first operand
    out: tuple[Any, ...] = field(compare=False)  # the function's results, fake tensors
    flops: float | sympy.Expr
    sizes: tuple[Size, ...]  # the symbolic ones among the arguments' sizes
    kept: tuple[int, ...] = (0,)
    ungenerated: str = ""  # why no kernel is generated for it
    respelled: str = ""  # says how, where the function itself is a better spelling of what stands in the graph
