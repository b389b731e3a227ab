"""Regions of an FX graph: what lies between the operands of a fused op and its output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Node

from .algebra import Value
from .fused import Site
from .semantics import SemanticView


def interior_between(output: Node, border: Iterable[Node]) -> tuple[Node, ...]:
    """The nodes from which `output` is computed, back to but without `border`; in graph order, `output` last.

    Nodes without inputs (constants) belong to nobody and are left out.
    """
    border = set(border) - {output}
    inside: set[Node] = set()
    stack = [output]
    while stack:
        node = stack.pop()
        if node in border or node in inside or not node.all_input_nodes:
            continue
        inside.add(node)
        stack.extend(node.all_input_nodes)
    return tuple(sorted(inside))


def holding(view: SemanticView, nodes: Iterable[Node]) -> list[Node]:
    """All nodes with the values of `nodes`: the views and casts of an operand are as good a border as the operand."""
    return [same for node in nodes for same in view.nodes(view.value(node))]


def site_of(view: SemanticView, output: Node, operands: tuple[Node, ...], others: tuple[Node, ...] = ()) -> Site:
    """The site of a fused op: its interior, and what of it stays because somebody outside reads it or needs it."""
    interior = region(view, (output, *others), operands)
    return Site(operands, output, interior, staying(interior, (output, *others)), others)


def staying(interior: Sequence[Node], outputs: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes of an interior that somebody outside reads, and those that they are computed from."""
    inside = set(interior)
    found: set[Node] = set()
    for node in sorted(interior, reverse=True):
        if node not in outputs and any(u not in inside or u in found for u in node.users):
            found.add(node)
    return tuple(n for n in interior if n in found)


def region(view: SemanticView, outputs: Iterable[Node], operands: Iterable[Node]) -> tuple[Node, ...]:
    """The nodes from which `outputs` are computed, back to `operands`; the casts and views of an operand that nothing
    else reads are among them, as they die with the rest."""
    operands = set(operands)
    border = holding(view, operands)
    inside = {n for output in outputs for n in interior_between(output, border)}
    for node in sorted(set(border) - operands, reverse=True):
        source = node
        while source not in operands and source in border and source.all_input_nodes:
            source = source.all_input_nodes[0]
        if source in operands and node.users and all(user in inside for user in node.users):
            inside.add(node)
    return tuple(sorted(inside))


def _widened(narrow: Node, wide: Node) -> bool:
    more = wide.meta["val"].dtype.itemsize > narrow.meta["val"].dtype.itemsize
    return more and any(user.op != "output" for user in wide.users)


def outputs_of(view: SemanticView, value: Value) -> Sequence[Node]:
    """The nodes at which a fused op computing `value` may stand.

    A value is held by a chain of views and casts. The fused op replaces the first of it, or the last cast that
    alone reads what is before it, so that the kernel writes the dtype that is really wanted. A cast to a wider dtype
    that others compute with, such as a norm behind a sum, is left to them: they read fewer bytes so.
    """
    found = []
    for node in view.nodes(value):
        if any(view.value(i) is value for i in node.all_input_nodes):
            continue
        last = step = node
        while len(step.users) == 1:
            step = next(iter(step.users))
            if view.value(step) is not value:
                break
            if step.meta["val"].dtype != last.meta["val"].dtype and not _widened(last, step):
                last = step
        found.append(last)
    return found
