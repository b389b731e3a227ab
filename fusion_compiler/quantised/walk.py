"""What the elements of a node are computed from, asked back from chosen places through the graph.

A node that no rule takes, or whose rule gives up, is read as it is: it becomes a source. Places are positions in a
tensor seen flat, in row-major order, whatever its strides.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..torch_private.fake_tensors import contents
from .elements import Bits, Element, Number, Read, Term, constant, is_constant, is_integer, joined, number

aten, prims = torch.ops.aten, torch.ops.prims
SHAPES = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default, aten.clone.default, aten.detach.default, aten.alias.default,
    aten.lift_fresh_copy.default,
})  # fmt: skip
CASTS = frozenset({prims.convert_element_type.default, aten._to_copy.default})
RIGHT = frozenset({aten.__rshift__.Scalar, aten.__rshift__.Tensor, aten.bitwise_right_shift.Tensor,
                   aten.bitwise_right_shift.Tensor_Scalar})  # fmt: skip
LEFT = frozenset({aten.__lshift__.Scalar, aten.__lshift__.Tensor, aten.bitwise_left_shift.Tensor,
                  aten.bitwise_left_shift.Tensor_Scalar})  # fmt: skip
MOST = 64  # sources and steps: what computes a weight from codes is a short expression


class Walk:
    """The elements of the nodes of one graph."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm

    def at(self, node: Node, places: Tensor) -> Element | None:
        """The elements of `node` at `places` (int64 [P]); None for a type without a meaning here."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not all(isinstance(s, int) for s in value.shape):
            return None
        rule = self._rule(node)
        found = rule(node, places) if rule is not None else None
        return self._source(node, value, places) if found is None else found

    def _rule(self, node: Node) -> Callable[[Node, Tensor], Element | None] | None:
        target: Any = node.target
        if node.op == "get_attr":
            return self._held
        if node.op != "call_function":
            return None
        if target in SHAPES:
            return lambda n, p: self.at(n.args[0], p)  # type: ignore[arg-type]
        if target in CASTS:
            return self._cast
        if target in RIGHT or target in LEFT:
            return self._shift
        return _RULES.get(target)(self) if target in _RULES else None  # type: ignore[misc]

    def _source(self, node: Node, value: Tensor, places: Tensor) -> Element | None:
        if node.op == "call_function" and not value.is_contiguous():
            return None  # what is computed may come to lie otherwise in the end
        position = _dot(_unravelled(places, value.shape), value.stride()).expand_as(places)
        item = value.dtype.itemsize
        if value.dtype.is_floating_point:
            return Number(
                (Term(torch.ones_like(places, dtype=torch.float64), (Read(node, position * item, value.dtype),)),),
                value.dtype,
            )
        if not is_integer(value.dtype):
            return None
        width = torch.full_like(places, 8 * item)
        return Bits(node, position * 8 * item, width, torch.zeros_like(places), value.dtype.is_signed, value.dtype)

    # ---- constants ---------------------------------------------------------------------------
    def _held(self, node: Node, places: Tensor) -> Element | None:
        """A tensor that the graph itself holds, such as `torch.tensor([0, 4])`; a long one may be a weight."""
        held = contents(getattr(self.gm, str(node.target), None))
        if held is None or held.numel() > MOST:
            return None
        return constant(held.flatten().cpu()[places], held.dtype)

    def _iota(self, node: Node, places: Tensor) -> Element | None:
        start, step = node.kwargs["start"], node.kwargs["step"]
        if not isinstance(start, int) or not isinstance(step, int):
            return None
        return constant(start + step * places, node.meta["val"].dtype)

    def _full(self, node: Node, places: Tensor) -> Element | None:
        value = node.args[1]
        if not isinstance(value, (int, float)):
            return None
        return constant(torch.full_like(places, value, dtype=torch.float64), node.meta["val"].dtype)

    # ---- places ------------------------------------------------------------------------------
    def _permute(self, node: Node, places: Tensor) -> Element | None:
        source: Any = node.args[0]
        shape = source.meta["val"].shape
        order = _order(node, len(shape))
        index = _unravelled(places, node.meta["val"].shape)
        back: list[Any] = [None] * len(shape)
        for axis, held in enumerate(order):
            back[held] = index[axis]
        return self.at(source, _flat(back, shape))

    def _expand(self, node: Node, places: Tensor) -> Element | None:
        source: Any = node.args[0]
        return self._broadcast(source, node, places)

    def _broadcast(self, source: Any, out: Node, places: Tensor) -> Element | None:
        """The elements of `source`, a node or a number, where it is repeated to the shape of `out`."""
        dtype = out.meta["val"].dtype
        if isinstance(source, (int, float)):
            return constant(torch.full_like(places, source, dtype=torch.float64), dtype)
        if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
            return None
        shape = source.meta["val"].shape
        index = _unravelled(places, out.meta["val"].shape)[-len(shape) :] if len(shape) else []
        return self.at(
            source,
            _flat([i if s != 1 else torch.zeros_like(i) for i, s in zip(index, shape, strict=True)], shape, places),
        )

    def _slice(self, node: Node, places: Tensor) -> Element | None:
        source, dim, start, _, step = _filled(node, (None, 0, None, None, 1))
        return self._part(source, node, dim, start or 0, step, places)

    def _select(self, node: Node, places: Tensor) -> Element | None:
        source, dim, which = _filled(node, (None, 0, 0))
        return self._at_one(node, source, dim, which, places)

    def _at_one(self, node: Node, source: Node, dim: int, which: int, places: Tensor) -> Element | None:
        shape = source.meta["val"].shape
        dim %= len(shape)
        index = _unravelled(places, node.meta["val"].shape)
        index.insert(dim, torch.full_like(places, which % shape[dim]))
        return self.at(source, _flat(index, shape))

    def _getitem(self, node: Node, places: Tensor) -> Element | None:
        split: Any = node.args[0]
        if split.target not in (aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int):
            return None
        which: Any = node.args[1]
        if split.target is aten.unbind.int:
            source, dim = _filled(split, (None, 0))
            return self._at_one(node, source, dim, which, places)
        source, sizes, dim = _filled(split, (None, None, 0))
        before = which * sizes if isinstance(sizes, int) else sum(sizes[:which])
        return self._part(source, node, dim, before, 1, places)

    def _part(self, source: Node, node: Node, dim: int, start: int, step: int, places: Tensor) -> Element | None:
        shape = source.meta["val"].shape
        dim %= len(shape)
        index = _unravelled(places, node.meta["val"].shape)
        index[dim] = (start + shape[dim] if start < 0 else start) + step * index[dim]
        return self.at(source, _flat(index, shape))

    def _cat(self, node: Node, places: Tensor) -> Element | None:
        tensors, dim = _filled(node, (None, 0))
        dim %= node.meta["val"].dim()
        index = _unravelled(places, node.meta["val"].shape)
        parts: list[tuple[Tensor, Element]] = []
        begin = 0
        for tensor in tensors:
            shape = tensor.meta["val"].shape
            mine = ((index[dim] >= begin) & (index[dim] < begin + shape[dim])).nonzero().squeeze(1)
            if len(mine):
                inner = [i[mine] for i in index]
                inner[dim] = inner[dim] - begin
                element = self.at(tensor, _flat(inner, shape))
                if element is None or tensor.meta["val"].dtype != node.meta["val"].dtype:
                    return None
                parts.append((mine, element))
            begin += shape[dim]
        return joined(parts, len(places))

    # ---- meanings of bits --------------------------------------------------------------------
    def _view_dtype(self, node: Node, places: Tensor) -> Element | None:
        source: Any = node.args[0]
        dtype, held = node.meta["val"].dtype, source.meta["val"].dtype
        if dtype.itemsize < held.itemsize:
            ratio = held.itemsize // dtype.itemsize
            bits = _as_bits(self.at(source, places // ratio))
            if bits is None:
                return None
            bits = replace(bits, bit=bits.bit + 8 * dtype.itemsize * (places % ratio))
        else:
            ratio = dtype.itemsize // held.itemsize
            pieces = [_as_bits(self.at(source, places * ratio + i)) for i in range(ratio)]
            bits = pieces[0]
            for i, piece in enumerate(pieces):
                if bits is None or piece is None or piece.source is not bits.source:
                    return None
                if not torch.equal(piece.bit, bits.bit + 8 * held.itemsize * i):
                    return None
            assert bits is not None
        if dtype.is_floating_point:
            ones = torch.ones_like(places, dtype=torch.float64)
            return Number((Term(ones, (Read(bits.source, bits.bit // 8, dtype),)),), dtype)
        return replace(bits, width=torch.full_like(places, 8 * dtype.itemsize), signed=dtype.is_signed, dtype=dtype)

    def _cast(self, node: Node, places: Tensor) -> Element | None:
        source: Any = node.args[0]
        element, dtype = self.at(source, places), node.meta["val"].dtype
        if element is None:
            return None
        if dtype.is_floating_point:
            return number(element, dtype)
        if not is_integer(dtype) or not is_integer(element.dtype):
            return None
        if isinstance(element, Bits):
            return element.cast(dtype)
        made = replace(element, dtype=dtype)
        return made if made.fits() else None

    def _mask(self, node: Node, places: Tensor) -> Element | None:
        a, b = (self._operand(x, node, places) for x in node.args)
        if isinstance(b, Bits):
            a, b = b, a
        mask = _one_number(b)
        return a.masked(mask) if isinstance(a, Bits) and mask is not None else None

    def _shift(self, node: Node, places: Tensor) -> Element | None:
        a, by = (self._operand(x, node, places) for x in node.args)
        if not isinstance(a, Bits) or by is None or not is_constant(by):
            return None
        amount = _constants(by).long()
        return a.right(amount) if node.target in RIGHT else a.moved_left(amount)

    # ---- arithmetic --------------------------------------------------------------------------
    def _operand(self, argument: Any, out: Node, places: Tensor) -> Element | None:
        """An operand of an elementwise operation, in the type of its result."""
        element = self._broadcast(argument, out, places)
        dtype = out.meta["val"].dtype
        if element is None or element.dtype == dtype:
            return element
        if isinstance(element, Bits) and is_integer(dtype):
            return element.cast(dtype)
        return number(element, dtype)

    def _arithmetic(self, node: Node, places: Tensor) -> Element | None:
        dtype = node.meta["val"].dtype
        operands = [self._operand(x, node, places) for x in node.args[:2]]
        a, b = (None if e is None else number(e, dtype) for e in operands)
        if a is None or b is None:
            return None
        alpha: Any = node.kwargs.get("alpha", 1)
        if node.target is aten.mul.Tensor:
            result = a * b
        elif node.target is aten.div.Tensor:
            if not is_constant(b) or not dtype.is_floating_point:
                return None
            result = a * constant(1 / _constants(b), dtype)
        else:
            result = a + b.scaled(alpha if node.target is aten.add.Tensor else -alpha)
        return result if dtype.is_floating_point or result.fits() else None

    def _rsub(self, node: Node, places: Tensor) -> Element | None:
        dtype = node.meta["val"].dtype
        operands = [self._operand(x, node, places) for x in node.args[:2]]
        a, b = (None if e is None else number(e, dtype) for e in operands)
        if a is None or b is None or node.kwargs or len(node.args) > 2:
            return None
        result = b + a.scaled(-1)
        return result if dtype.is_floating_point or result.fits() else None


def _method(name: str) -> Callable[[Walk], Callable[[Node, Tensor], Element | None]]:
    return lambda walk: getattr(walk, name)


_RULES: dict[Any, Callable[[Walk], Callable[[Node, Tensor], Element | None]]] = {
    prims.iota.default: _method("_iota"),
    aten.full.default: _method("_full"),
    aten.permute.default: _method("_permute"),
    aten.t.default: _method("_permute"),
    aten.transpose.int: _method("_permute"),
    aten.expand.default: _method("_expand"),
    aten.slice.Tensor: _method("_slice"),
    aten.select.int: _method("_select"),
    operator.getitem: _method("_getitem"),
    aten.cat.default: _method("_cat"),
    aten.view.dtype: _method("_view_dtype"),
    aten.bitwise_and.Scalar: _method("_mask"),
    aten.bitwise_and.Tensor: _method("_mask"),
    aten.add.Tensor: _method("_arithmetic"),
    aten.sub.Tensor: _method("_arithmetic"),
    aten.mul.Tensor: _method("_arithmetic"),
    aten.div.Tensor: _method("_arithmetic"),
    aten.rsub.Scalar: _method("_rsub"),
    aten.rsub.Tensor: _method("_rsub"),
}


# ---- index arithmetic ---------------------------------------------------------------------------
def _unravelled(places: Tensor, shape: Sequence[int]) -> list[Tensor]:
    index = []
    for size in reversed(shape):
        index.append(places % size)
        places = places // size
    return index[::-1]


def _dot(index: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    terms = [i * s for i, s in zip(index, strides, strict=True)]
    return torch.stack(terms).sum(0) if terms else torch.zeros(1, dtype=torch.int64)


def _flat(index: Sequence[Tensor], shape: Sequence[int], like: Tensor | None = None) -> Tensor:
    if not index:
        assert like is not None
        return torch.zeros_like(like)
    flat = torch.zeros_like(index[0])
    for i, size in zip(index, shape, strict=True):
        flat = flat * size + i
    return flat


def _order(node: Node, rank: int) -> list[int]:
    if node.target is aten.permute.default:
        return [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    a, b = (0, rank - 1) if node.target is aten.t.default else (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return order


def _filled(node: Node, defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given = [*node.args, *defaults[len(node.args) :]]
    return tuple(node.kwargs.get(name, value) for name, value in zip(names, given, strict=False))


# ---- constants ----------------------------------------------------------------------------------
def _constants(element: Element) -> Tensor:
    assert isinstance(element, Number)
    return torch.stack([t.factor for t in element.terms]).sum(0)


def _one_number(element: Element | None) -> int | None:
    if element is None or not is_constant(element):
        return None
    values = _constants(element)
    return int(values[0]) if bool((values == values[0]).all()) else None


def _as_bits(element: Element | None) -> Bits | None:
    """Whole elements as the bits that hold them."""
    if isinstance(element, Bits):
        whole = bool((element.width == 8 * element.dtype.itemsize).all()) and not bool(element.left.any())
        return element if whole else None
    if isinstance(element, Number) and len(element.terms) == 1:
        (term,) = element.terms
        if len(term.atoms) == 1 and isinstance(term.atoms[0], Read) and bool((term.factor == 1).all()):
            read = term.atoms[0]
            if read.dtype == element.dtype:
                width = torch.full_like(read.byte, 8 * read.dtype.itemsize)
                return Bits(read.source, 8 * read.byte, width, torch.zeros_like(read.byte), True, torch.int64)
    return None
