"""Raising: a read-only semantic view over an FX graph of functional, decomposed ATen.

Every node gets a `Value` of the closed vocabulary (see `algebra`); what the vocabulary cannot express is a
`leaf`. The graph itself is not touched. Values leave out shapes and float casts, so a view of a node and the
node share one value; `SemanticView.nodes(value)` lists the nodes that hold it.

Vocabulary beyond `algebra`:
    leaf(node)                    an FX node seen from outside
    linear(x, w; kn)              x [M, K] times w [N, K] transposed (kn: w is [K, N], not transposed)
    mean/sum/amax/var(x; size)    reduction of the innermost axis of `size` elements (population variance)
    permute(x; order, shape)      axes reordered, size-1 axes left out
    slice(x; …)                   part of one axis
    rms_norm(x, [w]; eps, size, offset), layer_norm(x, [w], [b]; eps, size, offset)   see `fused.RowNorm`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .algebra import Algebra, Value
from .raising import RULES
from .shapes import Product, broadcast_groups, shape_of


class SemanticView:
    """The values of one graph's nodes."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph_module = graph_module
        self.algebra = Algebra()
        self._value: dict[Node, Value] = {}
        self._nodes: dict[int, list[Node]] = {}
        self._products: dict[int, list[Product]] = {}
        self._linears: dict[Value, None] = {}
        for node in graph_module.graph.nodes:
            value = self._raise(node)
            self._value[node] = value
            self._nodes.setdefault(id(value), []).append(node)

    def value(self, node: Node) -> Value:
        return self._value[node]

    def nodes(self, value: Value) -> Sequence[Node]:
        """The nodes that hold `value`, in graph order; none for values that only arose by normalising."""
        return self._nodes.get(id(value), ())

    def products(self, linear: Value) -> Sequence[Product]:
        """Where a `linear` value is computed."""
        return self._products.get(id(linear), ())

    def linears(self) -> Sequence[Value]:
        """The `linear` values that some node computes whole, by itself or with a bias."""
        return list(self._linears)

    def values(self) -> Iterator[Value]:
        """Each value that some node holds, once, in graph order."""
        seen: set[int] = set()
        for value in self._value.values():
            if id(value) not in seen:
                seen.add(id(value))
                yield value

    def written(self, value: Value) -> Iterator[tuple[Value, ...]]:
        """The two terms of each addition that gives `value`, a sum of more terms where one of the two is a sum."""
        for node in self.nodes(value):
            if node.target is torch.ops.aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
                terms = [self.operand(a, node) for a in node.args]
                if None not in terms:
                    yield tuple(t for t in terms if t is not None)

    # ---- raising ---------------------------------------------------------------------------
    def _raise(self, node: Node) -> Value:
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
            rule = RULES.get(node.target)
            if rule is not None:
                value = rule(self, node)
                if value is not None:
                    return value
        return self.leaf(node)

    def add_product(self, linear: Value, product: Product) -> None:
        """Notes where a `linear` value is computed."""
        self._products.setdefault(id(linear), []).append(product)
        self._linears[linear] = None

    def leaf(self, node: Node) -> Value:
        return self.algebra.make("leaf", node=node)

    def operand(self, argument: Any, out: Node) -> Value | None:
        """The value of an argument of a pointwise node, repeated to the node's shape."""
        if isinstance(argument, (bool, int, float)):
            return self.algebra.const(argument)
        if not isinstance(argument, Node):
            return None
        value = self._value[argument]
        if value.op == "const":
            return value
        if not isinstance(argument.meta.get("val"), torch.Tensor):
            return None  # a symbolic scalar
        groups = broadcast_groups(shape_of(argument), shape_of(out))
        return None if groups is None else self.algebra.bcast(value, groups)

    def flat(self, op: str, argument: Value | None, node: Any) -> list[Value]:
        """The terms (factors) that `argument` brings into a sum (product) `op`.

        A nested sum joins only where nothing else reads it: residual streams would grow without bound.
        """
        assert argument is not None
        single = isinstance(node, Node) and len(node.users) == 1
        if argument.op == op and single:
            return list(argument.args)
        if op == "mul" and argument.op == "bcast" and argument.args[0].op == "mul" and single:
            groups = argument.attr("groups")
            return [self.algebra.bcast(f, groups) for f in argument.args[0].args]
        return [argument]
