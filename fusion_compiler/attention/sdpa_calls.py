"""Calls of torch's fused attention operators, read alike whichever of them the graph holds."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Node

from .axes import same, scalar_of, shape_of

aten = torch.ops.aten

FLASH = aten._scaled_dot_product_flash_attention.default
MASK_ARGUMENT = {
    aten.scaled_dot_product_attention.default: "attn_mask",
    aten._scaled_dot_product_flash_attention_for_cpu.default: "attn_mask",
    FLASH: "",
    aten._scaled_dot_product_efficient_attention.default: "attn_bias",
    aten._scaled_dot_product_cudnn_attention.default: "attn_bias",
    aten._scaled_dot_product_fused_attention_overrideable.default: "attn_bias",
}


@dataclass(frozen=True)
class Call:
    """One call; `output` is the node that holds the result. A `refusal` says why it must stay as it is."""

    node: Node
    output: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    is_causal: bool
    scale: float
    refusal: str = ""


def call(node: Node) -> Call | None:
    """The node as a call of a fused attention operator, or None."""
    target: Any = node.target
    if target not in MASK_ARGUMENT:
        return None
    arguments = bind(node)
    q, k, v = (cast(Node, arguments[name]) for name in ("query", "key", "value"))
    mask = arguments.get(MASK_ARGUMENT[target]) if MASK_ARGUMENT[target] else None
    scale = arguments.get("scale")
    width = shape_of(q)[-1]
    number = scalar_of(scale) if scale is not None else 1.0 / math.sqrt(width) if width.is_Integer else None
    output, refusal = _output(node)
    if arguments.get("dropout_p", 0.0) != 0.0:
        refusal = f"{node.name} drops probabilities out (training)"
    elif len(shape_of(q)) != 4 or len(shape_of(k)) != 4:
        refusal = f"{node.name} has operands that are not [batch, heads, length, dim]"
    elif shape_of(q)[1] != shape_of(k)[1]:
        refusal = f"{node.name} reads grouped heads already"
    elif arguments.get("is_causal") and target is FLASH and not same(shape_of(q)[2], shape_of(k)[2]):
        refusal = f"{node.name} aligns its causal mask to the last key"
    elif number is None:
        refusal = f"the scale of {node.name} is no number"
    return Call(node, output, q, k, v, mask, bool(arguments.get("is_causal")), number or 1.0, refusal)


def bind(node: Node) -> dict[str, Any]:
    """The arguments of a call of an ATen operator by name, defaults included."""
    schema = cast(Any, node.target)._schema
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    return {**bound, **node.kwargs}


def _output(node: Node) -> tuple[Node, str]:
    if isinstance(node.meta["val"], torch.Tensor):
        return node, ""
    taken = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    used = [i for i, u in taken.items() if u.users]
    if 0 not in taken or used != [0]:
        return node, f"more than the result of {node.name} is read (its log-sum-exp is saved for training)"
    return taken[0], ""
