"""What is proved of a mask says, for every query and key, what the mask that the graph computes says."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from reference import Recorder
from test_masks import traced
from torch import Tensor
from torch.fx import GraphModule

from fusion_compiler.attention import axes
from fusion_compiler.attention.index_functions import Indexer
from fusion_compiler.attention.limits import Extents
from fusion_compiler.attention.masks import Proof, Term, prove
from fusion_compiler.fused import Mask

BATCH, QUERY, KEY = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("batch", "query", "key"))

# A mask [B, Q, K] of positions i [Q, 1] and j [1, K]; `p` is a position on the device, `n` lengths [B].
Predicate = Callable[..., Tensor]


def mask_of(predicate: Predicate) -> Callable[..., Tensor]:
    def fn(queries: Tensor, keys: Tensor, p: Tensor, n: Tensor) -> Tensor:
        i, j = torch.arange(queries.shape[0])[:, None], torch.arange(keys.shape[0])[None]
        return predicate(i, j, p, n).expand(n.shape[0], queries.shape[0], keys.shape[0])

    return fn


def given(b: int, q: int, k: int, position: int = 3) -> tuple[Tensor, ...]:
    return torch.zeros(q), torch.zeros(k), torch.tensor(position), torch.arange(1, b + 1) * 2


def proved(gm: GraphModule) -> Proof:
    node = next(n for n in reversed(gm.graph.nodes) if n.op != "output")
    shape = axes.shape_of(node)
    symbols = [s if n != 1 else sympy.Integer(0) for s, n in zip((BATCH, QUERY, KEY), shape, strict=True)]
    extent = {s: n for s, n in zip(symbols, shape, strict=True) if n != 1}
    batch = BATCH if shape[0] != 1 else None
    return prove(
        [Term(node, tuple(symbols), additive=False, fill=-torch.inf)],
        Extents(symbols[1], KEY, extent, batch),
        Indexer(),
    )


def visible(
    mask: Mask, b: int, q: int, k: int, last: int, position: int, lengths: list[int], sizes: dict[Any, int]
) -> bool:
    """The documented meaning of a `Mask`; `lengths` holds one for each element of the batch, or one."""
    if mask.kind == "none":
        return True
    newest = int(sympy.sympify(mask.offset).subs(sizes)) + position * mask.position
    newest += q if mask.kind == "causal" else 0
    seen = k <= newest
    seen &= mask.window is None or k > newest - mask.window
    seen &= mask.chunk is None or k // mask.chunk == newest // mask.chunk
    behind = last - q if mask.staggered else 0
    return seen and (mask.padding is None or k < lengths[b % len(lengths)] + mask.padding - behind)


@functools.cache
def check(predicate: Predicate, dynamic: bool, sizes: tuple[tuple[int, int, int], ...]) -> Proof:
    """Compares the proof with the mask at every index; one trace serves all sizes where `dynamic`."""
    proofs, fn = [], mask_of(predicate)
    gm = traced(fn, *given(*sizes[0]), dynamic=dynamic)
    for b, q, k in sizes:
        gm = gm if dynamic else traced(fn, *given(b, q, k))
        found = proved(gm)
        mask = found.mask
        proofs.append(found)
        shapes = [n.meta["val"].shape for n in gm.graph.nodes if n.op == "placeholder"]
        symbols = {axes.size_of(shapes[i][0]): n for i, n in ((0, q), (1, k), (3, b))}
        for position in (0, 3):
            arguments = given(b, q, k, position)
            expected, values = fn(*arguments), Recorder(gm).values(*arguments)
            read = [values[n].reshape(-1).tolist() if n else [0] for n in (found.position, found.lengths)]
            for place in itertools.product(range(b), range(q), range(k)) if mask.kind != "tensor" else ():
                said = visible(mask, *place, q - 1, read[0][0], read[1], symbols)
                assert said == bool(expected[place]), (mask, place)
            if mask.empty_rows == "none" and position + q <= k:  # positions point into the cache
                assert bool(expected.any(-1).all()), mask
    return proofs[0]


SIZES = ((2, 6, 11), (3, 5, 9), (2, 7, 40))

PROVED: dict[str, tuple[Predicate, dict[str, Any]]] = {
    "causal": (lambda i, j, p, n: j <= i, {"kind": "causal", "empty_rows": "none"}),
    "causal by distance": (lambda i, j, p, n: i - j >= 0, {"kind": "causal", "empty_rows": "none"}),
    "causal with a number": (lambda i, j, p, n: j < i + 3, {"kind": "causal", "offset": 2}),
    "static cache": (lambda i, j, p, n: j <= i + p, {"kind": "causal", "position": True, "empty_rows": "none"}),
    "static cache, one more": (lambda i, j, p, n: j - i - 1 <= p, {"kind": "causal", "position": True, "offset": 1}),
    "window": (lambda i, j, p, n: (j <= i) & (j > i - 4), {"kind": "causal", "window": 4, "empty_rows": "none"}),
    "window by distance": (lambda i, j, p, n: (i - j >= 0) & (i - j < 4), {"kind": "causal", "window": 4}),
    "window as what is hidden": (lambda i, j, p, n: ~((j > i) | (i - j >= 4)), {"kind": "causal", "window": 4}),
    "window on both sides": (lambda i, j, p, n: (i - j).abs() <= 3, {"kind": "causal", "offset": 3, "window": 7}),
    "window in a static cache": (
        lambda i, j, p, n: (j <= i + p) & (j > i + p - 4), {"window": 4, "position": True, "empty_rows": "none"},
    ),
    "chunks": (lambda i, j, p, n: (j <= i) & (j // 4 == i // 4), {"kind": "causal", "chunk": 4, "empty_rows": "none"}),
    "chunks rounded down": (
        lambda i, j, p, n: (j <= i) & (torch.div(i, 4, rounding_mode="floor") == torch.floor_divide(j, 4)),
        {"chunk": 4},
    ),
    "from the start of the chunk": (lambda i, j, p, n: (j <= i) & (j >= i // 4 * 4), {"chunk": 4}),
    "less the rest of the chunk": (lambda i, j, p, n: (j <= i) & (j >= i - i % 4), {"chunk": 4, "empty_rows": "none"}),
    "chunks in a static cache": (
        lambda i, j, p, n: (j <= i + p) & ((i + p) // 4 == j // 4),
        {"chunk": 4, "position": True, "empty_rows": "none"},
    ),
    "length of all": (
        lambda i, j, p, n: j < p, {"kind": "length", "position": True, "offset": -1, "empty_rows": "nan"},
    ),
    "padding": (lambda i, j, p, n: j < n[:, None, None], {"kind": "length", "padding": 0, "empty_rows": "nan"}),
    "padding, inclusive": (lambda i, j, p, n: j <= n[:, None, None], {"padding": 1, "empty_rows": "none"}),
    "padding and causal": (
        lambda i, j, p, n: (j <= i) & (j < n[:, None, None]), {"kind": "causal", "padding": 0, "empty_rows": "nan"},
    ),
    "the last of each": (
        lambda i, j, p, n: j <= n[:, None, None] - i.shape[0] + i,
        {"kind": "length", "padding": 0, "staggered": True, "empty_rows": "nan"},
    ),
    "the last of each, and padding": (
        lambda i, j, p, n: (j < n[:, None, None]) & (j <= n[:, None, None] - i.shape[0] + i),
        {"kind": "length", "padding": 0, "staggered": True},
    ),
    "the last of each and causal": (
        lambda i, j, p, n: (j <= i + 3) & (j < n[:, None, None] - i.shape[0] + i),
        {"kind": "causal", "offset": 3, "padding": -1, "staggered": True},
    ),
    "padding of a window": (
        lambda i, j, p, n: (j <= i) & (j > i - 4) & (j < n[:, None, None]), {"window": 4, "padding": 0},
    ),
    "causal up to one length": (
        lambda i, j, p, n: (j <= i) & (j < p), {"kind": "causal", "position": False, "padding": 0, "empty_rows": "nan"},
    ),
    "two causal limits": (lambda i, j, p, n: (j <= i + 2) & (j <= i), {"kind": "causal", "offset": 0}),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PROVED)
def test_proof_holds_everywhere(name: str, dynamic: bool) -> None:
    predicate, expected = PROVED[name]
    mask = check(predicate, dynamic, SIZES).mask
    if dynamic:  # there may be more queries than keys, of which some see nothing
        expected = {field: value for field, value in expected.items() if field != "empty_rows"}
    assert {field: getattr(mask, field) for field in expected} == expected, mask.proof


# Each is a step away from the first: it must not be proved to be the same, and what is proved must hold.
MUTATED: dict[str, list[Predicate]] = {
    "causal": [
        lambda i, j, p, n: j < i, lambda i, j, p, n: j <= i + 1, lambda i, j, p, n: j >= i, lambda i, j, p, n: i <= j,
        lambda i, j, p, n: j <= 2 * i, lambda i, j, p, n: j == i, lambda i, j, p, n: (j <= i) | (j == 9),
        lambda i, j, p, n: (j <= i) & (j != 0), lambda i, j, p, n: (j <= i) & (i != 2),
    ],
    "static cache": [
        lambda i, j, p, n: j < i + p, lambda i, j, p, n: j >= i + p, lambda i, j, p, n: j <= i - p,
        lambda i, j, p, n: j <= p, lambda i, j, p, n: j + p <= i, lambda i, j, p, n: j <= i + 2 * p,
        lambda i, j, p, n: j <= i + n[:, None, None], lambda i, j, p, n: j <= i * p,
    ],
    "window": [
        lambda i, j, p, n: (j <= i) & (j >= i - 4), lambda i, j, p, n: (j < i) & (j > i - 4),
        lambda i, j, p, n: (j >= i) & (j < i + 4), lambda i, j, p, n: (j <= i) | (j > i - 4),
        lambda i, j, p, n: (j <= i) & (j > 4), lambda i, j, p, n: j > i - 4, lambda i, j, p, n: (j <= i) & (j < i - 4),
        lambda i, j, p, n: (j <= i) & (j > i - p),
    ],
    "chunks": [
        lambda i, j, p, n: (j <= i) & (j // 5 == i // 5), lambda i, j, p, n: (j <= i) & (j // 4 == (i + 1) // 4),
        lambda i, j, p, n: (j <= i) & (j // 4 <= i // 4), lambda i, j, p, n: j // 4 == i // 4,
        lambda i, j, p, n: (j >= i) & (j // 4 == i // 4), lambda i, j, p, n: (j <= i) & (j % 4 == i % 4),
        lambda i, j, p, n: (j <= i) & (j // 4 != i // 4), lambda i, j, p, n: (j < i) & (j // 4 == i // 4),
        lambda i, j, p, n: (j <= i + 1) & (j // 4 == i // 4),
        lambda i, j, p, n: (j <= i) & ((j + 1) // 4 == (i + 1) // 4),
        lambda i, j, p, n: (j <= i) & (j >= i // 4 * 3), lambda i, j, p, n: (j <= i) & (i >= j // 4 * 4),
    ],
    "padding": [
        lambda i, j, p, n: j <= n[:, None, None], lambda i, j, p, n: j >= n[:, None, None],
        lambda i, j, p, n: i < n[:, None, None], lambda i, j, p, n: j > n[:, None, None],
        lambda i, j, p, n: j < n[:1, None, None], lambda i, j, p, n: j < n.flip(0)[:, None, None],
        lambda i, j, p, n: j < 2 * n[:, None, None], lambda i, j, p, n: j < p - n[:, None, None],
        lambda i, j, p, n: (j < n[:, None, None]) | (i == 0),
    ],
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("name", "at"), [(n, i) for n, mutants in MUTATED.items() for i in range(len(mutants))])
def test_a_step_away_is_not_the_same(name: str, at: int, dynamic: bool) -> None:
    def meaning(found: Proof) -> tuple[Any, ...]:
        mask, operands = found.mask, [n and n.name for n in (found.position, found.lengths)]
        return mask.kind, mask.offset, mask.window, mask.chunk, mask.padding, operands

    original = check(PROVED[name][0], dynamic, SIZES)
    mutant = check(MUTATED[name][at], dynamic, SIZES[:2])
    assert mutant.mask.kind == "tensor" or meaning(mutant) != meaning(original), mutant
    assert mutant.mask.proof
