"""What a match says it computes, evaluated in float64 from the operands that eager computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fusion_compiler.algebra import Value
from fusion_compiler.fused import Declared, MatmulFamily, MatmulGroup, RowReduction, Site

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu_erf": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Recorder(Interpreter):
    """Runs a graph and keeps what every node gave."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)

    def values(self, *inputs: Any) -> dict[Node, Any]:
        self.run(*inputs)
        return self.env


def evaluate(op: MatmulFamily, site: Site, values: dict[Node, Any]) -> Tensor:
    """The fused op's result [M, N] in float64."""
    operands = [values[n].double() for n in site.operands]
    k, n = int(op.k), int(op.n)
    x = operands.pop(0).reshape(-1, k)
    if op.norm is not None:
        weight = operands.pop(0).reshape(k) + op.norm.offset if op.norm.has_weight else torch.ones(k).double()
        bias = operands.pop(0).reshape(k) if op.norm.has_bias else torch.zeros(k).double()
        centred = x - x.mean(-1, keepdim=True) if op.norm.kind == "layer" else x
        x = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + op.norm.eps) * weight + bias
    accumulators = []
    for i in range(op.weights):
        weight = operands.pop(0)
        weight = weight.reshape(-1, weight.shape[-1])
        weight = weight if op.weight_is_kn else weight.t()
        first = op.features[i] if op.features else 0
        accumulators.append(x @ weight[:, first : first + n])
    shapes = {"full": (-1, n), "row": (-1, 1), "col": (-1,), "scalar": ()}
    extras = []
    for extra in op.extras:
        held = operands.pop(0)
        if extra.kind == "col":
            held = held.reshape(-1)[extra.first : extra.first + n]
        extras.append(held.reshape(shapes[extra.kind]))
    assert not operands, "the site has more operands than the op documents"
    return _pointwise(op.epilogue, accumulators, extras).expand(x.shape[0], n)


def evaluate_group(op: MatmulGroup, site: Site, values: dict[Node, Any]) -> list[Tensor]:
    """The results of linears of one input, [M, N] each, in float64."""
    norm, results = op.whole.norm, []
    at = 1 + (norm is not None and norm.has_weight) + (norm is not None and norm.has_bias)
    head = site.operands[:at]
    for part in op.parts:
        count = part.weights + len(part.extras)
        results.append(evaluate(part, replace(site, operands=(*head, *site.operands[at : at + count])), values))
        at += count
    return results


def evaluate_rows(op: RowReduction, site: Site, values: dict[Node, Any]) -> list[Tensor]:
    """The results of a reduction of rows, [M, N] or [M, 1], in float64."""
    m, n = int(op.m), op.n
    shapes = {"full": (m, n), "row": (m, 1), "col": (1, n), "scalar": (1, 1)}
    extras = [values[o].double().reshape(shapes[e.kind]) for o, e in zip(site.operands, op.extras, strict=True)]
    computed = [_pointwise(result, [], extras, row=(m, n)) for result in op.results]
    return [t.expand(m, n if kind == "full" else 1) for t, kind in zip(computed, op.kinds, strict=True)]


def evaluate_declared(op: Declared, site: Site, values: dict[Node, Any]) -> list[Tensor]:
    """What a pattern's own function gives for the operands, in float64."""
    operands, transposed, arguments = iter(site.operands), iter(op.transposed), []
    for argument in op.arguments:
        if isinstance(argument, Tensor):
            held = values[next(operands)]
            held = held.double() if held.is_floating_point() else held.to(torch.complex128)
            argument = (held.mT if next(transposed) else held).reshape(argument.shape)
        arguments.append(argument)
    results = op.function(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    return [results[i] for i in op.kept]


def _pointwise(value: Value, accumulators: list[Tensor], extras: list[Tensor], row: tuple[int, int] = (1, 1)) -> Tensor:
    if value.op == "acc":
        return accumulators[value.attr("index")]
    if value.op == "extra":
        return extras[value.attr("index")]
    if value.op == "const":
        return torch.tensor(value.attr("value"), dtype=torch.float64)
    args = [_pointwise(a, accumulators, extras, row) for a in value.args]
    if value.op in ("mean", "sum", "amax"):
        return getattr(torch, value.op)(args[0].expand(row), -1, keepdim=True)  # type: ignore[no-any-return]
    if value.op == "cast":
        return args[0]
    if value.op == "where":
        return torch.where(args[0] != 0, args[1], args[2])
    if value.op == "add":
        return sum(args[1:], args[0])
    if value.op == "mul":
        return math.prod(args[1:], start=args[0])
    if value.op == "pow":
        return args[0] ** value.attr("exponent")
    return UNARY.get(value.op, getattr(torch, value.op, None))(*args)  # type: ignore[misc]
