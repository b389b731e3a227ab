"""Tensors of a graph as functions of their indices.

`Indexer.at(node, index)` evaluates the subgraph below a tensor at symbolic indices and returns a sympy number, a sympy
Boolean, or a `Choice` between numbers: a causal mask becomes the relation k <= q. Nodes that cannot be seen into
(inputs, unknown operations) become uninterpreted functions of their indices, so an evaluation never fails; only what is
proved from it later can. Indices are integer symbols that are not negative.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import sympy
import torch
from torch.fx import Node

from . import axes
from .choices import (
    LOAD,
    ZERO,
    Choice,
    Term,
    as_held,
    choice,
    comparable,
    constant,
    is_read,
    is_truth,
    leaves,
    lift,
    number,
    truth,
)

aten = torch.ops.aten
prims = torch.ops.prims

Index = tuple[sympy.Expr, ...]


ARITHMETIC: dict[Any, Callable[..., Any]] = {
    aten.add: operator.add, aten.sub: operator.sub, aten.mul: operator.mul, aten.neg: operator.neg,
    aten.minimum: sympy.Min, aten.maximum: sympy.Max, aten.abs: sympy.Abs,
}  # fmt: skip
RELATIONS: dict[Any, Callable[..., Any]] = {
    aten.le: sympy.Le, aten.lt: sympy.Lt, aten.ge: sympy.Ge, aten.gt: sympy.Gt, aten.eq: sympy.Eq, aten.ne: sympy.Ne,
}  # fmt: skip
LOGIC: dict[Any, Callable[..., Any]] = {
    aten.bitwise_and: sympy.And, aten.logical_and: sympy.And, aten.bitwise_or: sympy.Or, aten.logical_or: sympy.Or,
    aten.bitwise_not: sympy.Not, aten.logical_not: sympy.Not, aten.bitwise_xor: sympy.Xor, aten.logical_xor: sympy.Xor,
}  # fmt: skip


class Indexer:
    """Evaluates tensors of one graph at indices, each once. `loads` names the node behind an uninterpreted function."""

    def __init__(self) -> None:
        self.loads: dict[sympy.Basic, Node] = {}
        self._known: dict[tuple[Node, Index], Term] = {}

    def at(self, node: Node, index: Index) -> Term:
        """The element of `node` at `index`, one expression per dimension."""
        key = (node, index)
        if key not in self._known:
            term = self._evaluate(node, index)
            term = None if term is None else as_held(term, node.meta["val"].dtype)
            self._known[key] = self.element(node, index) if term is None else term
        return self._known[key]

    def element(self, node: Node, index: Index) -> Term:
        """The element as one that is read, whatever the node computes."""
        value = node.meta.get("val")
        dtype = value.dtype if isinstance(value, torch.Tensor) else torch.int64
        exact = not dtype.is_floating_point
        if index:
            head = sympy.Function(f"{LOAD}{node.name}", integer=exact or None, real=True)
            term = head(*index)
        else:
            head = term = sympy.Symbol(f"{LOAD}{node.name}", integer=exact or None, real=True)
        self.loads[head] = node
        return sympy.Ne(term, 0) if dtype == torch.bool else term

    def _argument(self, argument: Any, index: Index) -> Term:
        """An argument of a pointwise operation whose result is read at `index`."""
        if not isinstance(argument, Node):
            return constant(argument)
        value = argument.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return constant(value)
        shape = axes.shape_of(argument)
        own = index[len(index) - len(shape) :]
        return self.at(argument, tuple(ZERO if n == 1 else i for n, i in zip(shape, own, strict=True)))

    def _evaluate(self, node: Node, index: Index) -> Term | None:
        if node.op == "get_attr" and (held := axes.scalar_of(node)) is not None:
            return constant(held)
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        target: Any = node.target
        packet = getattr(target, "overloadpacket", None)
        if packet in _SPECIAL:
            return _SPECIAL[packet](self, node, index)
        view = axes.step(node)
        if view is not None:
            return self.at(view.source, read_index(view, index))
        if packet not in ARITHMETIC and packet not in RELATIONS and packet not in LOGIC:
            return None
        terms = [self._argument(a, index) for a in node.args]
        if packet in LOGIC:
            whether = node.meta["val"].dtype == torch.bool  # of integers the operations on bits are of each bit
            return LOGIC[packet](*map(truth, terms)) if whether else None
        terms = [number(t) for t in terms]
        if packet in RELATIONS:
            values = [a.meta.get("val") for a in node.args if isinstance(a, Node)]
            dtypes, ordered = {v.dtype for v in values if isinstance(v, torch.Tensor)}, packet not in (aten.eq, aten.ne)
            whole = all(x.is_integer for t in terms for _, x in leaves(t))
            if not all(comparable(t, dtype, ordered=ordered, whole=whole) for t in terms for dtype in dtypes):
                return None
            return truth(lift(lambda a, b: choice(RELATIONS[packet](a, b), sympy.Integer(1), ZERO), *terms))
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            terms[1] = lift(lambda x: x * constant(alpha), terms[1])
        return lift(ARITHMETIC[packet], *terms)

    # ---- operations that are not pointwise --------------------------------------------------
    def _iota(self, node: Node, index: Index) -> Term:
        start, stride = (constant(node.kwargs[k]) if not isinstance(node.kwargs[k], Node) else
                         constant(cast(Node, node.kwargs[k]).meta["val"]) for k in ("start", "step"))  # fmt: skip
        return start + stride * index[0]

    def _full(self, node: Node, index: Index) -> Term:
        return self._argument(node.args[1], index)

    def _scalar(self, node: Node, index: Index) -> Term:
        return self._argument(node.args[0], index)

    def _ones(self, node: Node, index: Index) -> Term:
        return sympy.true if node.meta["val"].dtype == torch.bool else sympy.Integer(1)

    def _zeros(self, node: Node, index: Index) -> Term:
        return sympy.false if node.meta["val"].dtype == torch.bool else ZERO

    def _cast(self, node: Node, index: Index) -> Term | None:
        source = cast(Node, node.args[0]).meta["val"].dtype
        term, dtype = self._argument(node.args[0], index), node.meta["val"].dtype
        if dtype == torch.bool:
            return truth(term)
        narrows = not dtype.is_floating_point and torch.promote_types(source, dtype) != dtype
        if narrows and any(is_read(x) for _, x in leaves(term)):
            return None
        return number(term)

    def _where(self, node: Node, index: Index) -> Term:
        condition, yes, no = (self._argument(a, index) for a in node.args)
        return choice(truth(condition), yes, no)

    def _masked_fill(self, node: Node, index: Index) -> Term:
        x, condition, fill = (self._argument(a, index) for a in node.args)
        return choice(truth(condition), fill, x)

    def _divide(self, node: Node, index: Index) -> Term | None:
        """Integer division; sympy's floor and Mod are those of Python, which torch's rounding down follows."""
        a, b = (number(self._argument(x, index)) for x in node.args[:2])
        mode = node.kwargs.get("rounding_mode", "floor" if node.target is aten.floor_divide.default else None)
        exact = isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr) and a.is_integer and b.is_integer
        if mode is None or not exact or not b.is_positive or (mode == "trunc" and not a.is_nonnegative):
            return None
        return sympy.floor(a / b)

    def _remainder(self, node: Node, index: Index) -> Term | None:
        a, b = (number(self._argument(x, index)) for x in node.args)
        exact = isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr) and a.is_integer and b.is_integer
        return sympy.Mod(a, b) if exact and b.is_positive else None

    def _triangle(self, node: Node, index: Index) -> Term:
        diagonal = constant(node.args[1] if len(node.args) > 1 else 0)
        reach = index[-1] - index[-2]
        lower = node.target is aten.tril.default
        kept = sympy.Le(reach, diagonal) if lower else sympy.Ge(reach, diagonal)
        term = self._argument(node.args[0], index)
        return choice(kept, term, sympy.false if is_truth(term) else ZERO)

    def _slice(self, node: Node, index: Index) -> Term | None:
        source = cast(Node, node.args[0])
        dim, start, stride = (_or(node.args, i, default) for i, default in ((1, 0), (2, 0), (4, 1)))
        if not all(isinstance(x, (int, torch.SymInt)) for x in (start, stride)):
            return None
        first, moved, size = constant(start), list(index), axes.shape_of(source)[dim]
        if first.is_negative:
            first = sympy.Max(first + size, 0)
        moved[dim] = first + index[dim] * constant(stride)
        return self.at(source, tuple(moved))

    def _select(self, node: Node, index: Index) -> Term | None:
        source, dim, at = cast(Node, node.args[0]), cast(int, node.args[1]), node.args[2]
        if not isinstance(at, (int, torch.SymInt)):
            return None
        position, dim = constant(at), dim % len(axes.shape_of(source))
        if position.is_negative:
            position += axes.shape_of(source)[dim]
        return self.at(source, (*index[:dim], position, *index[dim:]))

    def _cat(self, node: Node, index: Index) -> Term:
        parts, dim = cast(Sequence[Node], node.args[0]), _or(node.args, 1, 0) % len(index)
        starts = [ZERO]
        for part in parts:
            starts.append(starts[-1] + axes.shape_of(part)[dim])
        pieces = [
            number(self.at(part, (*index[:dim], index[dim] - start, *index[dim + 1 :])))
            for part, start in zip(parts, starts, strict=False)
        ]
        term = pieces[-1]
        for piece, end in zip(pieces[-2::-1], starts[-2:0:-1], strict=True):
            term = choice(sympy.Lt(index[dim], end), piece, term)
        return truth(term) if node.meta["val"].dtype == torch.bool else term

    def _index(self, node: Node, index: Index) -> Term | None:
        source, lookups = cast(Node, node.args[0]), cast(Sequence[Node | None], node.args[1])
        used = [d for d, t in enumerate(lookups) if t is not None]
        if any(t is not None and t.meta["val"].dtype == torch.bool for t in lookups):
            return None
        if used != list(range(used[0], used[-1] + 1)):
            return None  # the looked-up dimensions move to the front
        rank = max(len(axes.shape_of(t)) for t in lookups if t is not None)
        inner = index[used[0] : used[0] + rank]
        rest = [*index[: used[0]], *index[used[0] + rank :]]
        looked = [number(self._argument(lookups[d], inner)) for d in used]
        if any(isinstance(i, Choice) or not i.is_nonnegative for i in looked):
            return None  # a negative index counts from the end
        return self.at(source, (*rest[: used[0]], *looked, *rest[used[0] :]))

    def _cumsum(self, node: Node, index: Index) -> Term | None:
        """The running sum of what does not change along the dimension."""
        dim = cast(int, node.args[1]) % len(index) if index else 0
        along = sympy.Dummy("along", integer=True, nonnegative=True)
        term = number(self._argument(node.args[0], (*index[:dim], along, *index[dim + 1 :])))
        if isinstance(term, Choice) or along in term.free_symbols:
            return None
        return term * (index[dim] + 1) if index else term


def _or(args: Sequence[Any], i: int, default: int) -> Any:
    """The i-th argument, or its default where it is left out or None; symbolic sizes by value."""
    value = args[i] if len(args) > i and args[i] is not None else default
    return value.meta["val"] if isinstance(value, Node) else value


def read_index(view: axes.View, index: Index) -> Index:
    """Where the element `index` of a view lies in the view's source."""
    read = [ZERO for _ in axes.shape_of(view.source)]
    for dim, i in zip(view.dims, index, strict=True):
        inner: sympy.Expr = sympy.Integer(1)
        for position, atom in reversed(list(enumerate(dim))):
            digit = sympy.floor(i / inner)
            if position > 0:
                digit = sympy.Mod(digit, atom.size)
            inner *= atom.size
            if atom.axis is not None:
                read[atom.axis] += digit * atom.step
    return tuple(read)


_SPECIAL: dict[Any, Callable[[Indexer, Node, Index], Term | None]] = {
    prims.iota: Indexer._iota,
    aten.full: Indexer._full, aten.full_like: Indexer._full,
    aten.scalar_tensor: Indexer._scalar,
    aten.ones: Indexer._ones, aten.ones_like: Indexer._ones,
    aten.zeros: Indexer._zeros, aten.zeros_like: Indexer._zeros,
    prims.convert_element_type: Indexer._cast, aten._to_copy: Indexer._cast,
    aten.where: Indexer._where, aten.masked_fill: Indexer._masked_fill,
    aten.div: Indexer._divide, aten.floor_divide: Indexer._divide, aten.remainder: Indexer._remainder,
    aten.tril: Indexer._triangle, aten.triu: Indexer._triangle,
    aten.slice: Indexer._slice, aten.select: Indexer._select, aten.cat: Indexer._cat,
    aten.index: Indexer._index, aten.cumsum: Indexer._cumsum,
}  # fmt: skip
