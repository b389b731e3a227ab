"""Why something that looks like attention is none that a kernel computes, in sentences with the cure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from .contraction import contraction
from .scores import Obstacle


class NotAttention(Exception):
    """The node at which a structure stopped being attention, and why."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


class UnlikeRepeats(NotAttention):
    """Keys are repeated for other heads than values."""


def between_scores_and(node: Node, found: Obstacle) -> tuple[Node, str]:
    if found.node.op != "call_function":
        return node, f"{node.name} is a softmax of {found.node.name}, which no queries and keys are multiplied for here"
    between = f"{found.node.name} stands between the scores and their softmax {node.name}"
    return found.node, f"{between}: {found.reason}"


def changed(node: Node) -> str:
    """Why probabilities that `node` changes make no attention."""
    if _is_random(node):
        return (
            f"{node.name} drops probabilities out before they meet the values (training); model.eval() turns that off"
        )
    return (
        f"{node.name} changes the probabilities before they meet the values; a mask belongs before the softmax, and "
        "what scales whole rows or heads can scale the result"
    )


def _is_random(node: Node) -> bool:
    """Whether random numbers are drawn for a node."""
    stack, seen = list(node.all_input_nodes), set[Node]()
    while stack:
        below = stack.pop()
        if torch.Tag.nondeterministic_seeded in getattr(below.target, "tags", ()) or "random" in str(below.target):
            return True
        if below not in seen and contraction(below) is None:
            seen.add(below)
            stack += below.all_input_nodes
    return False


def also_read(node: Node, strangers: Sequence[Node], products: Sequence[Node]) -> str:
    """Why probabilities that have several readers are kept."""
    if not strangers:
        return (
            f"the probabilities {node.name} weight the values of several products ({products[0].name}, "
            f"{products[1].name}); values joined along their last dimension need one"
        )
    return (
        f"the probabilities {node.name} are also read by {strangers[0].name} (returned or saved for a backward pass), "
        "so they must be written out anyway; output_attentions=False, need_weights=False and torch.no_grad() free them"
    )
