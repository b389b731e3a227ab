"""A linear and its activation: act(x·Wᵀ + b), the first half of an MLP without a gate (GPT-2, BERT, ViT, T5 …).

The activation is taken of the accumulator before it is written, and a norm in front of x is folded in where there is
one. Saved per call: the product [M, N], written and read again, and a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_compiler.algebra import POINTWISE, Value
from fusion_compiler.pattern import Example, choice, pattern
from fusion_compiler.semantics import SemanticView

KNOWN = frozenset({"gelu_erf", "gelu_tanh", "relu", "silu", "sigmoid"})
LINEAR = frozenset({"add", "mul", "const", "cast"})  # what makes no activation of a linear


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _tensors(rows: int = 3) -> tuple[Tensor, ...]:
    return torch.randn(rows, 8), torch.randn(12, 8), torch.randn(12)


def _behind_a_norm(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(F.layer_norm(x, (8,)), w, bias))


def _of_a_product(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w) * bias)


def _bent(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    h = F.linear(x, w, bias)
    return torch.where(h > 0.0, h * h, torch.expm1(h))


def other_activations(view: SemanticView) -> Iterator[tuple[Value, str]]:
    """Functions of a linear alone, and of numbers and tensors of one element, that bend it otherwise."""
    source: dict[Value, Value | None] = {}  # the linear that a value is a function of alone
    bends: dict[Value, bool] = {}
    inner: set[Value] = set()

    def visit(value: Value) -> None:
        if value in source:
            return
        source[value], bends[value] = (value if _is_linear(value) else None), False
        for a in value.args:
            visit(a)
        if source[value] is value:
            return
        of = {a: source[a] for a in value.args if not view.is_one_number(a)}
        linears = set(of.values())
        if value.op in POINTWISE and len(linears) == 1 and None not in linears:
            [source[value]] = linears
            bends[value] = value.op not in LINEAR or any(bends[a] for a in of) or len(of) > 1

    read: set[Value] = set()  # linears that something else reads too, as a norm of one does
    for value in view.values():
        visit(value)
    for value in view.values():
        below = {view.value(i) for n in view.nodes(value) for i in n.all_input_nodes} - {value}
        inner |= {a for a in below if source[value] is not None and source.get(a) is source[value]}
        read |= {a for a in value.args if source[a] is a and source[value] is not a}
    for value in view.values():
        if bends[value] and value.op not in KNOWN and value not in inner and source[value] not in read:
            yield (
                value,
                f"a function of a linear alone, and none of the activations known ({value.op} at its end); a pattern "
                "of your own, act(F.linear(x, w)), has a kernel generated for it",
            )


def _is_linear(value: Value) -> bool:
    """A product with a weight, with or without a bias."""
    if value.op == "add" and len(value.args) == 2:
        biased = any(a.op == "bcast" and [k for _, k in a.attr("groups")] == [False, True] for a in value.args)
        return biased and any(a.op == "linear" for a in value.args)
    return value.op == "linear"


@pattern(
    name="linear_act",
    lookalikes=other_activations,
    examples=[
        Example(_tensors),
        Example(lambda: _tensors(1)),
        Example(_tensors, _behind_a_norm),
        Example(_tensors, _of_a_product, refused="a linear was expected"),
        Example(_tensors, _bent, refused="none of the activations known"),
    ],
)
def linear_act(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    act: Callable[[Tensor], Tensor] = choice(  # noqa: B008
        F.gelu, gelu_tanh, F.relu, F.silu, torch.sigmoid, quick_gelu, relu_squared
    ),
) -> Tensor:
    return act(F.linear(x, w, bias))
