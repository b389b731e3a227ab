"""Random spellings must match, and whatever matches must say what eager computes.

Programs are drawn from a small grammar: a norm in front or not, two linears or one, an activation, casts, views and
copies between. In the first test every choice is a right one. In the second each choice may be a wrong one (another
axis, eps outside of the root, a weight for each position, another input for the second linear …) and sizes are
often equal, so that what is confused fits: most must not match, and what does is compared with eager all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import matmul_spellings as spell
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from norm_spellings import LAYER, RMS
from reference import Recorder, evaluate, evaluate_group
from spelled_graphs import Weights, graph, weights
from torch import Tensor

from fusion_compiler.fused import MatmulFamily, MatmulGroup
from fusion_compiler.match import Match, find_all
from fusion_compiler.patterns import BUILTIN
from fusion_compiler.semantics import SemanticView

PATTERNS = [p for p in BUILTIN if p.name in ("gated_mlp", "norm_linear", "qkv_projection", "linear_epilogue")]
QUICK = settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)  # fmt: skip
TOLERANCE = {torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}

Function = Callable[[Tensor, Weights], Any]


def check(function: Function, x: Tensor, w: Weights, dynamic: bool = False) -> list[Match]:
    """All matches in `function`, each compared with eager; those of the function's (first) result are returned."""
    gm = graph(function, x, w, dynamic)
    view = SemanticView(gm)
    matches, _ = find_all(view, PATTERNS)
    values = Recorder(gm).values(x, *w) if matches else {}
    for match in matches:
        eager = values[match.site.output].double()
        for op, site in ((match.op, match.site), *match.alternatives):
            if isinstance(op, MatmulGroup) and not dynamic:
                for node, got in zip(site.outputs, evaluate_group(op, site, values), strict=True):
                    wanted = values[node].double()
                    assert (got.reshape(wanted.shape) - wanted).abs().max() < TOLERANCE[x.dtype] * (
                        1 + wanted.abs().max()
                    )
            if dynamic or not isinstance(op, MatmulFamily) or not eager.isfinite().all():
                continue  # with symbolic sizes the static form is what is evaluated
            got = evaluate(op, site, values).reshape(eager.shape)
            error = (got - eager).abs().max() / (eager.abs().max() + 1e-3)
            assert error < TOLERANCE[x.dtype], (match.pattern, op, error)
    result = gm.graph.output_node().args[0]
    result = result[0] if isinstance(result, (tuple, list)) else result
    return [m for m in matches if view.value(m.site.output) is view.value(result)]


def inputs(leading: tuple[int, ...], k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Weights]:
    torch.manual_seed(len(leading) + k + n)
    return torch.randn(*leading, k, dtype=dtype) + 0.3, weights(dtype, k, n)


# ---- right choices ------------------------------------------------------------------------------
def _same(t: Tensor) -> Tensor:
    return t


NOISE: list[Callable[[Tensor], Tensor]] = [
    _same, lambda t: t.clone(), lambda t: t.float().to(t.dtype), lambda t: t.unsqueeze(0).squeeze(0),
    lambda t: t.reshape(-1).view(t.shape), lambda t: t.detach(), lambda t: t * 1.0, lambda t: t + 0.0,
    lambda t: t.contiguous().reshape(-1, t.shape[-1]).reshape(t.shape), lambda t: t.transpose(0, -1).transpose(0, -1),
]  # fmt: skip
PRODUCTS: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [  # of x, w [n, k] and its transpose's copy [k, n]
    lambda x, w, t: F.linear(x, w), lambda x, w, t: x @ w.T, lambda x, w, t: torch.matmul(x, w.mT),
    lambda x, w, t: x @ t, lambda x, w, t: torch.einsum("...k,nk->...n", x, w),
    lambda x, w, t: torch.mm(x.reshape(-1, x.shape[-1]), w.t()).view(*x.shape[:-1], -1),
]  # fmt: skip
NORMS = [f"RMSNorm: {name}" for name in RMS] + [f"LayerNorm: {name}" for name in LAYER]
SIZES = st.lists(st.sampled_from([1, 2, 3, 5, 8]), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16])


def _norm(name: str, k: int) -> Function:
    assume(k % 4 == 0 or "two axes" not in name)  # that one splits the axis in four
    kind, spelling = name.split(": ", 1)
    return {"RMSNorm": RMS, "LayerNorm": LAYER}[kind][spelling]


@QUICK
@given(
    leading=SIZES, k=st.integers(2, 40), n=st.integers(2, 40), dtype=DTYPES, norm=st.none() | st.sampled_from(NORMS),
    act=st.sampled_from(list(spell.ACTIVATIONS)), product=st.sampled_from(PRODUCTS), swapped=st.booleans(),
    biased=st.tuples(st.booleans(), st.booleans()), noise=st.lists(st.sampled_from(NOISE), min_size=5, max_size=5),
)  # fmt: skip
def test_gated_mlps_match(leading, k, n, dtype, norm, act, product, swapped, biased, noise):
    def mlp(x: Tensor, w: Weights) -> Tensor:
        h = noise[0](_norm(norm, k)(x, w) if norm else x)
        gate, up = product(h, w.gate, w.gate_kn), product(h, w.up, w.up_kn)
        gate, up = (noise[1](gate + w.b_gate if biased[0] else gate), noise[2](up + w.b_up if biased[1] else up))
        active = noise[3](spell.ACTIVATIONS[act](gate))
        return noise[4](up * active if swapped else active * up)

    matched = check(mlp, *inputs(leading, k, n, dtype))
    assert {m.pattern for m in matched} == {"gated_mlp"}


@QUICK
@given(
    leading=SIZES, k=st.integers(2, 40), n=st.integers(2, 40), dtype=DTYPES, norm=st.sampled_from(NORMS),
    product=st.sampled_from(PRODUCTS), biased=st.booleans(), dynamic=st.booleans(),
    noise=st.lists(st.sampled_from(NOISE), min_size=3, max_size=3),
)  # fmt: skip
def test_linears_behind_norms_match(leading, k, n, dtype, norm, product, biased, dynamic, noise):
    def behind(x: Tensor, w: Weights) -> Tensor:
        h = product(noise[1](_norm(norm, k)(noise[0](x), w)), w.gate, w.gate_kn)
        return noise[2](h + w.b_gate if biased else h)

    matched = check(behind, *inputs(leading, k, n, dtype), dynamic=dynamic and min(leading, default=1) > 1)
    assert {m.pattern for m in matched} == {"norm_linear"}


@QUICK
@given(
    leading=SIZES, k=st.integers(2, 40), n=st.integers(2, 40), dtype=DTYPES, norm=st.none() | st.sampled_from(NORMS),
    act=st.sampled_from(list(spell.ACTIVATIONS)),
    product=st.sampled_from(PRODUCTS), biased=st.booleans(),
    noise=st.lists(st.sampled_from(NOISE), min_size=3, max_size=3),
)  # fmt: skip
def test_linears_and_their_activations_match(leading, k, n, dtype, norm, act, product, biased, noise):
    def activated(x: Tensor, w: spell.Weights) -> Tensor:
        h = product(noise[0](_norm(norm, k)(x, w) if norm else x), w.gate, w.gate_kn)
        return noise[2](spell.ACTIVATIONS[act](noise[1](h + w.b_gate if biased else h)))

    matched = check(activated, *inputs(leading, k, n, dtype))
    assert "linear_epilogue" in {m.pattern for m in matched}


@QUICK
@given(
    leading=SIZES, k=st.integers(2, 40), n=st.integers(2, 40), dtype=DTYPES, norm=st.none() | st.sampled_from(NORMS),
    product=st.sampled_from(PRODUCTS), biased=st.booleans(), scaled=st.booleans(),
    noise=st.lists(st.sampled_from(NOISE), min_size=3, max_size=3),
)  # fmt: skip
def test_projections_of_one_input_match(leading, k, n, dtype, norm, product, biased, scaled, noise):
    def projections(x: Tensor, w: Weights) -> tuple[Tensor, ...]:
        h = noise[0](_norm(norm, k)(x, w) if norm else x)
        first, second = product(h, w.gate, w.gate_kn), product(h, w.up, w.up_kn)
        return noise[1](first + w.b_gate if biased else first), noise[2](second * 0.5 if scaled else second)

    x, w = inputs(leading, k, n, dtype)
    matched = find_all(SemanticView(graph(projections, x, w)), PATTERNS)[0]
    assert "qkv_projection" in {m.pattern for m in matched}
    check(projections, x, w)


@QUICK
@given(
    leading=SIZES, k=st.integers(2, 40), n=st.integers(2, 40), dtype=DTYPES, second=st.booleans(),
    name=st.sampled_from(list(spell.EPILOGUES)), product=st.sampled_from(PRODUCTS),
    noise=st.lists(st.sampled_from(NOISE), min_size=2, max_size=2),
)  # fmt: skip
def test_epilogues_are_what_eager_computes(leading, k, n, dtype, name, product, second, noise):
    """A spelled epilogue, and behind it another linear whose residual it is, with a result read twice."""

    def chain(x: Tensor, w: Weights) -> Any:
        assume(n <= 2 * k)
        h = noise[0](spell.EPILOGUES[name](x, w))
        return (noise[1](product(x.tanh(), w.up, w.up_kn) + h), h.softmax(-1)) if second else h

    x, w = inputs(leading or (1,), k, n, dtype)
    check(chain, x, w)


# ---- choices that may be wrong ------------------------------------------------------------------
CENTRES = [
    lambda x: x,
    lambda x: x - x.mean(-1, True),
    lambda x: x - x.mean(-2, True),
    lambda x: x - 0.5 * x.mean(-1, True),
    lambda x: x - x.mean(-1),
    lambda x: x + 1,
    lambda x: 2 * x,
    lambda x: x - x.amax(-1, True),
]
STATISTICS = [
    lambda x: x.pow(2).mean(-1, True),
    lambda x: x.pow(2).mean(-2, True),
    lambda x: x.pow(2).mean(-1),
    lambda x: x.pow(2).sum(-1, True),
    lambda x: x.pow(2).sum(-1, True) / x.shape[-1],
    lambda x: x.abs().mean(-1, True),
    lambda x: x.var(-1, unbiased=True, keepdim=True),
    lambda x: x.var(-1, unbiased=False, keepdim=True),
    lambda x: x.pow(4).mean(-1, True),
    lambda x: x.pow(2).mean((-1, -2), True),
    lambda x: x.pow(2).sum(-1, True) / 3,
    lambda x: x.pow(2).mean(-1, True) - x.mean(-1, True).pow(2),
    lambda x: x.pow(2).mean(-1, True) - x.mean(-1, True),
]
ROOTS = [
    lambda s: torch.rsqrt(s + 1e-2),
    lambda s: 1 / (torch.sqrt(s) + 1e-2),
    lambda s: torch.rsqrt(s.clamp(min=0.5)),
    lambda s: (s + 0.1) ** -0.5,
    lambda s: torch.sqrt(s + 0.1),
    lambda s: 1 / torch.sqrt(s + 0.1),
    lambda s: s + 0.1,
    lambda s: torch.rsqrt(2 * s + 0.1),
    lambda s: math.sqrt(s.shape[-2]) * torch.rsqrt(s + 0.3),
]
SCALES = [
    lambda h, w: h,
    lambda h, w: h * w.g,
    lambda h, w: h * (1 + w.g),
    lambda h, w: h * w.g + w.b,
    lambda h, w: h + w.b,
    lambda h, w: h * w.g * w.b,
    lambda h, w: (h + w.b) * w.g,
    lambda h, w: h * w.g[:, None] if h.shape[-2] == len(w.g) else h,
    lambda h, w: h * (2 - w.g),
    lambda h, w: h * w.g.mean(),
    lambda h, w: h * h,
    lambda h, w: 2 * h * w.g,
    lambda h, w: w.b - h * w.g,
]
ACTS = [
    *spell.ACTIVATIONS.values(),
    lambda x: x,
    torch.tanh,
    torch.exp,
    lambda x: x * torch.sigmoid(1.702 * x),
    lambda x: 0.5 * x * (1 + torch.tanh(x)),
    lambda x: 0.5 * x * (1 + torch.erf(x)),
    lambda x: x * (1 + torch.erf(x / 2**0.5)),
    lambda x: x / (2 + torch.exp(-x)),
    lambda x: x / (1 + torch.exp(x)),
    lambda x: F.relu(x) ** 3,
    lambda x: 3 * F.silu(x),
    lambda x: x * torch.exp(x) / (1 + torch.exp(-x)),
    lambda x: x * torch.sigmoid(-x),
    lambda x: 1 - torch.sigmoid(x),
]
SECONDS = [  # the other input and weight
    lambda x, h, w: F.linear(h, w.up),
    lambda x, h, w: F.linear(x, w.up),
    lambda x, h, w: F.linear(h, w.gate),
    lambda x, h, w: h @ w.up_kn,
    lambda x, h, w: F.linear(h + 1, w.up),
    lambda x, h, w: F.linear(2 * h, w.up),
    lambda x, h, w: F.silu(F.linear(h, w.up)),
    lambda x, h, w: F.linear(h, w.up).mT.reshape(*h.shape[:-1], -1),
    lambda x, h, w: F.linear(h, w.packed).chunk(2, -1)[1],
    lambda x, h, w: F.linear(h, w.packed, w.b_packed)[..., : len(w.up)],
    lambda x, h, w: F.linear(h.mT.reshape(h.shape), w.up),
    lambda x, h, w: F.linear(h, w.up)[..., :1],
]
ENDS = [
    lambda y, w: y,
    lambda y, w: y + w.b_up,
    lambda y, w: y * 2,
    lambda y, w: y.sum(-1),
    lambda y, w: y + y.mT.reshape(y.shape),
    lambda y, w: y * torch.arange(y.shape[-2]).to(y.dtype)[:, None],
    lambda y, w: y.reshape(-1)[None],
    lambda y, w: y.relu(),
]


@settings(QUICK, max_examples=100)
@given(
    leading=st.sampled_from([(4,), (3, 4), (1, 4), (5,), (2, 2, 4)]), n=st.sampled_from([4, 4, 6]),
    centre=st.sampled_from([CENTRES[0], *CENTRES]), statistic=st.sampled_from(STATISTICS), root=st.sampled_from(ROOTS),
    scale=st.sampled_from(SCALES), act=st.sampled_from(ACTS), second=st.none() | st.sampled_from(SECONDS),
    end=st.sampled_from(ENDS), of_centred=st.booleans(),
    kept=st.sampled_from(["", "gate", "norm"]), normed=st.booleans(),
)  # fmt: skip
def test_what_matches_is_what_eager_computes(
    leading, n, centre, statistic, root, scale, act, second, end, of_centred, kept, normed
):
    def program(x: Tensor, w: Weights) -> Any:
        h = x
        if normed:
            c = centre(x)
            h = scale(c * root(statistic(c if of_centred else x)), w)
        gate = F.linear(h, w.gate)
        result = end(act(gate) if second is None else act(gate) * second(x, h, w), w)
        return {"": result, "gate": (result, gate), "norm": (result, h)}[kept]

    x, w = inputs(leading, 4, n, torch.float32)
    try:
        program(x, w)
    except (RuntimeError, IndexError):
        assume(False)  # shapes that do not go together
    check(program, x, w)


@pytest.mark.parametrize("pattern", spell.REFUSED)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (1, 1), ()], ids=str)
def test_lookalikes_are_never_taken_wrongly(pattern, shape):
    for name, function in spell.REFUSED[pattern].items():
        if shape or name != "other axis":
            check(function, *inputs(shape, 4, 4, torch.float32))
