"""From values that some pattern matched to the fused op `RowReduction` and the site it stands at.

Norms, softmax and everything else that reduces rows of one length and combines the result with the row: the values are
rewritten into the space of one row, where a number of the row needs no `bcast` to meet the row's elements, and the
norms of the vocabulary are written out. A refusal is a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch.fx import Node

from .algebra import POINTWISE, Algebra, Value
from .cost.amounts import product
from .cost.node_work import base_of, is_compute, is_constant, is_library_call, readers_of
from .fused import Extra, RowReduction, Site
from .norms import NORMS
from .semantics import SemanticView
from .shapes import count, extent, shape_of
from .sites import site_of

REDUCTIONS = ("mean", "sum", "amax", "var")
Kind = Literal["full", "row", "col", "scalar"]
PROLOGUE = 4  # times that operands are replaced by what they are computed from
_SPACES: dict[tuple[bool, ...], Kind] = {(True, False): "row", (False, True): "col", (False,): "scalar"}


class _Refused(Exception):
    """Why values are no row reduction."""


def build(
    view: SemanticView, results: Mapping[Value, Node], operands: Iterable[Value]
) -> tuple[RowReduction, Site] | str:
    """`results` (the values and the nodes that hold them, the last in the graph first) as one reduction of rows.

    It reads what `operands` are bound to, or, where an operand is computed by pointwise operations for this alone,
    what it is computed from. Returns a sentence where they cannot be one.
    """
    border, found = set(operands), None
    for _ in range(PROLOGUE):
        try:
            found = _Builder(view, results, border).build()
        except _Refused as refusal:
            return found or str(refusal)
        opened = {view.value(n) for n in found[1].operands if _only_for(found[1], n)} & border
        opened = {v for v in opened if v.op in POINTWISE}
        if not opened:
            break
        # and no further: what the opened operations read may be a norm, with a kernel of its own
        border = border - opened | {a.args[0] if a.op == "bcast" else a for v in opened for a in v.args}
    return found or ""


def _only_for(site: Site, operand: Node) -> bool:
    inside = set(site.interior)
    base = base_of(operand)
    return is_pointwise(base) and all(r in inside for r in readers_of(base))


class _Builder:
    def __init__(self, view: SemanticView, results: Mapping[Value, Node], operands: Iterable[Value]) -> None:
        self.view, self.results, self.operands = view, results, set(operands)
        self.algebra = view.algebra
        self.extras: list[tuple[Extra, Node, int]] = []
        self.memo: dict[tuple[Value, Kind], Value] = {}
        sizes = {v.attr("size") for root in results for v in root.walk() if v.op in (*REDUCTIONS, *NORMS)}
        if len(sizes) != 1:
            raise _Refused("it reduces rows of several lengths, and a kernel holds rows of one")
        [self.n] = sizes
        if not isinstance(self.n, int):
            raise _Refused("the length of its rows is symbolic: mark only the leading sizes as dynamic")
        self.m: Any = None

    def build(self) -> tuple[RowReduction, Site]:
        kinds = [self._kind(root, node) for root, node in self.results.items()]
        rewritten = [self._in(kind, root) for kind, root in zip(kinds, self.results, strict=True)]
        output, *others = self.results.values()
        site = site_of(self.view, output, tuple(node for _, node, _ in self.extras), tuple(others))
        wide = next((e.dtype for e, _, _ in self.extras if e.kind == "full"), output.meta["val"].dtype)
        op = RowReduction(
            m=self.m,
            n=self.n,
            results=tuple(rewritten),
            kinds=tuple(kinds),
            out_dtypes=tuple(node.meta["val"].dtype for node in self.results.values()),
            extras=tuple(e for e, _, _ in self.extras),
            strides=tuple(stride for _, _, stride in self.extras),
            dtype=wide,
            apart=apart(site),
        )
        return op, site

    def _kind(self, root: Value, node: Node) -> Literal["full", "row"]:
        """Whether a result has the rows' elements or one number per row; sees that all have the same rows."""
        shape = node.meta["val"].shape
        kind: Literal["full", "row"] = "row" if _one_per_row(root) else "full"
        held = range(len(shape)) if kind == "full" else [len(shape)]
        first = next((i for i in reversed(held) if kind == "row" or count(map(extent, shape[i:])) == self.n), None)
        if first is None:
            raise _Refused("a result is shaped otherwise than the rows that are reduced")
        m = math.prod(shape[:first])
        if self.m is not None and extent(m) != extent(self.m):
            raise _Refused("its results have different numbers of rows")
        self.m = m
        return kind

    def _in(self, space: Kind, value: Value) -> Value:
        """`value`, which has a number for every element of `space`, over extras."""
        key = (value, space)
        if key not in self.memo:
            self.memo[key] = self._rewritten(space, value)
        return self.memo[key]

    def _rewritten(self, space: Kind, value: Value) -> Value:
        make = self.algebra.make
        if value.op == "const":
            return value
        if value in self.operands and self.view.nodes(value):
            return self._extra(space, value)
        if value.op == "bcast":
            inner = _SPACES.get(tuple(kept for _, kept in value.attr("groups")))
            if inner == "scalar" and extent(self.m) == 1:
                inner = "row"  # in a single row the two are one
            if space != "full" or inner is None:
                raise _Refused("a tensor is repeated otherwise than along rows or columns")
            return self._in(inner, value.args[0])
        if value.op in REDUCTIONS or value.op in NORMS:
            if space != ("full" if value.op in NORMS else "row"):
                raise _Refused("the result of a reduction is used along another axis than its rows")
            return self._written_out(value)
        if value.op in POINTWISE:
            # of a sum that is flat, two terms may be what was bound together: a linear with its bias
            written = self.view.written(value) if value.op == "add" else ()
            args = next((terms for terms in written if self.operands.issuperset(terms)), value.args)
            return make(value.op, *(self._in(space, a) for a in args), **dict(value.attrs))
        return self._extra(space, value)

    def _written_out(self, value: Value) -> Value:
        """A reduction or a norm as means, sums and maxima of the row."""
        algebra, size, x = self.algebra, self.n, self._in("full", value.args[0])
        if value.op in ("mean", "sum", "amax"):
            return algebra.make(value.op, x, size=size)
        if value.op in ("var", "layer_norm"):
            x = algebra.make("add", x, _minus(algebra, algebra.make("mean", x, size=size)))
        square = algebra.make("mean", algebra.make("pow", x, exponent=2.0), size=size)
        if value.op == "var":
            return square
        shifted = algebra.make("add", algebra.const(value.attr("eps")), square)
        result = algebra.make("mul", x, algebra.make("pow", shifted, exponent=-0.5))
        for name, operand in zip(("mul", "add"), value.args[1:], strict=False):
            # in a single row a weight is not repeated along rows, so it is the same thing
            held = self._in("col", operand)
            if name == "mul" and value.attr("offset"):
                held = algebra.make("add", algebra.const(value.attr("offset")), held)
            result = algebra.make(name, result, held)
        return result

    def _extra(self, space: Kind, value: Value) -> Value:
        wanted = {"full": count((extent(self.m), self.n)), "row": extent(self.m), "col": self.n, "scalar": 1}[space]
        node = next((n for n in self.view.nodes(value) if count(shape_of(n)) == wanted), None)
        if node is None:
            raise _Refused(f"an operand ({value.op}) is not a tensor of its own in the graph")
        dtype = node.meta["val"].dtype
        if not dtype.is_floating_point and dtype != torch.bool:
            raise _Refused(f"{node.name} is {dtype}; kernels for rows read floating-point numbers and booleans")
        stride = 0
        if space == "full":
            found = row_stride(node.meta["val"], self.n)
            if found is None:
                raise _Refused(f"the rows of {node.name} are not evenly spaced in memory; make it contiguous")
            stride = found
        elif not node.meta["val"].is_contiguous():
            raise _Refused(f"{node.name} is not contiguous; make it so")
        self.extras.append((Extra(cast(Any, space), dtype), node, stride))
        return self.algebra.make("extra", index=len(self.extras) - 1)


def row_stride(value: torch.Tensor, n: int) -> int | None:
    """How far rows of `n` dense elements lie apart in `value`, or None where they are not evenly spaced."""
    sizes, strides = [extent(s) for s in value.shape], [extent(s) for s in value.stride()]
    if value.is_contiguous():
        return n
    if sizes[-1:] != [n] or strides[-1] != 1:
        return None
    leading = [(size, stride) for size, stride in zip(sizes[:-1], strides[:-1], strict=True) if size != 1]
    even = all(a == b * size for (_, a), (size, b) in zip(leading, leading[1:], strict=False))
    step = leading[-1][1] if leading else n
    return step if even and isinstance(step, int) and step >= n else None


def _minus(algebra: Algebra, value: Value) -> Value:
    return algebra.make("mul", algebra.const(-1.0), value)


def _one_per_row(value: Value) -> bool:
    """Whether `value` is a number per row: a reduction, or pointwise operations on nothing but such and constants."""
    if value.op in REDUCTIONS:
        return True
    return value.op in POINTWISE and bool(value.args) and all(_one_per_row(a) or a.op == "const" for a in value.args)


# ---- what Inductor would put into the same kernel ---------------------------------------------------
def apart(site: Site) -> Any:
    """Bytes that one kernel of the site's nodes and of their pointwise neighbours would not move.

    Neighbours share Inductor's kernel unless a library call lies between them and the site.
    """
    inside, moved = set(site.interior), 0
    bases = [base_of(node) for node in site.operands]
    for node, base in zip(site.operands, bases, strict=True):
        if is_pointwise(base) and not call_between(base, bases):
            kept = any(r not in inside for r in readers_of(base))
            moved = moved + _bytes(node) * (1 if kept else 2)
    for output in site.outputs:
        readers = [r for r in readers_of(output) if r not in inside]
        near = [r for r in readers if is_pointwise(r) and not any(call_between(o, [r]) for o in site.outputs)]
        if near:
            moved = moved + _bytes(output) * (2 if len(near) == len(readers) else 1)
    return moved


def is_pointwise(node: Node) -> bool:
    """Whether Inductor makes a loop of its own for the node."""
    return is_compute(node) and not is_library_call(node) and not is_constant(node)


def _bytes(node: Node) -> Any:
    value = node.meta["val"]
    return product(value.shape) * value.dtype.itemsize


def call_between(first: Node, last: Iterable[Node]) -> bool:
    """Whether a library call depends on `first` and one of `last` on that call."""
    depends: dict[Node, bool] = {first: True}
    stack = list(last)
    while stack:
        node = stack[-1]
        fresh = [n for n in node.all_input_nodes if n > first and n not in depends]
        if node not in depends and fresh:
            stack.extend(fresh)
            continue
        stack.pop()
        depends.setdefault(node, any(depends.get(n, False) for n in node.all_input_nodes))
    return any(reached and is_library_call(node) for node, reached in depends.items() if node is not first)
