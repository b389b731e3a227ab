"""Linears behind a norm as two kernels: the norm's own, and the linears', whose blocks take their places meanwhile.

A norm of few rows keeps few multiprocessors busy. It lets the next kernel in at once (`dependent_launch`), so that
little of its time is left to see, and the linears read rows that are normalised already: they divide their work as
they would behind no norm. That pays where folding is not free, as a LayerNorm's mean is not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...algebra import Algebra, Value
from ...candidates import Candidate
from ...cost.amounts import amount
from ...fused import Extra, MatmulFamily, MatmulGroup, RowNorm, RowReduction, Site
from ...machine import Machine
from . import matmul, predict, row_reduction

if TYPE_CHECKING:
    from torch.fx import Node

    from ...splice import Builder

ERRORS = {"swap": 0.15, "sliced": 0.12, "tile": 0.05}  # of predictions, by kinds that were measured behind a norm
Matmuls = MatmulFamily | MatmulGroup
Emit = Callable[..., "Node | tuple[Node, ...]"]


def candidates(op: Matmuls, machine: Machine) -> list[Candidate]:
    """Every candidate for the linears alone, with the norm's kernel in front; nothing where that is not for it."""
    m = amount(op.m)
    early = machine.kind == "cuda" and machine.capability >= 90
    if op.whole.norm is None or not early or not isinstance(m, int) or m > predict.MOST_ROWS:
        return []
    found = matmul.candidates(behind(op), machine)
    if not isinstance(found, list):
        return []
    norm = row_norm(op)
    moved = row_reduction.traffic(norm)
    seconds = predict.constants().norm + machine.launch_overhead
    return [
        dataclasses.replace(
            linear,
            name=linear.name.replace("triton_", "triton_norm_"),
            kernel=f"triton norm {row_reduction.plan_of(norm).label}, {linear.kernel.removeprefix('triton ')}",
            traffic=moved + linear.traffic,
            seconds=linear.seconds + seconds,
            emit=functools.partial(emit, op, linear.emit),
            error=max(linear.error, _error(linear)),
        )
        for linear in found
    ]


def _error(linear: Candidate) -> float:
    return ERRORS.get(linear.name.removeprefix("triton_"), predict.UNTRIED)


def behind(op: Matmuls) -> Matmuls:
    """The linears of what is normalised already."""
    if isinstance(op, MatmulGroup):
        return dataclasses.replace(op, parts=tuple(dataclasses.replace(part, norm=None) for part in op.parts))
    return dataclasses.replace(op, norm=None)


def row_norm(op: Matmuls, stride: int | None = None) -> RowReduction:
    """The norm alone; rows of x lie `stride` elements apart, K where not given."""
    norm, k = op.whole.norm, int(op.whole.k)
    assert norm is not None
    vectors = norm.has_weight + norm.has_bias
    extras = (Extra("full", op.dtype), *[Extra("col", op.dtype)] * vectors)
    strides = (k if stride is None else stride, *[0] * vectors)
    return RowReduction(op.m, k, (written_out(norm, k),), ("full",), (op.dtype,), extras, strides, op.dtype)


def written_out(norm: RowNorm, k: int) -> Value:
    """The norm of a row, over the leaves `extra(index=0)`, which is x, then its weight and its bias."""
    algebra = Algebra()
    x, *vectors = (algebra.make("extra", index=i) for i in range(1 + norm.has_weight + norm.has_bias))
    if norm.kind == "layer":
        x = algebra.sub(x, algebra.make("mean", x, size=k))
    square = algebra.make("mean", algebra.make("pow", x, exponent=2.0), size=k)
    shifted = algebra.make("add", algebra.const(norm.eps), square)
    result = algebra.make("mul", x, algebra.make("pow", shifted, exponent=-0.5))
    if norm.has_weight:
        weight = vectors.pop(0)
        if norm.offset:
            weight = algebra.make("add", algebra.const(norm.offset), weight)
        result = algebra.make("mul", result, weight)
    return algebra.make("add", result, *vectors) if vectors else result


def emit(op: Matmuls, linears: Emit, builder: Builder, site: Site) -> Node | tuple[Node, ...]:
    """Adds both kernels; returns what takes the place of the output, or of each of several."""
    head = op.whole.head
    stride, x = matmul.rows_of(builder, site.operands[0], int(op.whole.k))
    vectors = [builder.contiguous(node) for node in site.operands[1:head]]
    norm = row_norm(op, stride)
    y = builder.empty([op.m, op.whole.k], op.dtype, x.meta["val"].device)
    [normed] = row_reduction.launch(norm, row_reduction.plan_of(norm), builder, [x, *vectors], [y], lets=True)
    return linears(builder, dataclasses.replace(site, operands=(normed, *site.operands[head:])), behind=True)
