"""Random spellings of attention must match, and whatever matches must say what eager computes.

In the first test every choice is a right one. In the second each choice may be a wrong one (the softmax over another
axis, the mask off by one, keys repeated in another order than values, the probabilities read again …), with sizes so
often equal that what is confused fits. What matches is computed twice: as its description says, and by torch's kernel
in the place of the matched nodes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from attention_reference import attend
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from reference import Recorder
from test_attention import trace
from torch import Tensor

from fusion_compiler.attention.recognise import find_attention
from fusion_compiler.candidates import Candidate
from fusion_compiler.fused import Attention
from fusion_compiler.layout import fit
from fusion_compiler.legality import Legality
from fusion_compiler.lowering.vendor.sdpa import BACKENDS, offer
from fusion_compiler.machine import machine
from fusion_compiler.match import Match
from fusion_compiler.splice import Builder, clean, replace

QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)  # fmt: skip
CPU_FLASH = next(b for b in BACKENDS if b.name == "cpu_flash")


def agree(got: Tensor, eager: Tensor, exact: Tensor, what: Any) -> None:
    """`got` is what eager gives, or nearer to what float64 gives: eager's exp(x − logsumexp(x)) loses small numbers."""
    assert got.shape == eager.shape, what
    assert torch.equal(got.isnan(), eager.isnan()), what
    errors = [float((got - t).nan_to_num().abs().max() / (t.nan_to_num().abs().max() + 1e-3)) for t in (eager, exact)]
    assert min(errors) < 1e-4, (what, errors)


def check(function: Callable[..., Any], *args: Tensor) -> list[Match]:
    """All attentions of `function`, each compared with eager."""
    gm = trace(function, *args)
    matches, _ = find_attention(gm)
    eager, exact = function(*args), function(*(a.double() for a in args))
    for position, match in enumerate(matches):
        op, site = match.op, match.site
        assert isinstance(op, Attention)
        described = op.mask.kind != "tensor" or op.mask.tensor != "none"  # several masks are no one tensor
        if described and op.mask.empty_rows == "none":
            values = Recorder(gm).values(*args)
            agree(attend(op, site, values).float(), values[site.output], values[site.output], op)
        if Legality(gm.graph).check(site) is not None:
            continue
        candidate = offer(op, machine("cpu"), CPU_FLASH)
        if not isinstance(candidate, Candidate):
            continue
        rewritten = copy.deepcopy(gm)
        match = find_attention(rewritten)[0][position]
        builder = Builder(rewritten, match.site.output)
        replace(match.site, fit(builder, match.site, candidate.emit(builder, match.site)))
        clean(rewritten)
        results = rewritten(*args)
        results, eager, exact = (t if isinstance(t, tuple) else (t,) for t in (results, eager, exact))
        for got, wanted, precise in zip(results, eager, exact, strict=True):
            agree(got, wanted, precise, op)
    return matches


# ---- right choices ------------------------------------------------------------------------------
REPEATS: list[Callable[[Tensor, int], Tensor]] = [
    lambda x, n: x.repeat_interleave(n, dim=1),
    lambda x, n: x[:, :, None].expand(-1, -1, n, -1, -1).reshape(x.shape[0], -1, *x.shape[2:]),
    lambda x, n: torch.stack([x] * n, 2).flatten(1, 2),
    lambda x, n: x[:, torch.arange(x.shape[1] * n) // n],
    lambda x, n: x.repeat(1, n, 1, 1),
]
SCORES: list[Callable[[Tensor, Tensor, float], Tensor]] = [
    lambda q, k, s: q @ k.mT * s,
    lambda q, k, s: torch.matmul(q, k.transpose(2, 3)) / (1 / s),
    lambda q, k, s: (q * s) @ k.permute(0, 1, 3, 2),
    lambda q, k, s: s * torch.einsum("bhqd,bhkd->bhqk", q, k),
    lambda q, k, s: (q * math.sqrt(s)) @ (k * math.sqrt(s)).mT,
    lambda q, k, s: (k @ q.mT).mT * s,
    lambda q, k, s: torch.baddbmm(
        q.new_zeros(q.shape[2], k.shape[2]), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=s
    ).unflatten(0, q.shape[:2]),
]
SOFTMAXES: list[Callable[[Tensor], Tensor]] = [
    lambda s: s.softmax(-1),
    lambda s: torch.softmax(s, 3, dtype=torch.promote_types(s.dtype, torch.float32)),
    lambda s: (e := torch.exp(s - s.amax(-1, keepdim=True))) / e.sum(-1, keepdim=True),
    lambda s: torch.exp(s - torch.logsumexp(s, -1, keepdim=True)),
    lambda s: s.log_softmax(-1).exp(),
    lambda s: (s.mT.softmax(-2)).mT,
]
PRODUCTS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda p, v: p @ v,
    lambda p, v: torch.einsum("bhqk,bhkd->bhqd", p, v),
    lambda p, v: (v.mT @ p.mT).mT,
    lambda p, v: torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).view(*p.shape[:3], -1),
]
ENDS: list[Callable[[Tensor], Tensor]] = [
    lambda o: o,
    lambda o: o.transpose(1, 2).flatten(2),
    lambda o: o.permute(2, 0, 1, 3).contiguous(),
    lambda o: o.transpose(1, 2).contiguous().view(-1, o.shape[1] * o.shape[3]),
]


def _rows(s: Tensor) -> Tensor:
    return torch.arange(s.shape[-2])[:, None]


def _keys(s: Tensor) -> Tensor:
    return torch.arange(s.shape[-1])


# what is seen, of the scores: everything, causal, causal with an offset, a window; each in several spellings
SEEN: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "causal": [
        lambda s: _keys(s) <= _rows(s),
        lambda s: torch.ones(s.shape[-2:], dtype=torch.bool).tril(),
        lambda s: ~torch.ones(s.shape[-2:], dtype=torch.bool).triu(1),
        lambda s: _rows(s) - _keys(s) > -1,
        lambda s: torch.tril(torch.ones(16, 16))[: s.shape[-2], : s.shape[-1]] != 0,
    ],
    "window": [
        lambda s: (_keys(s) <= _rows(s)) & (_keys(s) > _rows(s) - 3),
        lambda s: torch.ones(s.shape[-2:], dtype=torch.bool).tril().triu(-2),
        lambda s: ((_rows(s) - _keys(s)).abs() < 3) & (_rows(s) >= _keys(s)),
    ],
}
HIDES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda s, seen: s.masked_fill(~seen, -math.inf),
    lambda s, seen: torch.where(seen, s, torch.finfo(s.dtype).min),
    lambda s, seen: s + torch.zeros(seen.shape).masked_fill(~seen, -math.inf),
    lambda s, seen: s + (1.0 - seen.to(s.dtype)) * torch.finfo(s.dtype).min,
    lambda s, seen: torch.where(seen, 0.0, -1e9) + s,
]
NOISE: list[Callable[[Tensor], Tensor]] = [
    lambda t: t,
    lambda t: t.clone(),
    lambda t: t.double().to(t.dtype) if t.dtype == torch.float32 else t,
    lambda t: t.unsqueeze(0).squeeze(0),
    lambda t: t.flatten().view(t.shape),
    lambda t: torch.nn.functional.dropout(t, 0.3, training=False),
    lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    lambda t: t.detach(),
]
SIZES = st.integers(2, 9)


@QUICK
@given(
    b=st.integers(1, 3), kv_heads=st.integers(1, 3), groups=st.integers(1, 3), length=SIZES, d=SIZES, dv=SIZES,
    repeat=st.sampled_from(REPEATS), scores=st.sampled_from(SCORES), softmax=st.sampled_from(SOFTMAXES),
    product=st.sampled_from(PRODUCTS), end=st.sampled_from(ENDS),
    mask=st.none() | st.sampled_from([(kind, seen) for kind, spellings in SEEN.items() for seen in spellings]),
    hide=st.sampled_from(HIDES), noise=st.lists(st.sampled_from(NOISE), min_size=5, max_size=5),
)  # fmt: skip
def test_every_spelling_matches(
    b, kv_heads, groups, length, d, dv, repeat, scores, softmax, product, end, mask, hide, noise
):
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (repeat(t, groups) for t in (k, v))
        s = noise[3](scores(noise[0](q), noise[1](k), 0.3))
        if mask is not None:
            s = hide(s, mask[1](s))
        return end(product(noise[4](softmax(s)), noise[2](v)))

    torch.manual_seed(length)
    heads = kv_heads * groups
    q, k, v = (torch.randn(b, h, length, n) for h, n in ((heads, d), (kv_heads, d), (kv_heads, dv)))
    (match,) = check(attention, q, k, v)
    assert isinstance(match.op, Attention)
    expected = "none" if mask is None else "causal"
    assert match.op.mask.kind == expected or length <= 3, match.op.mask.proof
    assert match.op.head_dim == d and match.op.v_dim == dv


# ---- choices that may be wrong ------------------------------------------------------------------
WRONG_SCORES = [
    lambda q, k, s: q @ k.transpose(1, 2).permute(0, 3, 2, 1).reshape(*k.shape[:2], k.shape[3], k.shape[2]) * s,
    lambda q, k, s: q @ k.reshape(*k.shape[:2], k.shape[3], k.shape[2]) * s,  # reshaped where it should be transposed
    lambda q, k, s: q @ k * s,  # where as long as wide
    lambda q, k, s: q @ k.mT * -s,
    lambda q, k, s: q @ k.mT * 0.0,
    lambda q, k, s: (q + s) @ k.mT,
    lambda q, k, s: q @ k.mT + s,
    lambda q, k, s: q @ k.mT * torch.linspace(0.1, 1, q.shape[1])[:, None, None],  # a scale of each head
    lambda q, k, s: q @ k.mT * torch.linspace(0.1, 1, k.shape[2]),  # of each key
    lambda q, k, s: q @ k.mT * torch.linspace(0.1, 1, q.shape[2])[:, None],  # of each query
    lambda q, k, s: q * torch.linspace(0.1, 1, q.shape[3]) @ k.mT,
    lambda q, k, s: q @ k.mT / q.norm(dim=-1, keepdim=True),
    lambda q, k, s: q @ k.mT * torch.tensor(-s),
    lambda q, k, s: q @ k.flip(2).mT * s,
    lambda q, k, s: q @ k.flip(1).mT * s,
    lambda q, k, s: q.roll(1, 2) @ k.mT * s,
    lambda q, k, s: torch.einsum("bhqd,bhkd->bhkq", q, k) * s,
    lambda q, k, s: torch.einsum("bhqd,bgkd->bhqk", q, k) * s,
    lambda q, k, s: torch.einsum("bhqd,chkd->bhqk", q, k) * s,
    lambda q, k, s: 2 * torch.tanh(q @ k.mT * s / 2),
    lambda q, k, s: 2 * torch.tanh(q @ k.mT * s / 3),
    lambda q, k, s: torch.cdist(q, k) * -s,
    lambda q, k, s: (q @ k.mT * s).abs(),
    lambda q, k, s: q[..., :-1] @ k[..., :-1].mT * s,
    lambda q, k, s: q[..., ::2] @ k[..., 1::2].mT * s,
    lambda q, k, s: q @ k.mT * s * s + q @ k.mT,
]
MASKED: list[Callable[[Tensor], Tensor]] = [
    lambda s: s,
    lambda s: s.masked_fill(_keys(s) < _rows(s), -math.inf),
    lambda s: s.masked_fill(_keys(s) >= _rows(s), -math.inf),  # the first row sees nothing
    lambda s: s.masked_fill(_keys(s) >= _rows(s), torch.finfo(s.dtype).min),
    lambda s: s.masked_fill(_keys(s) > _rows(s) + 1, -math.inf),
    lambda s: s.masked_fill(_keys(s) > _rows(s) + (s.shape[-1] - s.shape[-2]), -math.inf),
    lambda s: s.masked_fill(_keys(s) > _rows(s) + (s.shape[-1] - s.shape[-2]), -1e9),
    lambda s: s.masked_fill(_keys(s) > _rows(s) - 2, -1e9),
    lambda s: s.masked_fill(_keys(s) > _rows(s), -30.0),
    lambda s: s.masked_fill(_keys(s) > _rows(s), -66000.0),
    lambda s: s.masked_fill(_keys(s) > _rows(s), 0.0),
    lambda s: s.masked_fill(_keys(s) > _rows(s), math.inf),
    lambda s: s.masked_fill(_keys(s) == _rows(s), -math.inf),
    lambda s: s.masked_fill((_keys(s) > _rows(s)) & (_keys(s) < 3), -math.inf),
    lambda s: s.masked_fill((_keys(s) > _rows(s)) | (_keys(s) < 1), -math.inf),
    lambda s: s.masked_fill((_keys(s) > _rows(s)) | (_keys(s) < _rows(s) - 1), -1e9),
    lambda s: s.masked_fill((_keys(s) > _rows(s)) | (_keys(s) // 2 != _rows(s) // 2), -math.inf),
    lambda s: s.masked_fill((_keys(s) > _rows(s)) | (_keys(s) // 2 == _rows(s) // 2), -math.inf),
    lambda s: s.masked_fill((_keys(s) > _rows(s)) | ((_keys(s) + 1) // 2 != (_rows(s) + 1) // 2), -math.inf),
    lambda s: s.masked_fill(torch.arange(s.shape[1])[:, None, None] < _keys(s), -math.inf),  # by head
    lambda s: s.masked_fill(torch.arange(s.shape[1])[:, None, None] < _rows(s), -1e9),
    lambda s: s.masked_fill(torch.arange(s.shape[0])[:, None, None, None] < _keys(s), -math.inf),  # by batch
    lambda s: s.masked_fill(torch.arange(s.shape[1])[:, None] < _keys(s), -math.inf),
    lambda s: s.masked_fill(_keys(s).flip(0) > _rows(s), -math.inf),
    lambda s: s.masked_fill(2 * _keys(s) > _rows(s), -math.inf),
    lambda s: s.masked_fill(_keys(s) > 2 * _rows(s), -math.inf),
    lambda s: s.masked_fill((_keys(s) > _rows(s)).T if s.shape[-2] == s.shape[-1] else _keys(s) > 1, -math.inf),
    lambda s: s.masked_fill(_keys(s) > 1, -math.inf),
    lambda s: s.masked_fill(_keys(s) > _rows(s), -math.inf).masked_fill(_keys(s) == 0, -1e9),
    lambda s: s.masked_fill(_keys(s) > _rows(s), -math.inf) + torch.where(_keys(s) < _rows(s) - 2, -1e9, 0.0),
    lambda s: s + torch.where(_keys(s) <= _rows(s), 0.0, -1e9) * 1e-9,
    lambda s: s + torch.where(_keys(s) <= _rows(s), 0.0, 1.0) * -math.inf,  # 0 · ∞ is no number
    lambda s: s - torch.where(_keys(s) <= _rows(s), 0.0, -1e9),
    lambda s: s + torch.where(_keys(s) <= _rows(s), 1.0, -math.inf),
    lambda s: s + torch.where(_keys(s) <= _rows(s), -1e9, 0.0),
    lambda s: s + (_keys(s) - _rows(s)) * 0.5,
    lambda s: s + (_keys(s) - _rows(s)).abs() * -1e5,
    lambda s: s + torch.linspace(-1, 1, s.shape[1])[:, None, None] * _keys(s),
    lambda s: s * (_keys(s) <= _rows(s)),
    lambda s: s.tril() + s.triu(1).fill_(-math.inf).triu(1).nan_to_num(0.0, 0.0, -1e9),
    lambda s: torch.where(_keys(s) <= _rows(s), s, s.mean()),
    lambda s: torch.where(_keys(s) <= _rows(s), s, -s),
    lambda s: torch.maximum(s, torch.tensor(-0.1)),
    lambda s: s.clamp(min=-1e9),
    lambda s: s.masked_fill(_keys(s) > _rows(s), -1e9).clamp(min=-1e5),
    lambda s: s.masked_fill(_keys(s) > _rows(s), -1e9).clamp(min=-1.0),
    lambda s: s.masked_fill(_keys(s) > _rows(s), -1e9) * 1e-9,
    lambda s: s.masked_fill(_keys(s) > _rows(s), -1e9) * -1,
    lambda s: s.masked_fill(_keys(s) > _rows(s), -1e38) * 10,
    lambda s: torch.tanh(s.masked_fill(_keys(s) > _rows(s), -math.inf)),
    lambda s: s.masked_fill(_keys(s) > _rows(s), -math.inf).masked_fill(_keys(s) <= _rows(s) - 2, -math.inf),
    lambda s: s.masked_fill(s < 0, -math.inf),
    lambda s: s.masked_fill(s < s.amax(-1, keepdim=True), -math.inf),
]
WRONG_SOFTMAXES = [
    lambda s: s.softmax(-2),
    lambda s: s.softmax(1),
    lambda s: s.flatten(1).softmax(-1).view(s.shape),
    lambda s: s.flatten(2).softmax(-1).view(s.shape),
    lambda s: (
        s.flatten().view(-1, s.shape[-1] * 2 if s.numel() % (s.shape[-1] * 2) == 0 else 1).softmax(-1).view(s.shape)
    ),
    lambda s: s.exp() / (1 + s.exp().sum(-1, keepdim=True)),
    lambda s: s.exp() / s.exp().sum(-2, keepdim=True),
    lambda s: s.exp() / s.exp().sum(-1),
    lambda s: s.exp() / s.exp().sum((-1, -2), keepdim=True),
    lambda s: s.exp() / s.abs().exp().sum(-1, keepdim=True),
    lambda s: (s - s.amax(-1, keepdim=True)).exp() / s.exp().sum(-1, keepdim=True),
    lambda s: (s - s.amax(-2, keepdim=True)).exp() / (s - s.amax(-2, keepdim=True)).exp().sum(-1, keepdim=True),
    lambda s: (s - s.mean(-1, keepdim=True)).exp() / (s - s.mean(-1, keepdim=True)).exp().sum(-1, keepdim=True),
    lambda s: (s - s.logsumexp(-2, keepdim=True)).exp(),
    lambda s: s.log_softmax(-1),
    lambda s: s.softmax(-1) ** 2,
    lambda s: s.softmax(-1).softmax(-1),
    lambda s: s.sigmoid(),
    lambda s: s.relu(),
    lambda s: 2**s / (2**s).sum(-1, keepdim=True),
    lambda s: torch.exp2(s) / torch.exp2(s).sum(-1, keepdim=True),
    lambda s: (p := s.softmax(-1)) / p.sum(-2, keepdim=True),
    lambda s: s.softmax(-1).nan_to_num(0.0),
    lambda s: torch.where(torch.isneginf(s).all(-1, keepdim=True), 0.0, s.softmax(-1)),
    lambda s: s.softmax(-1) * (_keys(s) <= _rows(s)),
    lambda s: s.softmax(-1).masked_fill(_keys(s) > _rows(s), 0.0),
    lambda s: s.softmax(-1) * 2,
    lambda s: s.softmax(-1) - 0.1,
    lambda s: s.softmax(-1).mT if s.shape[-1] == s.shape[-2] else s.softmax(-1),
    lambda s: s.softmax(-1).flip(1),
    lambda s: s.softmax(-1).transpose(0, 1) if s.shape[0] == s.shape[1] else s.softmax(-1),
    lambda s: s.softmax(-1).transpose(0, 1).reshape(s.shape),
]
WRONG_PRODUCTS = [
    lambda p, v: p.mT @ v if p.shape[-1] == p.shape[-2] else p @ v,
    lambda p, v: p @ v.flip(2),
    lambda p, v: p @ v.transpose(1, 2).reshape(v.shape),
    lambda p, v: torch.einsum("bhqk,bgkd->bhqd", p, v),
    lambda p, v: torch.einsum("bhqk,bhkd->bqhd", p, v),
    lambda p, v: (p[..., None] * v[:, :, None]).sum(-2),
    lambda p, v: (p[..., None] * v[:, :, None]).sum(2),
    lambda p, v: p @ v + v[:, :, :1],
    lambda p, v: p @ (v * torch.linspace(0, 1, v.shape[2])[:, None]),
    lambda p, v: p @ v / p.sum(-1, keepdim=True),
    lambda p, v: p @ v / p.sum(-2)[..., None] if p.shape[-1] == p.shape[-2] else p @ v,
    lambda p, v: 2 * (p @ v),
    lambda p, v: torch.baddbmm(v[:, :, :1].flatten(0, 1), p.flatten(0, 1), v.flatten(0, 1)).view(*p.shape[:3], -1),
    lambda p, v: p.transpose(0, 1) @ v.transpose(0, 1),
    lambda p, v: p.reshape(1, -1, *p.shape[2:]) @ v.reshape(1, -1, *v.shape[2:]),
]
WRONG_ENDS = [
    lambda o: o.flatten(1, 2),
    lambda o: o.mT,
    lambda o: o.reshape(o.shape[0], o.shape[2], -1),
    lambda o: o.transpose(0, 1).flatten(2),
    lambda o: o.sum(1),
    lambda o: o.transpose(1, 2).flatten(1) if o.is_contiguous() else o,
]
MUTATED = settings(QUICK, max_examples=60)


def mostly(right: list[Any], wrong: list[Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from(right[:1]) | st.sampled_from(right) | st.sampled_from(wrong)


@MUTATED
@given(
    b=st.sampled_from([1, 2, 2, 4]), heads=st.sampled_from([1, 2, 4]), groups=st.sampled_from([1, 2]),
    length=st.sampled_from([4, 4, 2, 6]), keys=st.sampled_from([4, 4, 6, 1]), d=st.sampled_from([4, 4, 2, 6]),
    scores=mostly(SCORES, WRONG_SCORES), masked=mostly(MASKED[:1], MASKED), again=mostly(MASKED[:1], MASKED),
    softmax=mostly(SOFTMAXES, WRONG_SOFTMAXES), product=mostly(PRODUCTS, WRONG_PRODUCTS),
    end=mostly(ENDS, WRONG_ENDS), repeats=st.tuples(st.sampled_from(REPEATS), st.sampled_from(REPEATS)),
    noise=st.lists(st.sampled_from(NOISE), min_size=2, max_size=2), shared=st.sampled_from(["", "", "qk", "kv", "qv"]),
    kept=st.sampled_from(["", "", "", "scores", "probabilities", "product", "keys"]),
)  # fmt: skip
def test_what_matches_is_what_eager_computes(
    b, heads, groups, length, keys, d, scores, masked, again, softmax, product, end, repeats, noise, shared, kept
):
    def program(q: Tensor, k: Tensor, v: Tensor) -> Any:
        k, v = repeats[0](k, groups), repeats[1](v, groups)
        q, k, v = {"": (q, k, v), "qk": (q, q, v), "kv": (q, k, k), "qv": (q, k, q)}[shared]
        s = noise[0](again(masked(scores(q, k, 0.3))))
        p = softmax(s)
        o = product(noise[1](p), v)
        kept_too = {"": (), "scores": (s,), "probabilities": (p.sum(0),), "product": (o * 2,), "keys": (k,)}[kept]
        return (end(o), *kept_too)

    torch.manual_seed(length)
    given = (torch.randn(b, n, rows, d) for n, rows in ((heads * groups, length), (heads, keys), (heads, keys)))
    args = tuple(given)
    try:
        program(*args)
    except RuntimeError:
        assume(False)  # shapes that do not go together
    check(program, *args)
