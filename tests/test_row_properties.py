"""Random norms, residuals with norms, softmaxes and rotary embeddings, right and nearly right ones.

Spelled rightly they must match. Whatever matches is computed as its description says and, where a kernel is generated,
by that kernel in Triton's interpreter in the place of the matched nodes; both must give what eager does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import matmul_spellings as spell
import pytest
import rope_spellings
import test_attention_properties as attention
import test_properties as matmul
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import Recorder, evaluate_declared, evaluate_rows
from torch import Tensor

from fusion_compiler import layout, splice
from fusion_compiler.fused import Declared, RowReduction
from fusion_compiler.legality import Legality
from fusion_compiler.lowering.triton_codegen import TritonCodegen
from fusion_compiler.machine import TABLE
from fusion_compiler.match import find_all
from fusion_compiler.pattern import trace
from fusion_compiler.patterns import BUILTIN
from fusion_compiler.semantics import SemanticView

PATTERNS = [p for p in BUILTIN if p.name in ("norm", "add_norm", "softmax", "rope")]
QUICK = settings(matmul.QUICK, max_examples=25)


def agree(got: Tensor, eager: Tensor, what: Any) -> None:
    got, eager = got.double().reshape(eager.shape), eager.double()
    assert torch.equal(got.isnan(), eager.isnan()), what
    assert torch.equal(got.isinf(), eager.isinf()), what
    got, eager = (t.nan_to_num(0.0, 0.0, 0.0) for t in (got, eager))
    assert (got - eager).abs().max() <= 2e-4 * (eager.abs().max() + 1e-2), (what, got, eager)


def check(function: Callable[..., Any], *args: Tensor) -> list[str]:
    """The patterns found in `function`, each compared with eager."""
    gm = trace(function, args)
    gm.graph.eliminate_dead_code()
    matches, _ = find_all(SemanticView(gm), PATTERNS)
    values = Recorder(gm).values(*args) if matches else {}
    eager = function(*args)
    for position, match in enumerate(matches):
        op, site = match.op, match.site
        assert isinstance(op, (RowReduction, Declared))
        if isinstance(op, Declared) and not op.arguments:
            continue  # a rotation that no kernel can be called for
        results = (evaluate_rows if isinstance(op, RowReduction) else evaluate_declared)(op, site, values)
        for node, result in zip(site.outputs, results, strict=True):
            agree(result, values[node], (match.pattern, op))
        if isinstance(op, RowReduction) and Legality(gm.graph).check(site) is None:
            replaced = generated(copy.deepcopy(gm), position)(*args)
            several = isinstance(eager, tuple)
            for result, wanted in zip(replaced, eager, strict=True) if several else [(replaced, eager)]:
                agree(result, wanted, (match.pattern, op))
    return [m.pattern for m in matches]


def generated(gm: torch.fx.GraphModule, position: int) -> torch.fx.GraphModule:
    """The graph with a generated kernel in the place of a match."""
    match = find_all(SemanticView(gm), PATTERNS)[0][position]
    candidates = TritonCodegen().candidates(match.op, TABLE["h200"])
    if isinstance(candidates, list):
        builder = splice.Builder(gm, match.site.place)
        for part, new in splice.emitted(candidates[0], builder, match.site):
            splice.replace(part, layout.fit(builder, part, new))
        splice.clean(gm)
    return gm


# ---- norms --------------------------------------------------------------------------------------
RESIDUALS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, r: x + r,
    lambda x, r: r + x,
    lambda x, r: torch.add(x, r * 1.0),
    lambda x, r: x.view(-1, x.shape[-1]).add(r.view(-1, x.shape[-1])).view(x.shape),
]


@QUICK
@given(
    leading=matmul.SIZES.filter(bool), n=st.integers(2, 40), norm=st.sampled_from(matmul.NORMS),
    residual=st.none() | st.sampled_from(RESIDUALS),
    noise=st.lists(st.sampled_from(matmul.NOISE), min_size=2, max_size=2),
)  # fmt: skip
def test_norms_match(leading, n, norm, residual, noise):
    spelled = matmul._norm(norm, n)

    def normed(x: Tensor, r: Tensor, *w: Tensor) -> Any:
        h = noise[0](x if residual is None else residual(x, r))
        y = noise[1](spelled(h, spell.Weights(*w)))
        return y if residual is None else (y, h * 2)

    x, w = matmul.inputs(leading, n, 4, torch.float32)
    found = check(normed, x, x.flip(-1) * 0.7, *w)
    assert ("norm" if residual is None else "add_norm") in found


WRONG_RESIDUALS = [
    lambda x, r: x,
    lambda x, r: x - r,
    lambda x, r: x + 2 * r,
    lambda x, r: x * r,
    lambda x, r: x + r[..., :1],
    lambda x, r: x + r.mean(-2, keepdim=True),
    lambda x, r: x + r.mT if r.shape[-1] == r.shape[-2] else x,
    lambda x, r: x + r.sum(),
    lambda x, r: x + 1.0,
    lambda x, r: x + r.flip(-1),
    lambda x, r: torch.maximum(x, r),
]
READ_AGAIN = [
    lambda y, h, x: y,
    lambda y, h, x: (y, h),
    lambda y, h, x: (y, h + y),
    lambda y, h, x: (y.cumsum(-1), h.cumsum(-1)),
    lambda y, h, x: (h.mT, y),
    lambda y, h, x: y + h,
    lambda y, h, x: (y, h.sum(-1)),
    lambda y, h, x: (y, x + 1),
    lambda y, h, x: y.mT.contiguous(),
    lambda y, h, x: (y * y.mean(-1, keepdim=True), h),
]


@settings(QUICK, max_examples=60)
@given(
    leading=st.sampled_from([(4,), (3, 4), (1, 4), (1,), (2, 2, 4)]),
    residual=st.sampled_from(RESIDUALS[:1]) | st.sampled_from(WRONG_RESIDUALS),
    centre=st.sampled_from([matmul.CENTRES[0], *matmul.CENTRES]), statistic=st.sampled_from(matmul.STATISTICS),
    root=st.sampled_from(matmul.ROOTS), scale=st.sampled_from(matmul.SCALES), end=st.sampled_from(READ_AGAIN),
    of_centred=st.booleans(), of_sum=st.sampled_from([True, True, False]), wide=st.booleans(),
)  # fmt: skip
def test_what_matches_as_a_norm_is_what_eager_computes(
    leading, residual, centre, statistic, root, scale, end, of_centred, of_sum, wide
):
    def program(x: Tensor, r: Tensor, *w: Tensor) -> Any:
        h = residual(x, r)
        h = h.double().float() if wide else h
        c = centre(h)
        of = c if of_centred else h if of_sum else x
        return end(scale(c * root(statistic(of)), spell.Weights(*w)), h, x)

    x, w = matmul.inputs(leading, 4, 4, torch.float32)
    args = (x, x.flip(-1) * 0.7, *w)
    try:
        program(*args)
    except (RuntimeError, IndexError):
        assume(False)  # shapes that do not go together
    check(program, *args)


# ---- softmax ------------------------------------------------------------------------------------
def any_of(spellings: list[Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from(spellings)


@QUICK
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(lambda sizes: (*sizes, 2 + sum(sizes) % 7)),
    softmax=any_of([attention.SOFTMAXES[0], attention.SOFTMAXES[2]]), scale=any_of([1.0, 0.5, -2.0]),
)  # fmt: skip
def test_softmaxes_match(shape, softmax, scale):
    assert "softmax" in check(lambda s: softmax(s * scale), torch.randn(shape))


@settings(QUICK, max_examples=60)
@given(
    shape=any_of([(1, 1, 4, 4), (2, 2, 4, 4), (4, 4, 4, 4), (2, 1, 1, 4), (1, 2, 4, 6)]),
    masked=attention.mostly(attention.MASKED[:1], attention.MASKED),
    softmax=attention.mostly(attention.SOFTMAXES, attention.WRONG_SOFTMAXES), end=any_of(READ_AGAIN),
)  # fmt: skip
def test_what_matches_as_a_softmax_is_what_eager_computes(shape, masked, softmax, end):
    def program(s: Tensor) -> Any:
        scores = masked(s)
        return end(softmax(scores), scores, s)

    torch.manual_seed(sum(shape))
    s = torch.randn(shape)
    try:
        eager, exact = program(s), program(s.double())
    except (RuntimeError, IndexError):
        assume(False)
    if isinstance(eager, Tensor):
        eager, exact = (eager,), (exact,)
    close = (
        torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4, equal_nan=True) for a, b in zip(eager, exact, strict=True)
    )
    assume(all(close))  # eager itself loses a small number beside 1e9
    check(program, s)


# ---- rotary embedding ---------------------------------------------------------------------------
@QUICK
@given(
    spelling=any_of(list(rope_spellings.MATCHED.values())), b=st.integers(1, 3), h=st.integers(1, 3),
    length=st.integers(2, 6), d=any_of([8, 12, 16]), dtype=any_of([torch.float32, torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_rotations_match(spelling, b, h, length, d, dtype):
    x, angles = torch.randn(b, h, length, d), torch.randn(length, d // 2)
    if dtype == torch.float32:
        assert "rope" in check(spelling, x, angles)
    else:
        gm = trace(spelling, (x.to(dtype), angles))
        assert "rope" in [m.pattern for m in find_all(SemanticView(gm), PATTERNS)[0]]


SPLITS: list[Callable[[Tensor], tuple[Tensor, Tensor]]] = [
    lambda x: x.chunk(2, dim=-1),
    lambda x: (x[..., ::2], x[..., 1::2]),
]
JOINS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: torch.cat((a, b), dim=-1),
    lambda a, b: torch.stack((a, b), dim=-1).flatten(-2),
    lambda a, b: torch.cat((a, b), dim=-2).reshape(*a.shape[:-1], -1),
    lambda a, b: torch.stack((a, b), dim=-2).flatten(-2),
]
FACTORS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda c, s: c,
    lambda c, s: s,
    lambda c, s: -s,
    lambda c, s: 1.1 * s,
    lambda c, s: c + s,
    lambda c, s: c.flip(-1),
    lambda c, s: s.flip(0),
    lambda c, s: s * 0 + 0.5,
]
RIGHT = (0, 0, 2, 1, 0, 1, 0, 1)  # per term of a·cos − b·sin and b·cos + a·sin: which half, which factor


@settings(QUICK, max_examples=60)
@given(
    split=any_of(SPLITS), again=st.none() | any_of(SPLITS), join=any_of(JOINS),
    changed=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=2), full=st.booleans(),
    shift=any_of([0.0, 0.0, 0.0, 1.0]), sign=any_of([1, 1, -1]), shape=any_of([(2, 2, 4, 8), (1, 4, 4, 4), (2, 4, 8)]),
)  # fmt: skip
def test_what_matches_as_a_rotation_is_what_eager_computes(split, again, join, changed, full, shift, sign, shape):
    which = list(RIGHT)
    which[2:4] = [1, 2]  # b · −sin
    which[0:2], which[4:6], which[6:8] = [0, 0], [1, 0], [0, 1]
    for position, value in changed:
        which[position] = value % 2 if position % 2 == 0 else value

    def program(x: Tensor, angles: Tensor) -> Tensor:
        cos, sin = angles.cos(), angles.sin()
        if full:
            (cos, _), (sin, _) = ((again or split)(torch.cat((t, t), -1)) for t in (cos, sin))
        halves, others = split(x), split(x + shift)
        if again is not None:
            others = again(x)
        terms = [
            (halves if i % 2 == 0 else others)[which[2 * i]] * FACTORS[which[2 * i + 1]](cos, sin) for i in range(4)
        ]
        return join(terms[0] + terms[1], terms[2] + sign * terms[3])

    torch.manual_seed(0)
    check(program, torch.randn(shape), torch.randn(shape[-2], shape[-1] // 2))


@pytest.mark.parametrize("name", rope_spellings.REFUSED)
def test_rotations_that_are_none(name):
    check(rope_spellings.REFUSED[name], torch.randn(2, 2, 4, 8), torch.randn(4, 4))
