"""What a node does besides giving its value: drawing random numbers, writing in place."""

from __future__ import annotations

import torch
from torch.fx import Node


def is_random(node: Node) -> bool:
    """Whether a node draws random numbers. Attention operators draw none where they drop nothing out."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = [a.name for a in node.target._schema.arguments]
    if "dropout_p" not in names:
        return True
    position = names.index("dropout_p")
    given = node.args[position] if position < len(node.args) else node.kwargs.get("dropout_p", 0.0)
    return not (isinstance(given, (int, float)) and given == 0)


def is_impure(node: Node) -> bool:
    """Whether a node has to stay though nobody reads it. FX keeps all that may draw random numbers, attention without
    dropout among them, which would then be computed beside the kernel that stands in its place."""
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return is_random(node) or node.target._schema.is_mutable
    return node.is_impure()
