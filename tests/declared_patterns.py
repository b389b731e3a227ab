"""What the tests of the pattern API share: patterns made from plain functions, and where they are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusion_compiler.match import Match, find_all
from fusion_compiler.pattern import Example, Pattern, pattern, trace
from fusion_compiler.semantics import SemanticView


def tensors(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(shape) for shape in shapes)


def declared(function: Callable[..., Any], *example: torch.Tensor, **further: Any) -> Pattern:
    return pattern(name=function.__name__, examples=[Example(lambda: example)], **further)(function)


def found(p: Pattern, function: Callable[..., Any], *inputs: torch.Tensor) -> tuple[list[Match], list[Any]]:
    return find_all(SemanticView(trace(function, inputs)), [p])


def linear_cube(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The cube of a linear.

    More of it.
    """
    return torch.nn.functional.linear(x, w) ** 3
