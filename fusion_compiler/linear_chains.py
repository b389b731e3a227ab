"""Chains of pointwise operations behind a linear: how far a kernel that computes the linear can go on.

From the linear on, readers are taken in as long as they are pointwise. Wherever all that was taken in is read by
nobody but one last node, that node is a place to stop at; the farthest such place makes the largest epilogue.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from .algebra import POINTWISE, Value
from .cost.node_work import is_library_call, is_view
from .purity import is_impure
from .semantics import SemanticView
from .shapes import TRANSPARENT_DTYPES, count, shape_of
from .sites import outputs_of

LONGEST = 64  # nodes of a chain; a generated kernel would not profit from more
NEARBY = 64  # values that are looked at to tell whether an operand is computed from the same input


@dataclass(frozen=True)
class Chain:
    """`root` is computed from `linear`, by way of the nodes `inside`, and from the values of `border`."""

    linear: Value
    root: Node
    inside: frozenset[Node]
    border: frozenset[Value]

    def output(self, view: SemanticView) -> Node | None:
        """The node of the chain at which a fused op that computes its root may stand."""
        return next((n for n in outputs_of(view, view.value(self.root)) if n in self.inside), None)


def chains(view: SemanticView, linear: Value) -> list[Chain]:
    """The chains behind `linear`, the longest first; the last is the linear alone, where one node holds it."""
    found: list[Chain] = []
    inside: dict[Node, None] = {}
    open_nodes: set[Node] = set()  # taken in, and read by somebody who is not
    waiting: list[Node] = []
    seen: set[Node] = set()

    def take(node: Node) -> None:
        inside[node] = None
        open_nodes.add(node)
        for user in _readers(node):
            if user not in seen:
                seen.add(user)
                heapq.heappush(waiting, user)
        for source in _sources(node):
            if source in open_nodes and all(user in inside for user in _readers(source)):
                open_nodes.discard(source)
        if len(open_nodes) == 1 and _may_end(view, node):
            found.append(_chain(view, linear, node, inside))

    products = sorted({p.node for p in view.products(linear)})
    if len(products) != 1:
        return []  # computed several times over: Inductor makes one of them
    take(products[0])
    while waiting and len(inside) < LONGEST:
        node = heapq.heappop(waiting)
        if not _joins(view, node, linear, inside):
            break  # what it reads must stay a result, and nothing farther on can be the only one
        take(node)
    return found[::-1]


def _chain(view: SemanticView, linear: Value, root: Node, inside: dict[Node, None]) -> Chain:
    border: set[Value] = set()
    for source in {s for node in inside for s in node.all_input_nodes} - set(inside):
        value = view.value(source)
        border.add(value)
        if value.op in ("add", "mul"):  # a sum may have joined the one that reads it
            border.update(a.args[0] if a.op == "bcast" else a for a in value.args)
    border -= {view.value(node) for node in inside}
    return Chain(linear, root, frozenset(inside), frozenset(border))


def _readers(node: Node) -> list[Node]:
    """Those that read what is in `node`: functionalising leaves views that nobody reads, and sizes are known anyhow."""
    alive = [user for user in node.users if user.users or user.op == "output" or is_impure(user)]
    alive = [reader for user in alive for reader in (user.users if _is_split(user) else [user])]
    return [user for user in alive if user.target is not torch.ops.aten.sym_size.int]


def _sources(node: Node) -> list[Node]:
    """Those that `node` reads; a part of what was split reads what was split."""
    return [s for source in node.all_input_nodes for s in (source.all_input_nodes if _is_split(source) else [source])]


def _is_split(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (list, tuple)) and is_view(node)


def _may_end(view: SemanticView, node: Node) -> bool:
    return node.meta["val"].dtype in TRANSPARENT_DTYPES and view.value(node).op in (*POINTWISE, "linear")


def _joins(view: SemanticView, node: Node, linear: Value, inside: dict[Node, None]) -> bool:
    """Whether `node`, which reads something inside, is pointwise, or a view on the way back to what is inside.

    What it reads besides may not come from the same input by another linear: these make a fusion of their own.
    """
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor) or is_library_call(node):
        return False  # a product with a bias has the value of a sum
    value, read = view.value(node), [source for source in _sources(node) if source in inside]
    if count(shape_of(node)) != count(shape_of(read[0])):
        return _is_part(view, value, linear)  # else repeated
    if any(view.value(known) is value for known in inside):
        return True
    turned = any(view.value(source).op not in (*POINTWISE, "linear") for source in read)
    if turned or value.op not in POINTWISE or value.op == "const":
        return is_view(node) and not turned
    others = [view.value(source) for source in node.all_input_nodes if source not in inside]
    return not any(v.op == "linear" and v.args[0] is linear.args[0] for other in others for v in _near(other))


def _is_part(view: SemanticView, value: Value, linear: Value) -> bool:
    """Whether a value is part of the features of `linear`, such as the gate out of a packed gate|up, with its bias."""
    whole = view.products(linear)[0].node
    return any(p.node is whole for v in (value, *value.args) if v.op == "linear" for p in view.products(v))


def _near(value: Value) -> Iterator[Value]:
    """The values below `value` through pointwise operations, as far as NEARBY."""
    stack, seen = [value], {value}
    while stack and len(seen) < NEARBY:
        current = stack.pop()
        yield current
        if current.op in POINTWISE or current.op == "bcast":
            fresh = [a for a in current.args if a not in seen]
            seen.update(fresh)
            stack.extend(fresh)
