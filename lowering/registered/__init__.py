"""Kernels that users registered for a pattern, as candidates beside the generated ones.

The function is traced with the graph's own fake tensors and its nodes take the place of the match, so that Inductor
compiles what it can: ATen operators are fused with what surrounds them, a wrapped Triton kernel becomes one of
Inductor's own kernel nodes, any other operator is called as it is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch.fx import Node

from fusion_compiler.candidates import Amount, Candidate, Traffic, Unavailable
from fusion_compiler.cost.amounts import product
from fusion_compiler.cost.roofline import roofline
from fusion_compiler.fused import Declared, FusedOp, Site
from fusion_compiler.kernels import RegisteredKernel, kernels_of
from fusion_compiler.machine import Machine
from fusion_compiler.splice import Builder, SpliceError, same_sizes
from fusion_compiler.torch_private.functional_trace import functional_trace

NONE = (
    "no kernel is registered for {0}; Inductor makes one kernel of pointwise operations and reductions already, so "
    "none is generated for them (fusion_compiler.register_kernel offers yours)"
)


@dataclass(frozen=True)
class RegisteredKernels:
    """What users registered: see `candidates.Lowering`."""

    name: str = "registered"

    def candidates(self, op: FusedOp, machine: Machine) -> list[Candidate] | Unavailable:
        if not isinstance(op, Declared):
            return []
        known = kernels_of(op.function)
        found = [_candidate(op, kernel, machine) for kernel in known if kernel.serves(machine)]
        if found:
            return found
        elsewhere = [f"{k.name} is for {', '.join(sorted(k.machines or ()))}" for k in known]
        return Unavailable("; ".join(elsewhere) if elsewhere else NONE.format(op.pattern))


def _candidate(op: Declared, kernel: RegisteredKernel, machine: Machine) -> Candidate:
    traffic = _traffic(op)
    seconds = roofline(traffic, machine, op.dtype) if kernel.cost is None else _stated(kernel, machine, op)
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
    """Every operand read once, the result written once."""
    read = sum((_bytes(a) for a in op.arguments if isinstance(a, torch.Tensor)), 0)
    return Traffic(op.flops, read, _bytes(op.out), 1)


def _bytes(value: torch.Tensor) -> Any:
    return product(value.shape) * value.dtype.itemsize


def _stated(kernel: RegisteredKernel, machine: Machine, op: Declared) -> Amount:
    """The seconds that the kernel's own cost function gives."""
    assert kernel.cost is not None
    seconds = kernel.cost(machine, *op.arguments)
    if isinstance(seconds, (torch.SymFloat, torch.SymInt)):
        return cast(sympy.Expr, seconds.node.expr)
    if not isinstance(seconds, (int, float)) or not seconds >= 0:
        raise ValueError(f"the cost function of kernel {kernel.name!r} gives {seconds!r}; it must give seconds")
    return float(seconds)


def _emit(op: Declared, kernel: RegisteredKernel, builder: Builder, site: Site) -> Node:
    """Adds the kernel's nodes to the graph; returns the one in the shape and dtype of `site.output`."""
    operands = [
        builder.call(torch.ops.aten.permute.default, node, [1, 0]) if turned else node
        for node, turned in zip(site.operands, op.transposed, strict=True)
    ]
    result = inline(builder, kernel, op, operands)
    value, wanted = result.meta["val"], op.out
    if not isinstance(value, torch.Tensor) or not same_sizes(value.shape, wanted.shape) or value.dtype != wanted.dtype:
        raise SpliceError(
            f"kernel {kernel.name!r} returns {_kind(value)} where pattern {op.pattern!r} returns {_kind(wanted)}"
        )
    output = site.output.meta["val"]
    if value.dtype != output.dtype:
        result = builder.call(torch.ops.prims.convert_element_type.default, result, output.dtype)
    return builder.reshape(result, list(output.shape))


def inline(builder: Builder, kernel: RegisteredKernel, op: Declared, operands: list[Node]) -> Node:
    """The nodes of the kernel's function on `operands`; returns the one that holds its result."""

    def call(*tensors: torch.Tensor) -> Any:
        rest = iter(tensors)
        return kernel.function(*(next(rest) if isinstance(a, torch.Tensor) else a for a in op.arguments))

    traced = functional_trace(call, [node.meta["val"] for node in operands], builder.fake_mode)
    here: dict[Node, Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            raise SpliceError(
                f"kernel {kernel.name!r} holds a tensor of its own; make it from its arguments, or with torch.full"
            )
        if node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), here.__getitem__)
            here[node] = builder.call(node.target, *args, **kwargs)
    result = traced.graph.output_node().args[0]
    if not isinstance(result, Node):
        raise SpliceError(f"kernel {kernel.name!r} returns {type(result).__name__}, not one tensor")
    if _shares_memory(here[result], operands):
        return builder.call(torch.ops.aten.clone.default, here[result])
    return here[result]


def _shares_memory(node: Node, operands: list[Node]) -> bool:
    """Whether a result is a view of an argument, which nothing that a graph computes may be."""
    storages = [n.meta["val"].untyped_storage()._cdata for n in (node, *operands)]
    return storages[0] in storages[1:]


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
