"""What lies between the linears of a matmul family and its result, written over acc(i) and extra(j).

What depends on no linear is an extra: a tensor that the graph holds, seen in the space [M, N] of the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.fx import Node

from .algebra import POINTWISE, Value
from .fused import Extra
from .semantics import SemanticView
from .shapes import count, shape_of

_KINDS = {(False, True): "col", (True, False): "row", (False,): "scalar"}


class Refused(Exception):
    """Why a value cannot be an epilogue, in a sentence."""


class Epilogue:
    """Rewrites values of `shape` (rows, columns); the extras that are met on the way are gathered in `extras`.

    `below` are the values from the result down to the `linears`, operands before users; those of `opened` too are
    written as what they are computed from, and are no extras.
    """

    def __init__(
        self, view: SemanticView, below: Sequence[Value], linears: Sequence[Value], shape: tuple[Any, Any],
        opened: Iterable[Value] = (),
    ) -> None:  # fmt: skip
        self.view, self.algebra, self.shape = view, view.algebra, shape
        self.extras: list[tuple[Extra, Node]] = []
        self._memo = {linear: self.algebra.make("acc", index=i) for i, linear in enumerate(linears)}
        self._over: set[Value] = {*linears, *opened}  # what some linear is needed for
        for value in below:
            if value not in self._over and any(a in self._over for a in value.args):
                self._over.add(value)

    def rewritten(self, value: Value) -> Value:
        if value not in self._memo:
            self._memo[value] = self._new(value)
        return self._memo[value]

    def _new(self, value: Value) -> Value:
        if value.op == "const":
            return value
        if value in self._over:
            if value.op == "bcast":
                raise Refused("a product is repeated along an axis after the matmul")
            return self._arguments(value)
        try:
            return self._extra(value)
        except Refused:
            # what only arose by normalising, such as −r in acc − r, is computed from tensors that do exist
            opened = self._opened(value)
            if opened is None:
                raise
            return self._arguments(opened)

    def _arguments(self, value: Value) -> Value:
        """The same operation on its rewritten arguments."""
        return self.algebra.make(value.op, *map(self.rewritten, value.args), **dict(value.attrs))

    def _opened(self, value: Value) -> Value | None:
        """A pointwise operation as one on repeated tensors, where `value` is one or repeats the result of one."""
        inner = value.args[0] if value.op == "bcast" else value
        if inner.op not in POINTWISE or not inner.args:
            return None
        if inner is value:
            return value
        groups = value.attr("groups")
        return self.algebra.make(inner.op, *(self.algebra.bcast(a, groups) for a in inner.args), **dict(inner.attrs))

    def _extra(self, value: Value) -> Value:
        kind, inner, wanted, first, step = "full", value, count(self.shape), 0, 1
        if value.op == "bcast":
            groups = value.attr("groups")
            kind = _KINDS.get(tuple(kept for _, kept in groups), "")
            wanted = {"col": self.shape[1], "row": self.shape[0], "scalar": 1}.get(kind)
            if wanted is None or count(size for size, kept in groups if kept) != wanted:
                raise Refused("a tensor is repeated otherwise than along rows or columns in the epilogue")
            inner = value.args[0]
        if inner.op == "slice" and wanted == self.shape[1] and len(inner.attr("shape")) == 1:
            if not self.view.nodes(inner):
                # part of a packed bias, which is a value and no node; in one row it is not repeated
                kind, first, step = "col", inner.attr("start"), inner.attr("step", 1)
                [wanted], inner = inner.attr("shape"), inner.args[0]
        node = next((n for n in self.view.nodes(inner) if count(shape_of(n)) == wanted), None)
        if node is None:
            raise Refused(f"an operand of the epilogue ({inner.op}) is not a tensor of its own in the graph")
        self.extras.append((Extra(kind, node.meta["val"].dtype, first, step), node))  # type: ignore[arg-type]
        return self.algebra.make("extra", index=len(self.extras) - 1)
