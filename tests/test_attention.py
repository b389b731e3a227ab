"""Attention is found in every spelling, read without repeats, proved causal, and computes what eager computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attention_spellings as spell
import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compiler.attention.recognise import find_attention
from fusion_compiler.candidates import Candidate
from fusion_compiler.fused import Attention
from fusion_compiler.layout import fit
from fusion_compiler.lowering.vendor.sdpa import BACKENDS, VendorSdpa, offer
from fusion_compiler.machine import machine
from fusion_compiler.match import Match
from fusion_compiler.splice import Builder, clean, replace

Function = Callable[..., Any]


def trace(fn: Function, *args: Tensor, dynamic: bool = False) -> GraphModule:
    """The graph that Inductor gives to its passes, less what autograd and its own patterns do."""
    mode = "symbolic" if dynamic else "fake"
    with torch.no_grad():
        gm = make_fx(fn, tracing_mode=mode, decomposition_table=select_decomp_table())(*args)
    gm.graph.eliminate_dead_code()
    return gm


def only(gm: GraphModule) -> Match:
    matches, near_misses = find_attention(gm)
    assert len(matches) == 1, [n.reason for n in near_misses]
    return matches[0]


def rewrite(gm: GraphModule) -> Attention:
    """Puts the CPU's kernel in the place of the graph's only attention."""
    match = only(gm)
    assert isinstance(match.op, Attention)
    candidate = offer(match.op, machine("cpu"), next(b for b in BACKENDS if b.name == "cpu_flash"))
    assert isinstance(candidate, Candidate), candidate
    builder = Builder(gm, match.site.output)
    replace(match.site, fit(builder, match.site, candidate.emit(builder, match.site)))
    clean(gm)
    assert not any("softmax" in str(n.target) or "exp" in str(n.target).split(".") for n in gm.graph.nodes)
    assert isinstance(match.op, Attention)
    return match.op


def check(fn: Function, gm: GraphModule, *args: Tensor) -> None:
    """The graph's error is at most 1.5 times eager's, both against float64."""
    exact = fn(*(a.double() if a.is_floating_point() else a for a in args))
    ours, eager = gm(*args).double(), fn(*args).double()
    assert torch.equal(ours.isnan(), eager.isnan())
    ours, eager, largest = (t.nan_to_num().abs().max().item() for t in (ours - exact, eager - exact, exact))
    # a unit in the last place more where eager happens to be exact
    assert ours <= 1.5 * eager + torch.finfo(args[0].dtype).eps * largest, (ours, eager)


def heads(b: int, h: int, hk: int, lq: int, lk: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(torch.randn(b, n, s, d, dtype=dtype) for n, s in ((h, lq), (hk, lk), (hk, lk)))


FEW = (spell.masked_fill_triu, spell.compared_positions, spell.divided, spell.transposed)
PAIRS = [(c, a) for a in spell.AROUND for c in spell.CAUSAL + spell.UNMASKED if a is spell.rotated or c in FEW]


@pytest.mark.parametrize(("core", "around"), PAIRS, ids=lambda f: f.__name__)
def test_every_spelling(core: spell.Core, around: Function) -> None:
    grouped = 4 if around is spell.plain else 2
    args = heads(2, 4, grouped, 17, 17, 8)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return around(core, q, k, v)

    gm = trace(fn, *args)
    op = rewrite(gm)
    assert (op.batch, op.heads, op.kv_heads, op.q_len, op.kv_len, op.head_dim) == (2, 4, grouped, 17, 17, 8)
    assert op.mask.kind == ("causal" if core in spell.CAUSAL else "none"), op.mask.proof
    assert op.mask.offset == 0
    assert op.scale == pytest.approx(1.0 if core is spell.unscaled else 8**-0.5)
    check(fn, gm, *args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "core", [spell.softmax_in_float, spell.compared_positions, spell.masked_fill_triu, spell.by_hand]
)
def test_half_precision(core: spell.Core, dtype: torch.dtype) -> None:
    args = heads(1, 4, 2, 33, 33, 16, dtype)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spell.repeated_by_expand(core, q, k, v)

    gm = trace(fn, *args)
    assert rewrite(gm).dtype == dtype
    check(fn, gm, *args)


@pytest.mark.parametrize("length", [1, 2, 17])
@pytest.mark.parametrize("core", [spell.divided, spell.masked_fill_triu, spell.compared_positions])
def test_odd_lengths(core: spell.Core, length: int) -> None:
    args = heads(1, 4, 2, length, length, 8)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spell.repeated_by_expand(core, q, k, v)

    gm = trace(fn, *args)
    if length == 1:
        matches, _ = find_attention(gm)
        for match in matches:
            assert isinstance(match.op, Attention) and match.op.mask.kind == "none"  # one key is always seen
        return
    rewrite(gm)
    check(fn, gm, *args)


@pytest.mark.parametrize("around", [spell.plain, spell.repeated_by_expand, spell.rotated], ids=lambda f: f.__name__)
@pytest.mark.parametrize("core", [spell.divided, spell.masked_fill_triu, spell.packed_and_causal, spell.merged_heads])
def test_symbolic_sizes(core: spell.Core, around: Function) -> None:
    grouped = 4 if around is spell.plain else 2

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return around(core, q, k, v)

    def flexible(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        d = 8
        return fn(*(t.reshape(t.shape[0], n, -1, d) for t, n in ((q, 4), (k, grouped), (v, grouped))))

    gm = trace(flexible, *heads(3, 4, grouped, 17, 17, 8), dynamic=True)
    op = rewrite(gm)
    assert isinstance(op.q_len, torch.SymInt)
    assert (op.heads, op.kv_heads, op.head_dim) == (4, grouped, 8)
    for batch, length in ((2, 17), (3, 40), (5, 9)):
        check(flexible, gm, *heads(batch, 4, grouped, length, length, 8))


def test_keys_and_queries_of_different_length_are_causal_from_the_top_left() -> None:
    args = heads(2, 4, 4, 9, 23, 8)
    gm = trace(spell.masked_fill_triu, *args)
    assert rewrite(gm).mask.kind == "causal"
    check(spell.masked_fill_triu, gm, *args)


def test_single_query_written_as_product_and_sum() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q.unsqueeze(-2) * k.unsqueeze(2)).sum(-1) * 0.25
        return (s.softmax(-1).unsqueeze(-1) * v.unsqueeze(2)).sum(3)

    args = heads(2, 4, 4, 1, 23, 16)
    gm = trace(fn, *args)
    assert rewrite(gm).q_len == 1
    check(fn, gm, *args)


def test_grouped_product_broadcasts_over_the_group() -> None:
    """q as [B, Hkv, g, L, D] against k as [B, Hkv, 1, L, D]: nothing is written out repeated, but bmm repeats."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, s, d = q.shape
        grouped = q.view(b, k.shape[1], -1, s, d)
        p = (grouped @ k[:, :, None].mT * 0.25).masked_fill(spell.hidden(q, k), -math.inf).softmax(-1)
        return (p @ v[:, :, None]).reshape(b, h, s, d)

    args = heads(2, 8, 2, 11, 11, 16)
    gm = trace(fn, *args)
    op = rewrite(gm)
    assert (op.heads, op.kv_heads, op.q_len, op.mask.kind) == (8, 2, 11, "causal")
    check(fn, gm, *args)


def test_products_padded_to_aligned_sizes() -> None:
    """As Inductor pads bmm on GPUs."""

    def padded_bmm(a: Tensor, b: Tensor) -> Tensor:
        m, k, n = (-size % 8 for size in (a.shape[1], a.shape[2], b.shape[2]))
        a = torch.ops.aten.constant_pad_nd(a, [0, k, 0, m, 0, 0])
        b = torch.ops.aten.constant_pad_nd(b, [0, n, 0, k, 0, 0])
        padded = torch.bmm(a, b)
        return padded[:, : padded.shape[1] - m, : padded.shape[2] - n]

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, b, c = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
        s = padded_bmm(a, b.transpose(1, 2)).view(*q.shape[:3], k.shape[2]) * 0.25
        p = s.masked_fill(spell.hidden(q, k), -math.inf).softmax(-1)
        return padded_bmm(p.view(-1, *p.shape[2:]), c).view(q.shape)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spell.repeated_by_expand(core, q, k, v)

    for args in (heads(2, 4, 2, 17, 17, 16), heads(2, 4, 2, 16, 16, 12)):
        gm = trace(fn, *args)
        assert rewrite(gm).mask.kind == "causal"
        check(fn, gm, *args)


def test_group_moved_next_to_a_single_query() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.view(q.shape[0], k.shape[1], -1, q.shape[-1])
        return ((rows @ k.mT * 0.25).softmax(-1) @ v).view(q.shape)

    args = heads(2, 8, 2, 1, 11, 16)
    gm = trace(fn, *args)
    op = rewrite(gm)
    assert (op.batch, op.heads, op.kv_heads, op.q_len) == (2, 8, 2, 1)
    check(fn, gm, *args)


# ---- static cache -------------------------------------------------------------------------------
def _turned_after_repeat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Falcon: RoPE turns keys that are repeated already, values are only repeated; [batch, length, heads, width]."""
    b, n, kv, d = k.shape
    k, v = (t[:, :, :, None].expand(b, n, kv, 2, d).reshape(b, n, 2 * kv, d).transpose(1, 2) for t in (k, v))
    scores = q.transpose(1, 2) @ k.sin().transpose(2, 3) / math.sqrt(d)
    at = torch.arange(n)
    mask = torch.where(at[None, :] <= at[:, None], 0.0, -math.inf).expand(b, 1, n, n)
    return torch.softmax(scores + mask, -1) @ v


def test_keys_and_values_not_repeated_alike() -> None:
    args = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)
    gm = trace(_turned_after_repeat, *args)
    op = only(gm).op
    assert (op.batch, op.heads, op.kv_heads, op.mask.kind) == (2, 4, 4, "causal")
    rewrite(gm)
    check(_turned_after_repeat, gm, *args)


def test_layers_that_share_a_computed_mask_do_not_conflict() -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.where(mask[:, :, None] > mask[:, None, :], -math.inf, 0.0).repeat(1, 1, 2)[..., : k.shape[2]]
        for _ in range(2):
            q = torch.softmax(q @ k.transpose(2, 3) + hidden[:, None] * 1.0, -1) @ v
        return q

    q, k, v = heads(2, 4, 4, 6, 6, 8)
    matches, _ = find_attention(trace(layers, q, k, v, torch.rand(2, 6)))
    gone = [set(m.site.interior) - set(m.site.escaping) for m in matches]
    assert len(gone) == 2 and not gone[0] & gone[1]


def cached(q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    rows = torch.arange(q.shape[2]) + position
    cache_k, cache_v = (torch.index_copy(c, 2, rows, new) for c, new in ((cache_k, k), (cache_v, v)))
    allowed = torch.arange(cache_k.shape[2])[None, None, None] <= rows[None, None, :, None]
    mask = torch.where(allowed, torch.tensor(0.0, dtype=q.dtype), torch.finfo(q.dtype).min)

    def core(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (spell.scores(a, b) + mask).softmax(-1) @ c

    return spell.repeated_by_expand(core, q, cache_k, cache_v), cache_k, cache_v


@pytest.mark.parametrize(("queries", "kind"), [(1, "length"), (5, "causal")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_cache(queries: int, kind: str, dtype: torch.dtype) -> None:
    q, k, v = heads(2, 8, 2, queries, queries, 16, dtype)
    caches = heads(2, 8, 2, 1, 64, 16, dtype)[1:]
    args = (q, k, v, *caches, torch.tensor(20))
    gm = trace(cached, *args)
    position = next(n for n in gm.graph.nodes if n.op == "placeholder" and n.meta["val"].shape == ())
    match = only(gm)
    assert isinstance(match.op, Attention)
    assert (match.op.mask.kind, match.op.mask.position, match.op.mask.tensor) == (kind, True, "additive")
    assert match.site.operands[4] is position
    assert match.op.kv_heads == 2 and "index" in match.site.operands[1].name  # the cache, not its repeats
    rewrite(gm)
    check(lambda *a: cached(*a)[0], lambda *a: gm(*a)[0], *args)  # type: ignore[arg-type]


# ---- what is not attention, or not what it looks like --------------------------------------------
def refused(fn: Function, *args: Tensor) -> str:
    matches, near_misses = find_attention(trace(fn, *args))
    assert not matches
    return " ".join(n.reason for n in near_misses)


def kept(fn: Function, *args: Tensor, on: str = "cpu") -> str:
    """The reason for which a recognised attention cannot be handed to a vendor kernel."""
    offers = VendorSdpa().candidates(only(trace(fn, *args)).op, machine(on))
    assert not isinstance(offers, list), offers
    return offers.reason


def test_softmax_over_the_queries() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spell.scores(q, k).softmax(-2) @ v

    assert "runs over another axis" in refused(fn, *heads(2, 4, 4, 9, 9, 8))


def test_softmax_over_the_heads() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spell.scores(q, k).softmax(1) @ v

    assert "softmax" in refused(fn, *heads(2, 4, 4, 9, 9, 8))


def test_probabilities_returned() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = spell.scores(q, k).softmax(-1)
        return p @ v, p

    assert "output_attentions" in refused(fn, *heads(2, 4, 4, 9, 9, 8))


def test_scores_returned() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        s = spell.scores(q, k)
        return s.softmax(-1) @ v, s

    assert "also read by" in refused(fn, *heads(2, 4, 4, 9, 9, 8))


def test_scale_per_key() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return (q @ k.mT * scale).softmax(-1) @ v

    assert "scaled by" in refused(fn, *heads(2, 4, 4, 9, 9, 8), torch.rand(9))


def test_dropout_of_probabilities() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.dropout(spell.scores(q, k).softmax(-1), 0.5, training=True) @ v

    assert "model.eval()" in refused(fn, *heads(2, 4, 4, 9, 9, 8))


def test_keys_repeated_unlike_values() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spell.scores(q, k.repeat_interleave(2, 1)).softmax(-1) @ v.repeat(1, 2, 1, 1)

    args = heads(2, 4, 2, 9, 9, 8)
    gm = trace(fn, *args)
    matches, near_misses = find_attention(gm)
    if matches:  # allowed only where it is right
        rewrite(gm)
        check(fn, gm, *args)
    else:
        assert near_misses


def test_softcap_is_recognised_and_left() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.tanh(spell.scores(q, k) / 50.0) * 50.0
        return s.masked_fill(spell.hidden(q, k), -math.inf).softmax(-1) @ v

    args = heads(2, 4, 4, 9, 9, 16)
    op = only(trace(fn, *args)).op
    assert isinstance(op, Attention)
    assert (op.softcap, op.scale, op.mask.kind) == (pytest.approx(50.0), pytest.approx(0.25), "causal")
    assert "softcap" in kept(fn, *args)


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "strictly lower": lambda q, k: k < q,
    "anti-causal": lambda q, k: k >= q,
    "every second key": lambda q, k: k % 2 == q % 2,
    "only itself": lambda q, k: k == q,
    "one too many": lambda q, k: k <= q + 1,
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_are_not_causal(name: str) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        allowed = MASKS[name](torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None])
        return torch.where(allowed, spell.scores(q, k), -1e30).softmax(-1) @ v

    args = heads(2, 4, 2, 9, 9, 8)

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spell.repeated_by_expand(fn, q, k, v)

    gm = trace(grouped, *args)
    op = only(gm).op
    assert isinstance(op, Attention)
    assert op.mask.kind == "tensor" or (op.mask.kind, op.mask.offset) == ("causal", 1)
    if isinstance(VendorSdpa().candidates(op, machine("cpu")), list):
        rewrite(gm)
        check(grouped, gm, *args)


def test_sliding_window() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])[None]
        return spell.scores(q, k).masked_fill((distance < 0) | (distance >= 4), -math.inf).softmax(-1) @ v

    args = heads(2, 4, 4, 19, 19, 8)
    gm = trace(fn, *args)
    op = rewrite(gm)
    assert (op.mask.kind, op.mask.window, op.mask.empty_rows) == ("causal", 4, "none")
    check(fn, gm, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fill", [-math.inf, -1e9])
@pytest.mark.parametrize("added", [False, True], ids=["filled in", "added"])
def test_unknown_mask_where_a_row_may_see_nothing(added: bool, fill: float, dtype: torch.dtype) -> None:
    """−∞ gives rows that are not numbers, as in eager; a finite fill averages in both."""

    def filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return spell.scores(q, k).masked_fill(mask, fill).softmax(-1) @ v

    def biased(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (spell.scores(q, k) + torch.zeros(mask.shape, dtype=q.dtype).masked_fill(mask, fill)).softmax(-1) @ v

    fn = biased if added else filled
    args = (*heads(2, 4, 4, 9, 9, 8, dtype), torch.rand(2, 1, 9, 9) < 0.5)
    args[3][:, :, 4] = True
    gm = trace(fn, *args)
    assert rewrite(gm).mask.empty_rows == ("nan" if fill == -math.inf else "mean")
    check(fn, gm, *args)
    if added or fill > -math.inf:
        assert "averages all values" in kept(
            fn, *(a.bfloat16() if a.is_floating_point() else a for a in args), on="h200"
        )


def test_values_in_lower_precision_than_queries() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spell.scores(q, k).softmax(-1).to(v.dtype) @ v

    q, k, v = heads(2, 4, 4, 9, 9, 8)
    assert "wider than the values" in refused(fn, q, k, v.bfloat16())


# ---- vendor kernels -----------------------------------------------------------------------------
def offers(op: Attention, on: str) -> list[str]:
    found = VendorSdpa().candidates(op, machine(on))
    return [c.name.rsplit(".", 1)[-1] for c in found if isinstance(c, Candidate)] if isinstance(found, list) else []


def test_backends_of_a_gpu_that_is_not_here() -> None:
    half = heads(2, 4, 2, 64, 64, 64, torch.bfloat16)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spell.repeated_by_expand(spell.masked_fill_triu, q, k, v)

    op = only(trace(fn, *half)).op
    assert isinstance(op, Attention)
    assert offers(op, "h200") == ["cudnn", "flash"]  # the efficient kernel knows no groups
    assert offers(op, "v100") == []
    single = only(trace(spell.masked_fill_triu, *heads(2, 4, 4, 64, 64, 64))).op
    assert isinstance(single, Attention)
    assert offers(single, "h200") == []  # in float32 the efficient kernel errs up to twice as much as eager
    uneven = only(trace(spell.masked_fill_triu, *heads(2, 4, 4, 32, 64, 64, torch.bfloat16))).op
    assert isinstance(uneven, Attention)
    assert "flash" not in offers(uneven, "h200")  # it would align the diagonal to the last key


def test_fused_call_learns_that_its_mask_is_causal() -> None:
    args = heads(2, 4, 4, 9, 9, 8)
    gm = trace(spell.sdpa_with_mask, *args)
    match = only(gm)
    assert isinstance(match.op, Attention) and match.op.vendor and match.op.mask.kind == "causal"
    plain = trace(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v), *args)
    matches, near_misses = find_attention(plain)
    assert not matches and "already" in near_misses[0].reason


def test_one_query_on_a_cpu_stays_with_inductor() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spell.scores(q, k).softmax(-1) @ v

    assert "one query is served faster" in kept(fn, *heads(2, 4, 4, 1, 19, 8))
    assert isinstance(VendorSdpa().candidates(only(trace(fn, *heads(2, 4, 4, 2, 19, 8))).op, machine("cpu")), list)
