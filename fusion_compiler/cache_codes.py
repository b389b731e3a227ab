"""What is done to new rows before a cache of codes takes them: they are scaled, rounded, clamped and cast.

A kernel that does the same operations, each rounded to the dtype that the graph gives it, writes the very same codes.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

from .fused import CacheStep
from .halves import SAME
from .raising.registry import arguments
from .shapes import shape_of

aten = torch.ops.aten
CODES = (torch.float8_e4m3fn, torch.int8, torch.uint8)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
CASTS = (torch.ops.prims.convert_element_type.default, aten._to_copy.default)
SWAPPED = [0, 2, 1, 3]
Found = tuple[tuple[CacheStep, ...], Node, Node | None]  # steps, what they are taken of, the scale among them


@dataclass(frozen=True)
class Rows:
    """Rows that a write takes: `node` as [B, heads, L, D], or [B, L, heads, D] where `tokens_first`, after `steps`,
    none where these are no codes. `scale`, where there is one, broadcasts to the one shape or to the other."""

    node: Node
    tokens_first: bool
    steps: tuple[CacheStep, ...] = ()
    scale: Node | None = None
    scale_tokens_first: bool = False


def rows_of(node: Node, tokens_first: bool, turned: Container[Node] = ()) -> Rows:
    """What is written as `node`; no step is looked for beyond what is `turned`."""
    held, swapped = unswapped(node)
    first = tokens_first != swapped
    plain, dtype = Rows(held, first), held.meta["val"].dtype
    source = _cast_of(held)
    if dtype not in CODES or source is None:
        return plain
    steps, scale, scale_first = [CacheStep("cast", dtype)], None, False
    while True:
        source, swapped = unswapped(source)
        first = first != swapped
        found = _step(source, 1 if first else 2) if source not in turned else None
        if found is None or (found[2] is not None and scale is not None):
            break
        if found[2] is not None:
            scale, scale_first = found[2], first
        steps[:0], source = found[0], found[1]
    kept = _within(steps, dtype) if not dtype.is_floating_point else all(s.function != "round" for s in steps)
    if source.meta["val"].dtype not in FLOATS or not kept:
        return plain
    return Rows(source, first, tuple(steps), scale, scale_first)


def unswapped(node: Node) -> tuple[Node, bool]:
    """(the node that copies are made of, whether its second and third axis are exchanged on the way)."""
    swapped = False
    while True:
        if node.target in SAME and node.all_input_nodes[0].meta["val"].dtype == node.meta["val"].dtype:
            node = node.all_input_nodes[0]
        elif exchanges(node):
            node, swapped = node.all_input_nodes[0], not swapped
        else:
            return node, swapped


def exchanges(node: Node) -> bool:
    """Whether a node exchanges the second and the third of four axes."""
    order: Any = node.args[1] if node.target is aten.permute.default else ()
    return [d % 4 for d in order] == SWAPPED


def _cast_of(node: Node) -> Node | None:
    """What `node` is the cast of; what is assigned to a part of a cache is cast on the way."""
    if node.target is aten.copy.default:
        source: Any = node.args[1]
        return source if shape_of(source) == shape_of(node) else None
    return node.all_input_nodes[0] if node.target in CASTS else None


def _step(node: Node, tokens: int) -> Found | None:
    """The operation that `node` is; `tokens` is the axis of the rows' positions."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype not in FLOATS or not node.all_input_nodes:
        return None
    dtype, source = value.dtype, node.all_input_nodes[0]
    if node.target in CASTS:
        return ((CacheStep("cast", dtype),), source, None) if source.meta["val"].dtype in FLOATS else None
    if node.target is aten.round.default:
        return (CacheStep("round", dtype),), source, None
    if node.target in (aten.clamp_min.default, aten.clamp_max.default, aten.clamp.default):
        return _clamped(node, dtype)
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return _scaled(node, dtype, tokens)
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and node.kwargs.get("alpha", 1) == 1:
        number = node.args[1]
        sign = -1.0 if node.target is aten.sub.Tensor else 1.0
        return ((CacheStep("add", dtype, sign * number),), source, None) if isinstance(number, (int, float)) else None
    return None


def _clamped(node: Node, dtype: torch.dtype) -> Found | None:
    source, *bounds = arguments(node, (None, None, None))
    if node.target is aten.clamp_max.default:
        bounds.insert(0, None)
    steps = list[CacheStep]()
    for i, bound in enumerate(bounds):
        name: Literal["clamp_min", "clamp_max"] = "clamp_max" if i else "clamp_min"
        if isinstance(bound, (int, float)):
            steps.append(CacheStep(name, dtype, float(bound)))
        elif bound is not None:
            return None
    return tuple(steps), source, None


def _scaled(node: Node, dtype: torch.dtype, tokens: int) -> Found | None:
    """A product or quotient with a number or a scale that is the same for all positions and columns."""
    divided, whole = node.target is aten.div.Tensor, shape_of(node)
    name: Literal["div", "mul"] = "div" if divided else "mul"
    a, b = node.args
    for source, scale in ((a, b),) if divided else ((a, b), (b, a)):
        if not isinstance(source, Node) or shape_of(source) != whole:
            continue
        if isinstance(scale, (int, float)) and scale != 0:
            return (CacheStep(name, dtype, float(scale)),), source, None
        if isinstance(scale, Node) and _by_head(scale, source, tokens):
            return (CacheStep(name, dtype),), source, scale
    return None


def _by_head(scale: Node, rows: Node, tokens: int) -> bool:
    value, whole = scale.meta.get("val"), shape_of(rows)
    if not isinstance(value, torch.Tensor) or value.dtype not in FLOATS or len(whole) != 4:
        return False
    own = (1,) * (4 - value.dim()) + tuple(shape_of(scale))
    fits = len(own) == 4 and all(n in (1, m) for n, m in zip(own, whole, strict=True))
    return fits and own[tokens] == own[3] == 1 and value.device == rows.meta["val"].device


def _within(steps: list[CacheStep], dtype: torch.dtype) -> bool:
    """Whether what is cast last lies between the least and the largest of `dtype`."""
    bounds = torch.iinfo(dtype)
    least = largest = False
    for step in reversed(steps):
        number = step.number
        if step.function in ("mul", "div", "add"):
            break
        least = least or (step.function == "clamp_min" and number is not None and number >= bounds.min)
        largest = largest or (step.function == "clamp_max" and number is not None and number <= bounds.max)
    return least and largest
