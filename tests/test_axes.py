"""Views as factorised axes: what they say of every element is what torch does."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compiler.attention import axes
from fusion_compiler.attention.axes import Atom, View, align, repeat
from fusion_compiler.attention.index_functions import read_index

I = sympy.Integer  # noqa: E741
SHAPE = (2, 6, 1, 4)


def last_tensor(gm: GraphModule) -> Node:
    return next(n for n in reversed(gm.graph.nodes) if n.op != "output")


VIEWS = {
    "permuted": lambda x: x.permute(3, 0, 2, 1),
    "transposed": lambda x: x.transpose(1, 3),
    "split": lambda x: x.view(2, 2, 3, 4),
    "joined": lambda x: x.view(12, 4),
    "flat": lambda x: x.reshape(-1),
    "grouped repeat": lambda x: x[:, :, None].expand(2, 6, 3, 1, 4).reshape(2, 18, 1, 4),
    "tiled repeat": lambda x: x[:, None].expand(2, 3, 6, 1, 4).reshape(2, 18, 1, 4),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1),
    "repeat": lambda x: x.repeat(1, 3, 2, 1),
    "permuted, copied, joined": lambda x: x.permute(0, 3, 2, 1).contiguous().view(8, 6),
    "unit dimensions": lambda x: x.squeeze(2).unsqueeze(0).unsqueeze(-1),
    "whole slice": lambda x: x[:, 0:6],
}


@pytest.mark.parametrize("name", VIEWS)
def test_elements_of_views(name: str) -> None:
    x = torch.arange(math.prod(SHAPE), dtype=torch.float32).view(SHAPE)
    gm = make_fx(VIEWS[name], tracing_mode="fake")(x)
    view = axes.trail(last_tensor(gm))[-1]
    assert view.source.op == "placeholder"
    expected = VIEWS[name](x)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in expected.shape)).reshape(-1, expected.dim())[::5]:
        read = read_index(view, tuple(I(int(i)) for i in place))
        assert x[tuple(int(i) for i in read)] == expected[tuple(place)]


def test_order_of_heads_is_told_apart() -> None:
    x = torch.zeros(2, 4, 5, 8)
    grouped, tiled = (
        axes.trail(last_tensor(make_fx(f, tracing_mode="fake")(x)))[-1]
        for f in (
            lambda x: x[:, :, None].expand(2, 4, 3, 5, 8).reshape(2, 12, 5, 8),
            lambda x: x[:, None].expand(2, 3, 4, 5, 8).reshape(2, 12, 5, 8),
        )
    )
    assert grouped.dims[1] == (Atom(1, I(1), I(4)), repeat(I(3)))
    assert tiled.dims[1] == (repeat(I(3)), Atom(1, I(1), I(4)))
    assert [v.source.op for v in axes.unrepeated([grouped])] == ["placeholder"]


def test_symbolic_sizes_split_and_join() -> None:
    def fn(x: Tensor) -> Tensor:
        b, s, _ = x.shape
        heads = x.view(b, s, 4, 8).transpose(1, 2)
        return heads[:, :, None].expand(b, 4, 3, s, 8).reshape(b * 12, s, 8)

    view = axes.trail(last_tensor(make_fx(fn, tracing_mode="symbolic")(torch.zeros(5, 7, 32))))[-1]
    batch, length = axes.shape_of(view.source)[:2]
    assert view.source.op == "placeholder"
    assert view.dims == (
        (Atom(0, I(1), batch), Atom(2, I(8), I(4)), repeat(I(3))), (Atom(1, I(1), length),), (Atom(2, I(1), I(8)),)
    )  # fmt: skip


def test_a_split_across_two_dimensions_is_no_view_by_axes() -> None:
    gm = make_fx(lambda x: x.view(3, 4, 4), tracing_mode="fake")(torch.zeros(SHAPE))
    assert axes.trail(last_tensor(gm))[-1].source.op != "placeholder"


def test_a_slice_is_no_view_of_the_whole() -> None:
    gm = make_fx(lambda x: x[:, 1:], tracing_mode="fake")(torch.zeros(2, 6))
    assert axes.trail(last_tensor(gm))[-1].source.op != "placeholder"


def test_casts_that_lose_nothing_are_looked_through() -> None:
    half, single = torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3)

    def deepest(f: object, x: Tensor) -> str:
        return axes.trail(last_tensor(make_fx(f, tracing_mode="fake")(x)))[-1].source.op

    assert deepest(lambda x: x.float().t(), half) == "placeholder"
    assert deepest(lambda x: x.float().bfloat16(), half) == "placeholder"
    assert deepest(lambda x: x.bfloat16().float(), single) != "placeholder"
    assert deepest(lambda x: x.half().float().bfloat16(), half) != "placeholder"


def test_align_finds_the_common_refinement_or_says_none() -> None:
    s = sympy.Symbol("s", integer=True, positive=True)
    rows = align([[repeat(I(6))], [repeat(I(2)), repeat(I(3))]])
    assert rows is not None and [r[0].size for r in rows] == [2, 3]
    assert align([[repeat(I(2)), repeat(I(3))], [repeat(I(3)), repeat(I(2))]]) is None
    rows = align([[Atom(0, I(1), 12 * s)], [repeat(s), repeat(I(4)), repeat(I(3))]])
    assert rows is not None and [r[0] for r in rows] == [Atom(0, I(12), s), Atom(0, I(3), I(4)), Atom(0, I(1), I(3))]
    assert align([[repeat(I(4))], [repeat(I(2))]]) is None


def test_views_compose() -> None:
    gm = make_fx(lambda x: x.view(2, 3, 2, 4).permute(2, 0, 1, 3), tracing_mode="fake")(torch.zeros(2, 6, 4))
    outer = View.of(last_tensor(gm))
    once = outer.through(axes.step(last_tensor(gm)) or outer)
    assert once is not None
    twice = once.through(axes.step(once.source) or outer)
    assert twice is not None
    assert twice.dims == (
        (Atom(1, I(1), I(2)),),
        (Atom(0, I(1), I(2)),),
        (Atom(1, I(2), I(3)),),
        (Atom(2, I(1), I(4)),),
    )
