"""Shapes of nodes as things that compare without installing guards, and how one shape repeats to fill another."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

# Casting among these is looked through: the fused kernel computes in float32, which holds the others.
TRANSPARENT_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})

Groups = tuple[tuple[Any, bool], ...]


def extent(size: Any) -> Any:
    """A size as something hashable that compares without installing guards: an int or an expanded sympy expression."""
    return _normal(size.node.expr) if isinstance(size, torch.SymInt) else int(size)


@functools.lru_cache(maxsize=4096)
def _normal(size: Any) -> Any:
    """s·(t + 1) and s·t + s are one size: sums of products, which compare as they stand."""
    expanded = sympy.expand(size)
    return int(expanded) if expanded.is_Integer else expanded


def count(sizes: Iterable[Any]) -> Any:
    """The number of elements of a shape of extents."""
    total: Any = 1
    for size in sizes:
        total = total * size
    return total if isinstance(total, int) else _normal(total)


def shape_of(node: Node) -> tuple[Any, ...]:
    return tuple(extent(s) for s in node.meta["val"].shape)


def broadcast_groups(shape: Sequence[Any], out: Sequence[Any]) -> Groups | None:
    """How a tensor of `shape` repeats to fill `out`: (size, kept) per group of axes, outermost first.

    None where it does not follow broadcasting rules. Axes of size 1 are left out, neighbours are merged.
    """
    padded = (1,) * (len(out) - len(shape)) + tuple(shape)
    groups: list[tuple[Any, bool]] = []
    for size, whole in zip(padded, out, strict=True):
        if whole == 1:
            continue
        if size not in (whole, 1):
            return None
        kept = size == whole
        if groups and groups[-1][1] == kept:
            groups[-1] = (count((groups[-1][0], whole)), kept)
        else:
            groups.append((whole, kept))
    return tuple(groups)


@dataclass(frozen=True)
class Features:
    """Columns of a matrix: `count` of them (which may be symbolic), from `first` on, `step` apart."""

    first: int
    count: Any
    step: int = 1

    def part(self, start: int, count: int, step: int = 1) -> Features:
        """So many of these, from the `start`-th on."""
        return Features(self.first + start * self.step, count, self.step * step)


@dataclass(frozen=True)
class Product:
    """A node (mm, addmm, or bmm with one weight for all batches) that multiplies `x` [..., K] with `weight`
    [..., K, N]; a linear made of part of its outputs has fewer `features` than the weight has columns."""

    node: Node
    x: Node
    weight: Node
    features: Features
