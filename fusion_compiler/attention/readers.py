"""Who reads the probabilities of an attention."""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import Node

from . import axes
from .contraction import PADDING, contraction
from .softmax import softmax, uncast

aten = torch.ops.aten


def readers(node: Node) -> tuple[list[Node], list[Node]]:
    """The contractions that read `node` through views and casts, and whatever else reads it."""
    products: list[Node] = []
    strangers: list[Node] = []
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if contraction(user) is not None:
            products.append(user)
        elif axes.step(user) is not None or user.target in axes.CASTS or user.target in PADDING:
            stack.extend(user.users)
        elif user.target is aten.mul.Tensor and any(contraction(u) is not None for u in user.users):
            products += [u for u in user.users if contraction(u) is not None]
        else:
            strangers.append(user)
    return products, strangers


def leads_to_product(node: Node) -> bool:
    """Whether a few pointwise steps on from `node`, beside views and casts, there is a contraction."""
    reached = [(node, 4)]
    while reached:
        at, steps = reached.pop()
        for user in (u for u in at.users if u.op == "call_function"):
            if contraction(user) is not None and user.target is not aten.sum.dim_IntList:
                return True
            left = steps - (axes.step(user) is None and user.target not in axes.CASTS)
            if left:
                reached.append((user, left))
    return False


def zeroes_hidden_rows(user: Node, probabilities: Node) -> bool:
    """Whether `user` is the same softmax again, with zeros in rows that see nothing."""
    if user.target is not aten.where.self or uncast(cast(Node, user.args[2])) is not probabilities:
        return False
    return softmax(user) is not None
