"""What a registered kernel is asked: its nodes on operands of the graph, and its own cost."""

from __future__ import annotations

from typing import Any, cast

import sympy
import torch
from torch.fx import Node

from fusion_compiler.candidates import Amount
from fusion_compiler.fused import Declared
from fusion_compiler.kernels import RegisteredKernel
from fusion_compiler.machine import Machine
from fusion_compiler.splice import Builder, SpliceError
from fusion_compiler.torch_private.functional_trace import functional_trace
from fusion_compiler.variants import results_of


def stated(kernel: RegisteredKernel, machine: Machine, *arguments: Any) -> Amount:
    """The seconds that the kernel's own cost function gives."""
    assert kernel.cost is not None
    seconds = kernel.cost(machine, *arguments)
    if isinstance(seconds, (torch.SymFloat, torch.SymInt)):
        return cast(sympy.Expr, seconds.node.expr)
    if not isinstance(seconds, (int, float)) or not seconds >= 0:
        raise ValueError(f"the cost function of kernel {kernel.name!r} gives {seconds!r}; it must give seconds")
    return float(seconds)


def inline(builder: Builder, kernel: RegisteredKernel, op: Declared, operands: list[Node]) -> tuple[Node, ...]:
    """The nodes of the kernel's function on `operands`; returns those that hold its results."""

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
    results = results_of(traced)
    if results is None:
        raise SpliceError(f"kernel {kernel.name!r} returns something else than tensors")
    found = (here[result] for result in results)
    return tuple(builder.call(torch.ops.aten.clone.default, n) if _shares_memory(n, operands) else n for n in found)


def _shares_memory(node: Node, operands: list[Node]) -> bool:
    """Whether a result is a view of an argument, which nothing that a graph computes may be."""
    storages = [n.meta["val"].untyped_storage()._cdata for n in (node, *operands)]
    return storages[0] in storages[1:]
