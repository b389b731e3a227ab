"""Recognises rotary position embedding: pairs of elements of the last axis, rotated by angles.

    out_a = a·cos − b·sin,    out_b = b·cos + a·sin

with (a, b) the halves of the axis or its even and odd elements. Whatever way it is written (rotate_half, every two,
parts that are joined again, complex numbers, a scatter into an empty tensor), each half of the result is read as a sum
of products of halves of other tensors, and the two sums must be those of a rotation. Partial rotary is a rotation of a
slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from .algebra import Algebra, Value
from .fused import Declared
from .halves import SAME, SUMS, VIEWS, Halves, Part, Style, Sum, Term, Unreadable, pieces_of
from .match import Match, NearMiss
from .semantics import SemanticView
from .shapes import extent, shape_of
from .sites import site_of
from .splice import same_sizes
from .torch_private import fake_tensors

aten = torch.ops.aten
PATTERN = "rope"

INDUCTOR = "Inductor makes one kernel of these pointwise operations already, which moves every byte once"
UNBOUND_ANGLES = (
    "cos and sin are no tensors of their own here, or the halves are joined otherwise than they were taken apart"
)
UNBOUND = f"{UNBOUND_ANGLES}, so no registered kernel can be called"


@dataclass(frozen=True)
class Rotation:
    """What turns x by `others`: `cos` and `sin` are set where these are single tensors, and the rotation is forward."""

    x: Value
    style: Style
    others: tuple[Value, ...]
    cos: Value | None
    sin: Value | None


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """What a kernel registered for this pattern computes, with x [..., D] and cos and sin that broadcast to it or to
    its halves [..., D/2]."""
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    c, s = ((t, t) if t.shape[-1] * 2 == x.shape[-1] else _halves(t, interleaved) for t in (cos, sin))
    turned = a * c[0] - b * s[0], b * c[1] + a * s[1]
    return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)


def _halves(t: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, ...]:
    return (t[..., ::2], t[..., 1::2]) if interleaved else t.chunk(2, dim=-1)


def complex_rope(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """x [..., D] real, its pairs as complex numbers multiplied with `turns` [..., D/2], computed in real numbers."""
    a, b = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    c, s = torch.view_as_real(turns.resolve_conj()).unbind(-1)
    return torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)


def find_rope(view: SemanticView) -> tuple[list[Match], list[NearMiss]]:
    halves = Halves(view)
    closed = halves.with_halved_tensors_closed()
    matches, near_misses = [], []
    for node in view.graph_module.graph.nodes:
        rotation = _rotated(halves, node)
        if rotation is None or rotation.cos is None or rotation.sin is None:  # x may be computed from halves itself
            again = _rotated(closed, node)
            rotation = again if rotation is None or (again is not None and again.cos is not None) else rotation
        if rotation is not None:
            match = _match(view, node, rotation)
            matches += [match] if match is not None else []
        elif _turned(halves, node):
            near_misses.append(NearMiss(PATTERN, node, TURNED, node))
    inside = {n for m in matches for n in m.site.interior}
    return matches, [n for n in near_misses if n.node not in inside]


TURNED = (
    "(−b, a) is made of the halves (a, b) of a tensor, as in rotary embedding, but not added to (a, b)·cos after "
    "multiplication with sin; write x·cos + rotate_half(x)·sin with the same x"
)


def _rotated(halves: Halves, node: Node) -> Rotation | None:
    """The rotation that `node` is the result of."""
    if not _is_real(node) or not _may_join(node):
        return None
    size = shape_of(node)[-1]
    if not isinstance(size, int) or size % 2 or size < 4:
        return None
    for style in ("halves", "pairs"):
        try:
            first, second = (halves.part(node, style, i) for i in (0, 1))
        except Unreadable:
            continue
        found = _rotation(halves.view.algebra, first, second)
        if found is not None:
            # pairs that are put into halves are turned, but `rope` leaves every element in its place
            return found if found.style == style else replace(found, cos=None, sin=None)
    return None


def _turned(halves: Halves, node: Node) -> bool:
    """Whether `node` is (−b, a) of the halves (a, b) of a tensor."""
    if node.target is not aten.cat.default or not _is_real(node):
        return False
    try:
        sums = [halves.whole(part) for part in pieces_of(node, "halves") or pieces_of(node, "pairs") or ()]
    except Unreadable:
        return False
    if [len(s) for s in sums] != [1, 1]:
        return False
    [b], [a] = sums
    if b.coefficient >= 0 or a.coefficient <= 0 or len(a.factors) != len(b.factors):
        return False
    pairs = list(zip(a.factors, b.factors, strict=True))
    return all(p.value is q.value for p, q in pairs) and any((p.index, q.index) == (0, 1) for p, q in pairs)


def _is_real(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.is_floating_point()


def _may_join(node: Node) -> bool:
    """Whether `node` may be where the halves of a rotation meet; most nodes may not, and this is cheap."""
    if node.target in SUMS:
        return any(isinstance(a, Node) and _is_product(a) for a in node.args[:2])
    if node.target in VIEWS:
        source = node.all_input_nodes[0].target
        return source in (aten.cat.default, aten.view_as_real.default)
    return node.target in (aten.cat.default, aten.slice_scatter.default)


def _is_product(node: Node) -> bool:
    while node.target in (*SAME, aten.neg.default):
        node = node.all_input_nodes[0]
    return node.target is aten.mul.Tensor


# ---- rotations --------------------------------------------------------------------------------------
def _rotation(algebra: Algebra, first: Sum, second: Sum) -> Rotation | None:
    """first = a·C − b·S and second = b·C' + a·S' (or the signs the other way round). Where all have one factor, as in
    YaRN, it belongs to cos and sin."""
    if len(first) != 2 or len(second) != 2:
        return None
    for own, other in (first, first[::-1]):
        for a in own.factors:
            b = Part(a.value, a.style, 1)
            if a.index != 0 or a.style not in ("halves", "pairs") or b not in other.factors:
                continue
            for straight, crossed in (second, second[::-1]):
                if b not in straight.factors or a not in crossed.factors:
                    continue
                if own.coefficient * straight.coefficient <= 0 or other.coefficient * crossed.coefficient >= 0:
                    continue
                angles = [_without(t, p) for t, p in ((own, a), (other, b), (straight, b), (crossed, a))]
                if not all(angles) or any(p.value is a.value for angle in angles for p in angle):
                    continue
                factor = own.coefficient
                forward = factor == straight.coefficient == crossed.coefficient == -other.coefficient > 0
                cos = _one(angles[0], angles[2], a.style) if forward else None
                sin = _one(angles[1], angles[3], a.style) if forward else None
                cos, sin = (t and algebra.mul(algebra.const(factor), t) for t in (cos, sin))
                values = dict.fromkeys(p.value for angle in angles for p in angle)
                return Rotation(a.value, a.style, tuple(values), cos, sin)
    return None


def _without(term: Term, part: Part) -> tuple[Part, ...]:
    rest = list(term.factors)
    rest.remove(part)
    return tuple(rest)


def _one(first: tuple[Part, ...], second: tuple[Part, ...], style: Style) -> Value | None:
    """The one tensor whose halves these are, or which both are."""
    if len(first) != 1 or len(second) != 1 or first[0].value is not second[0].value:
        return None
    indices = first[0].index, second[0].index
    whole = not first[0].style and not second[0].style
    parts = first[0].style == second[0].style == style and indices == (0, 1)
    numbers = first[0].style == second[0].style == "complex" and indices in ((0, 0), (1, 1))
    return first[0].value if whole or parts or numbers else None


@dataclass(frozen=True)
class _Bound:
    """A function that computes the rotation of these nodes, and its result without data."""

    function: Callable[..., torch.Tensor]
    nodes: tuple[Node, ...]
    flags: tuple[Any, ...]
    out: torch.Tensor


def _match(view: SemanticView, root: Node, rotation: Rotation) -> Match | None:
    output = root
    while len(output.users) == 1 and next(iter(output.users)).target in SAME:
        output = next(iter(output.users))
    read = [next(iter(_held(view, value, root)), None) for value in (rotation.x, *rotation.others)]
    nodes = tuple(n for n in read if n is not None)
    if len(nodes) < len(read):
        return None
    bound = _bound(view, root, rotation)
    site = site_of(view, output, bound.nodes if bound is not None else nodes)
    return Match(PATTERN, _op(bound, nodes[0], root), site)


def _held(view: SemanticView, value: Value, root: Node) -> list[Node]:
    return [n for n in view.nodes(value) if n < root]


def _bound(view: SemanticView, root: Node, rotation: Rotation) -> _Bound | None:
    """What a kernel is called with; None where cos and sin are no tensors of their own."""
    if rotation.cos is None or rotation.sin is None:
        return None
    shape = root.meta["val"].shape
    xs = [n for n in _held(view, rotation.x, root) if same_sizes(n.meta["val"].shape, shape)]
    cos, sin = (_angle(_held(view, value, root), shape) for value in (rotation.cos, rotation.sin))
    if not xs or cos is None or sin is None:
        return None
    function: Callable[..., torch.Tensor] = rope
    nodes: tuple[Node, ...] = (xs[0], cos, sin)
    flags: tuple[Any, ...] = (rotation.style == "pairs",)
    if cos.meta["val"].is_complex():
        if rotation.style != "pairs" or cos is not sin:
            return None
        function, nodes, flags = complex_rope, (xs[0], cos), ()
    with fake_tensors.mode_of(view.graph_module):
        out = function(*(n.meta["val"] for n in nodes), *flags)
    return _Bound(function, nodes, flags, out) if same_sizes(out.shape, shape) else None


def _angle(held: Sequence[Node], shape: Sequence[Any]) -> Node | None:
    """The one of the nodes `held`, views of each other, that x of `shape` is multiplied with.

    Where several shapes of it broadcast, as [B, S, D] and [B, 1, S, D] do to as many heads as batches, what a product
    reads tells which is meant.
    """
    fitting = [n for n in held if _broadcasts(shape, n.meta["val"])]
    if len({_aligned(n) for n in fitting}) > 1:
        fitting = [n for n in fitting if any(u.target is aten.mul.Tensor for u in n.users)]
    return fitting[0] if len({_aligned(n) for n in fitting}) == 1 else None


def _aligned(node: Node) -> tuple[Any, ...]:
    """A shape as broadcasting sees it: without ones in front."""
    shape = tuple(extent(s) for s in node.meta["val"].shape)
    return shape[next((i for i, s in enumerate(shape) if s != 1), len(shape)) :]


def _broadcasts(shape: Sequence[Any], angle: torch.Tensor) -> bool:
    """Whether `angle` broadcasts to `shape`, or to half of its last axis, as complex numbers have to."""
    if angle.dim() == 0:
        return False
    wanted, have = [extent(s) for s in shape], [extent(s) for s in angle.shape]
    lengths = (2 * have[-1],) if angle.is_complex() else (2 * have[-1], have[-1])
    if len(have) > len(wanted) or wanted[-1] not in lengths:
        return False
    return all(h in (1, w) for h, w in zip(have[-2::-1], wanted[-2::-1], strict=False))


def _op(bound: _Bound | None, x: Node, root: Node) -> Declared:
    tensors = tuple(n.meta["val"] for n in (bound.nodes if bound else ()))
    shapes = (x.meta["val"].shape, *(t.shape for t in tensors))
    sizes = {extent(s): s for shape in shapes for s in shape if isinstance(s, torch.SymInt)}
    return Declared(
        pattern=PATTERN,
        function=bound.function if bound else find_rope,  # for which no kernel can be registered
        arguments=(*tensors, *(bound.flags if bound else ())),
        transposed=(False,) * len(tensors),
        dtype=x.meta["val"].dtype,
        out=(bound.out if bound else root.meta["val"],),
        flops=0,
        sizes=tuple(sizes.values()),
        ungenerated=INDUCTOR if bound else f"{INDUCTOR}; {UNBOUND}",
        respelled="computed in real numbers" if bound and bound.function is complex_rope else "",
    )
