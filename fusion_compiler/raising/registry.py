"""Which rule raises which ATen operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.fx import Node

if TYPE_CHECKING:
    from ..algebra import Value
    from ..semantics import SemanticView

# A rule gives the value of a node of a view, or None where the vocabulary cannot express it.
Rule = Callable[["SemanticView", Node], "Value | None"]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Registers the decorated rule for these operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def arguments(node: Node, defaults: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    """The positional arguments of a node, completed by the last of `defaults`."""
    return (*node.args, *defaults[len(node.args) :])
