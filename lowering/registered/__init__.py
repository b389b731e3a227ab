"""Kernels that users registered for a pattern, as candidates beside the generated ones.

The function is traced with the graph's own fake tensors and its nodes take the place of the match, so that Inductor
compiles what it can: ATen operators are fused with what surrounds them, a wrapped Triton kernel becomes one of
Inductor's own kernel nodes, any other operator is called as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fusion_compiler.candidates import Candidate, Traffic, Unavailable
from fusion_compiler.cost.amounts import product
from fusion_compiler.cost.roofline import roofline
from fusion_compiler.fused import Attention, Declared, FusedOp, Site
from fusion_compiler.kernels import RegisteredKernel, kernels_of
from fusion_compiler.machine import Machine
from fusion_compiler.shapes import extent
from fusion_compiler.splice import Builder, SpliceError

from . import attention
from .inlined import inline, stated

NONE = "no kernel is registered for {0} and none is generated: {1} (fusion_compiler.register_kernel offers yours)"
POINTWISE = "Inductor makes one kernel of pointwise operations already"


@dataclass(frozen=True)
class RegisteredKernels:
    """What users registered: see `candidates.Lowering`."""

    name: str = "registered"

    def candidates(self, op: FusedOp, machine: Machine) -> list[Candidate] | Unavailable:
        if isinstance(op, Attention):
            return attention.candidates(op, machine)
        if not isinstance(op, Declared):
            return []
        known = kernels_of(op.function)
        found = [_candidate(op, kernel, machine) for kernel in known if kernel.serves(machine)]
        if op.respelled:
            own = RegisteredKernel("respelled", op.pattern, op.function, op.function)
            again = _candidate(op, own, machine)
            found.append(dataclasses.replace(again, name=own.name, kernel=f"Inductor's loops, {op.respelled}"))
        if found:
            return found
        elsewhere = [f"{k.name} is for {', '.join(sorted(k.machines or ()))}" for k in known]
        return Unavailable("; ".join(elsewhere) if elsewhere else NONE.format(op.pattern, op.ungenerated or POINTWISE))


def _candidate(op: Declared, kernel: RegisteredKernel, machine: Machine) -> Candidate:
    traffic = _traffic(op)
    seconds = roofline(traffic, machine, op.dtype) if kernel.cost is None else stated(kernel, machine, *op.arguments)
    basis = "its traffic" if kernel.cost is None else "its own cost function"
    return Candidate(
        name=f"registered.{kernel.name}",
        kernel=f"{kernel.name} (registered)",
        traffic=traffic,
        seconds=seconds,
        emit=functools.partial(_emit, op, kernel),
        details=(("predicted from", basis),),
    )


def _traffic(op: Declared) -> Traffic:
    """Every operand read once, the results written once."""
    read = sum((_bytes(a) for a in op.arguments if isinstance(a, torch.Tensor)), 0)
    return Traffic(op.flops, read, sum((_bytes(out) for out in op.out), 0), 1)


def _bytes(value: torch.Tensor) -> Any:
    return product(value.shape) * value.dtype.itemsize


def _emit(op: Declared, kernel: RegisteredKernel, builder: Builder, site: Site) -> tuple[Node, ...]:
    """Adds the kernel's nodes to the graph; returns those in the shapes and dtypes of the site's outputs."""
    operands = [
        builder.call(torch.ops.aten.permute.default, node, [1, 0]) if turned else node
        for node, turned in zip(site.operands, op.transposed, strict=True)
    ]
    results = inline(builder, kernel, op, operands)
    returned, wanted = ([_kind(v) for v in values] for values in ([r.meta["val"] for r in results], op.out))
    if returned != wanted:
        raise SpliceError(
            f"kernel {kernel.name!r} returns {' and '.join(returned)} where pattern {op.pattern!r} returns "
            f"{' and '.join(wanted)}"
        )
    return tuple(_like(builder, results[i], o) for i, o in zip(op.kept, site.outputs, strict=True))


def _like(builder: Builder, result: Node, output: Node) -> Node:
    wanted = output.meta["val"]
    if result.meta["val"].dtype != wanted.dtype:
        result = builder.call(torch.ops.prims.convert_element_type.default, result, wanted.dtype)
    return builder.reshape(result, list(wanted.shape))


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(map(extent, value.shape))}"
