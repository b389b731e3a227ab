"""Masks are proved from their index functions, and nothing is proved that is not so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compiler.attention import axes
from fusion_compiler.attention.index_functions import Choice, Indexer, leaves
from fusion_compiler.attention.limits import Extents
from fusion_compiler.attention.masks import Proof, Term, prove

QUERY, KEY = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("query", "key"))
Function = Callable[..., Any]


def traced(fn: Function, *args: Tensor, dynamic: bool = False) -> GraphModule:
    mode = "symbolic" if dynamic else "fake"
    return make_fx(fn, tracing_mode=mode, decomposition_table=select_decomp_table())(*args)


def proof(
    fn: Function, *args: Tensor, additive: bool = False, fill: float = -torch.inf, dynamic: bool = False
) -> Proof:
    """What is proved of the mask [queries, keys] that `fn` returns."""
    gm = traced(fn, *args, dynamic=dynamic)
    node = next(n for n in reversed(gm.graph.nodes) if n.op != "output")
    queries, keys = axes.shape_of(node)[-2:]
    query = sympy.Integer(0) if queries == 1 else QUERY
    index = (*[sympy.Integer(0)] * (len(axes.shape_of(node)) - 2), query, KEY)
    extent = {KEY: keys} if queries == 1 else {QUERY: queries, KEY: keys}
    return prove([Term(node, index, additive=additive, fill=fill)], Extents(query, KEY, extent), Indexer())


def rows(n: int) -> Tensor:
    return torch.arange(n)[:, None]


def columns(n: int) -> Tensor:
    return torch.arange(n)[None]


def packs() -> Tensor:
    return torch.zeros(8).cumsum(0)


CAUSAL = {
    "k <= q": lambda: columns(8) <= rows(8),
    "q >= k": lambda: rows(8) >= columns(8),
    "not k > q": lambda: ~(columns(8) > rows(8)),
    "k < q + 1": lambda: columns(8) < rows(8) + 1,
    "k - q <= 0": lambda: columns(8) - rows(8) <= 0,
    "tril": lambda: torch.tril(torch.ones(8, 8, dtype=torch.bool)),
    "not triu 1": lambda: torch.triu(torch.ones(8, 8), diagonal=1) == 0,
    "corner of a larger tril": lambda: torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16)[0, 0, :8, :8] != 0,
    "and of what always holds": lambda: (columns(8) <= rows(8)) & (columns(8) >= 0) & (rows(8) < 8),
    "or of what never holds": lambda: (columns(8) <= rows(8)) | (columns(8) > 7 + rows(8)),
    "concatenated": lambda: torch.cat([torch.arange(3), torch.arange(3, 8)])[None] <= rows(8),
    "indexed": lambda: torch.arange(8)[columns(8)] <= torch.arange(8)[rows(8)],
    "equal packs": lambda: (
        (columns(8) <= rows(8)) & (torch.zeros(8).cumsum(0)[rows(8)] == torch.zeros(8).cumsum(0)[columns(8)])
    ),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name: str) -> None:
    mask = proof(CAUSAL[name]).mask
    assert (mask.kind, mask.offset, mask.window, mask.position) == ("causal", 0, None, False), mask.proof
    assert mask.empty_rows == "none"


NOT_CAUSAL = {
    "strictly below": lambda: columns(8) < rows(8),
    "above": lambda: columns(8) >= rows(8),
    "only itself": lambda: columns(8) == rows(8),
    "two rows at once": lambda: columns(8) <= 2 * rows(8),
    "blocks": lambda: columns(8) <= rows(8) | 1,
    "or a prefix": lambda: (columns(8) <= rows(8)) | (columns(8) < 3),
    "hides all": lambda: columns(8) < rows(8) * 0,
}


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_not_causal(name: str) -> None:
    mask = proof(NOT_CAUSAL[name]).mask
    assert mask.kind == "tensor" or (mask.offset, mask.empty_rows) == (-1, "nan"), mask
    assert mask.proof


def test_offsets() -> None:
    assert proof(lambda: columns(12) <= rows(4) + 8).mask.offset == 8
    assert proof(lambda: columns(12) <= rows(4) + 11).mask.kind == "none"  # the first query sees them all
    assert proof(lambda: columns(12) <= rows(4) + 10).mask.kind == "causal"


def test_nothing_masked() -> None:
    for fn in (lambda: torch.ones(4, 8, dtype=torch.bool), lambda: columns(8) < 8, lambda: rows(4) - columns(8) <= 3):
        assert proof(fn).mask.kind == "none"
    assert proof(lambda: torch.zeros(4, 8), additive=True).mask.kind == "none"


def test_sliding_window() -> None:
    mask = proof(lambda: (columns(8) <= rows(8)) & (columns(8) > rows(8) - 3)).mask
    assert (mask.kind, mask.window, mask.empty_rows) == ("causal", 3, "none")
    assert (
        proof(lambda: (columns(8) <= rows(8)) & (columns(8) > rows(8) - 8)).mask.window is None
    )  # as wide as the keys
    beyond = proof(lambda: (columns(8) <= rows(12)) & (columns(8) > rows(12) - 3)).mask
    assert beyond.empty_rows != "none"  # query 11 looks at keys 9, 10, 11, of which there are none


@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
def test_additive(value: float) -> None:
    mask = proof(lambda: torch.where(columns(8) <= rows(8), 0.0, value), additive=True).mask
    assert (mask.kind, mask.offset) == ("causal", 0)
    assert proof(lambda: torch.full((8, 8), value).triu(1), additive=True).mask.kind == "causal"


def test_additive_that_hides_nothing_or_not_enough() -> None:
    assert proof(lambda: torch.where(columns(8) <= rows(8), 0.0, -10.0), additive=True).mask.kind == "tensor"
    assert proof(lambda: torch.where(columns(8) <= rows(8), 1.0, -torch.inf), additive=True).mask.kind == "tensor"
    slopes = proof(lambda: (columns(8) - rows(8)) * 0.5, additive=True).mask
    assert slopes.kind == "tensor" and "neither 0" in slopes.proof  # ALiBi
    assert proof(lambda: columns(8) <= rows(8), fill=-100.0).mask.kind == "tensor"


def test_finite_fill_needs_a_visible_key() -> None:
    below = proof(lambda: columns(8) < rows(8), fill=-1e30).mask
    assert (below.kind, below.empty_rows) == ("tensor", "mean")
    assert proof(lambda: columns(8) < rows(8)).mask.empty_rows == "nan"


def test_position_on_the_device() -> None:
    position = torch.tensor(5)
    single = proof(lambda p: columns(16) <= torch.arange(1)[:, None] + p, position)
    assert (single.mask.kind, single.mask.offset, single.mask.position) == ("length", 0, True)
    assert single.position is not None and single.position.op == "placeholder"
    several = proof(lambda p: columns(16) <= rows(4) + p + 2, position)
    assert (several.mask.kind, several.mask.offset, several.mask.position) == ("causal", 2, True)
    window = proof(lambda p: (columns(16) <= rows(4) + p) & (columns(16) > rows(4) + p - 4), position)
    assert (window.mask.window, window.mask.position) == (4, True)
    one = proof(lambda p: columns(16) <= p[:, None], torch.tensor([5]))
    assert one.mask.kind == "length"


def test_positions_that_differ_by_row_stay_a_tensor() -> None:
    several = proof(lambda p: columns(16) <= p[:, None], torch.arange(4))
    assert several.mask.kind == "tensor" and "p" in several.mask.proof
    assert several.mask.empty_rows == "none"  # positions count from 0, so every row sees key 0
    negative = proof(lambda p: columns(16) <= rows(4) - p, torch.tensor(5)).mask
    assert negative.kind == "tensor" or negative.empty_rows == "nan"
    padded = proof(lambda m: (columns(8) <= rows(8)) & m[None], torch.ones(8, dtype=torch.bool)).mask
    assert (padded.kind, padded.empty_rows) == ("tensor", "nan")


def test_symbolic_lengths() -> None:
    def causal(x: Tensor) -> Tensor:
        n = x.shape[0]
        position = torch.arange(n)[None]
        packs = (torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)[0]
        return (columns(n) <= rows(n)) & (packs[:, None] == packs[None])

    mask = proof(causal, torch.zeros(8), dynamic=True).mask
    assert (mask.kind, mask.offset) == ("causal", 0), mask.proof

    def later(x: Tensor, past: Tensor) -> Tensor:
        n, total = x.shape[0], x.shape[0] + past.shape[0]
        return columns(total) <= rows(n) + past.shape[0]

    offset = proof(later, torch.zeros(8), torch.zeros(5), dynamic=True).mask
    assert offset.kind == "causal" and str(offset.offset).startswith("s")


def test_index_functions_agree_with_torch() -> None:
    """Every element of a mask, evaluated at its index."""

    def fn() -> Tensor:
        base = torch.full((6, 6), -2.0).tril(1) + torch.cat([torch.zeros(6, 2), torch.ones(6, 4)], 1)
        return torch.where(columns(6) - rows(6) >= 2, base * 3, base - 1)[1:, ::2]

    expected, gm = fn(), traced(fn)
    node = next(n for n in reversed(gm.graph.nodes) if n.op != "output")
    term = Indexer().at(node, (QUERY, KEY))
    assert isinstance(term, Choice)
    for q in range(expected.shape[0]):
        for k in range(expected.shape[1]):
            (value,) = {v.subs({QUERY: q, KEY: k}) for c, v in leaves(term) if c.subs({QUERY: q, KEY: k}) == sympy.true}
            assert float(value) == expected[q, k]
