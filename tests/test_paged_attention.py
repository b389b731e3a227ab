"""Attention over a paged cache: spelled as a gather or asked for by name, run in Triton's interpreter, compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ahead_of_time
import pytest
import torch
from paged_spellings import SPELLINGS, Paged, indexed
from test_decode_attention import TARGETS, compiled, found

import fusion_compiler as fc
from fusion_compiler import layout, splice
from fusion_compiler.backend import fusion_compiler
from fusion_compiler.fused import Codes, Pages, StoredAttention
from fusion_compiler.lowering.triton_codegen.decode import attention as decode
from fusion_compiler.lowering.triton_codegen.decode.operands import Plan

Tensor = torch.Tensor
B, H, HK, D, BLOCKS, MOST = 4, 4, 2, 32, 11, 6


def caches(size: int, heads_first: bool, dtype: torch.dtype, lengths: list[int]) -> tuple[Tensor, ...]:
    """Keys, values, table and lengths: blocks are repeated, and what no sequence sees is not a number."""
    table = torch.randint(1, BLOCKS, (B, MOST), dtype=torch.int32)
    table[1, 1] = table[0, 0]
    seen = torch.zeros(BLOCKS, size, dtype=torch.bool)
    for row, length in zip(table.tolist(), lengths, strict=True):
        for n in range(length):
            seen[row[n // size], n % size] = True
        row[-(-length // size) :] = [0] * (MOST - -(-length // size))
    held = [torch.where(seen[:, :, None, None], torch.randn(BLOCKS, size, HK, D), math.nan).to(dtype) for _ in "kv"]
    keys, values = (t.transpose(1, 2).contiguous() if heads_first else t for t in held)
    return keys, values, table, torch.tensor(lengths, dtype=torch.int32)


def exact(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, heads_first: bool) -> Tensor:
    """In float64, sequence by sequence; q [B, H, D]."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    keys, values = (t.double().transpose(1, 2) if heads_first else t.double() for t in (keys, values))
    for b, length in enumerate(lengths.tolist()):
        if length:
            k, v = (t[table[b].long()].flatten(0, 1)[:length].repeat_interleave(H // HK, 1) for t in (keys, values))
            p = torch.softmax(torch.einsum("hd,nhd->hn", q[b].double(), k) * D**-0.5, -1)
            out[b] = torch.einsum("hn,nhd->hd", p, v)
    return out


def close(out: Tensor, eager: Tensor, wanted: Tensor) -> None:
    own = (eager.double() - wanted).nan_to_num().norm()
    assert out.shape == wanted.shape and (out.double() - wanted).norm() <= 1.5 * own + 3e-7 * wanted.norm()


LENGTHS = {1: [3, 6, 1, 2], 16: [77, 16, 1, 96], 24: [77, 24, 144, 5], 64: [130, 384, 63, 65]}


@pytest.mark.parametrize("size", LENGTHS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: Paged, size: int) -> None:
    torch.manual_seed(size)
    heads_first = spelling.__name__.startswith("heads_first")
    lengths = [min(n, MOST * size - 3) for n in LENGTHS[size]]
    keys, values, table, held = caches(size, heads_first, torch.float32, lengths)
    q = torch.randn(B, H, 1, D)
    graph_module, match = found(spelling, (q, keys, values, table, held))
    [(op, site)] = match.alternatives
    assert isinstance(op, StoredAttention) and op.pages == Pages(size, heads_first)
    builder = splice.Builder(graph_module, site.place)
    new = decode.emit(op, Plan(16, 32, 3, 4, 2), builder, site)
    splice.replace(site, layout.fit(builder, site, new))
    splice.clean(graph_module)
    assert not [n for n in graph_module.graph.nodes if n.target is torch.ops.aten.index.Tensor], "nothing is gathered"
    clean = [torch.nan_to_num(t) for t in (keys, values)]
    eager = spelling(q, *clean, table, held)
    out = graph_module(q, keys, values, table, held)
    close(out[:, :, 0], eager[:, :, 0], exact(q[:, :, 0], keys, values, table, held, heads_first))


def last_queries(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """The last tokens of each sequence, of which each sees what is before it; one that is not there sees nothing."""
    k, v = (t[table].flatten(1, 2).transpose(1, 2).repeat_interleave(H // HK, 1) for t in (keys, values))
    newest = lengths[:, None] - q.shape[2] + torch.arange(q.shape[2], device=q.device)
    n = torch.arange(k.shape[2], device=q.device)
    visible = (n <= newest[:, None, :, None]) & (n < lengths[:, None, None, None])
    scores = (q @ k.mT * D**-0.5).masked_fill(~visible, -math.inf)
    weights = torch.softmax(scores, -1).masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    return weights @ v


@pytest.mark.parametrize(("queries", "splits"), [(5, 3), (2, 1)])
def test_several_queries(queries: int, splits: int) -> None:
    """Prompts and single tokens in one batch: the limit follows the query and differs from sequence to sequence."""
    keys, values, table, lengths = caches(16, False, torch.float32, [77, 3, 33, 96])
    q = torch.randn(B, H, queries, D)
    graph_module, match = found(last_queries, (q, keys, values, table, lengths))
    [(op, site)] = match.alternatives
    assert isinstance(op, StoredAttention) and op.pages == Pages(16)
    assert op.attention.mask.staggered and op.attention.mask.padding == 0, op.attention.mask
    builder = splice.Builder(graph_module, site.place)
    new = decode.emit(op, Plan(16, 32, splits, 4, 2), builder, site)
    splice.replace(site, layout.fit(builder, site, new))
    splice.clean(graph_module)
    clean = [torch.nan_to_num(t) for t in (keys, values)]
    eager = last_queries(q, *clean, table, lengths)
    assert (eager[1, :, : max(0, queries - 3)] == 0).all()
    out, kept = graph_module(q, keys, values, table, lengths), torch.arange(queries)
    for i in kept:
        before = (lengths - queries + 1 + i).clamp(min=0)
        close(out[:, :, i], eager[:, :, i], exact(q[:, :, i], keys, values, table, before, heads_first=False))


def ask(**given: Any) -> Callable[..., Tensor]:
    return lambda q, keys, values, table, lengths: fc.paged_attention(q, keys, values, table, lengths, **given)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_by_name(dtype: torch.dtype, heads_first: bool) -> None:
    """Also where a sequence is empty, and blocks are counted from the last."""
    keys, values, table, lengths = caches(16, heads_first, dtype, [77, 0, 33, 96])
    table[2, 0] -= BLOCKS
    q, run = torch.randn(B, H, D).to(dtype), ask(layout="HND" if heads_first else "NHD")
    eager = run(q, keys, values, table, lengths)
    wanted = exact(q, keys, values, table, lengths, heads_first)
    assert (eager.double() - wanted).abs().max() <= (1e-6 if dtype == torch.float32 else 3e-3)
    out, report = compiled(run, q, keys, values, table, lengths)
    [decision] = [d for d in report.decisions if d.pattern == "attention"]
    assert decision.kernel.startswith("triton decode") and dict(decision.details)["pages"] == 16, report
    close(out, eager, wanted)


@pytest.mark.usefixtures("meeting_for_nothing")
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_codes_in_pages(stored: torch.dtype, per_head: bool) -> None:
    keys, values, table, lengths = caches(16, False, torch.float32, [77, 1, 33, 96])
    scales = [torch.rand(HK if per_head else ()) / 40 + 0.01 for _ in "kv"]
    keys, values = ((t.nan_to_num() * 30).round().to(stored) for t in (keys, values))
    q = torch.randn(B, H, D)

    def run(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fc.paged_attention(q, keys, values, table, lengths, k_scale=k, v_scale=v)

    wanted = exact(
        q, *(t.double() * s.reshape(-1, 1) for t, s in zip((keys, values), scales, strict=True)), table, lengths, False
    )
    inputs = (q, keys, values, table, lengths, *scales)
    out, report = compiled(run, *inputs)
    [decision] = [d for d in report.fused if d.pattern == "attention"]
    assert str(stored) in dict(decision.details)["codes"] and dict(decision.details)["pages"] == 16
    close(out, run(*inputs), wanted)


def by_token(width: bool) -> Callable[..., Tensor]:
    """Codes with a scale for each token and head, and for values a zero, in caches of their own."""

    def run(
        q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, ks: Tensor, vs: Tensor, vz: Tensor
    ) -> Tensor:
        k, v, ks, vs, vz = (t[table].flatten(1, 2).transpose(1, 2) for t in (keys, values, ks, vs, vz))
        ks, vs, vz = (t if width else t[..., None] for t in (ks, vs, vz))
        k, v = k.to(q.dtype) * ks.to(q.dtype), (v.to(q.dtype) - vz.to(q.dtype)) * vs.to(q.dtype)
        k, v = (t.repeat_interleave(H // HK, 1) for t in (k, v))
        n = torch.arange(k.shape[2], device=q.device)
        scores = (q @ k.mT * D**-0.5).masked_fill(n >= lengths[:, None, None, None], -math.inf)
        return torch.softmax(scores, -1) @ v

    return run


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("width", [False, True])
def test_scales_of_tokens_in_pages(width: bool, block: int) -> None:
    keys, values, table, lengths = caches(16, False, torch.float32, [77, 1, 33, 96])
    table[2, 0] -= BLOCKS
    keys, values = ((t.nan_to_num() * 30).round() for t in (keys, values))
    scales = [torch.rand(BLOCKS, 16, HK) / 40 + 0.01 for _ in "kv"]
    zeros = (torch.rand(BLOCKS, 16, HK) * 10).round()
    shown = (lambda t: t[..., None]) if width else (lambda t: t)
    inputs = (
        torch.randn(B, H, 1, D), keys.to(torch.int8), values.to(torch.int8), table, lengths, *map(shown, scales),
        shown(zeros),
    )  # fmt: skip
    graph_module, match = found(by_token(width), inputs)
    [(op, site)] = match.alternatives
    assert isinstance(op, StoredAttention) and op.pages == Pages(16)
    assert op.k == Codes(torch.int8, in_pages=True) and op.v == Codes(torch.int8, has_zero=True, in_pages=True)
    builder = splice.Builder(graph_module, site.place)
    splice.replace(site, layout.fit(builder, site, decode.emit(op, Plan(8, 4 * block, 2, 4, 3, True), builder, site)))
    splice.clean(graph_module)
    assert not [n for n in graph_module.graph.nodes if n.target is torch.ops.aten.index.Tensor], "nothing is gathered"
    k, v = keys * scales[0][..., None], (values - zeros[..., None]) * scales[1][..., None]
    wanted = exact(inputs[0][:, :, 0], k.double(), v.double(), table, lengths, heads_first=False)
    close(graph_module(*inputs)[:, :, 0], by_token(width)(*inputs)[:, :, 0], wanted)


def test_one_graph_for_any_number_of_blocks() -> None:
    options = {"strict": True, "remainder": "eager", "machine": "h200"}
    run = torch.compile(ask(), backend=fusion_compiler, options=options)
    for cut in (6, 5, 4):
        keys, values, table, lengths = caches(16, False, torch.float32, [50, 7, 33, 64])
        inputs = torch.randn(B, H, D), keys, values, table[:, :cut], lengths
        with torch.no_grad():
            close(run(*inputs), ask()(*inputs), exact(*inputs, heads_first=False))
    made = fc.reports()
    assert len(made) == 2 and all(d.kernel.startswith("triton decode") for r in made for d in r.fused), made


def test_what_is_no_paged_cache() -> None:
    def across(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        """Positions before blocks."""
        k, v = (t[table].transpose(1, 2).flatten(1, 2).transpose(1, 2) for t in (keys, values))
        return torch.softmax(q @ k.repeat_interleave(2, 1).mT, -1) @ v.repeat_interleave(2, 1)

    def cut_in_front(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (t[table].flatten(1, 2)[:, 3:].transpose(1, 2) for t in (keys, values))
        return torch.softmax(q @ k.repeat_interleave(2, 1).mT, -1) @ v.repeat_interleave(2, 1)

    def two_tables(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (t[i].flatten(1, 2).transpose(1, 2) for t, i in ((keys, table), (values, table.flip(1))))
        return torch.softmax(q @ k.repeat_interleave(2, 1).mT, -1) @ v.repeat_interleave(2, 1)

    def zeroed_where_seen(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        """The mask hides less than what is put to zero."""
        k, v = (t[table].flatten(1, 2).transpose(1, 2) for t in (keys, values))
        n = torch.arange(k.shape[2])
        v = v.masked_fill((n >= lengths[:, None] - 1)[:, None, :, None], 0.0)
        scores = (q @ k.repeat_interleave(2, 1).mT).masked_fill(n >= lengths[:, None, None, None], -math.inf)
        return torch.softmax(scores, -1) @ v.repeat_interleave(2, 1)

    inputs = torch.randn(B, H, 1, D), *caches(16, False, torch.float32, [77, 1, 33, 96])
    for function in (across, cut_in_front, two_tables, zeroed_where_seen):
        assert not found(function, inputs)[1].alternatives, function


def test_shapes_that_do_not_fit() -> None:
    keys, values, table, lengths = caches(16, False, torch.float32, [77, 1, 33, 96])
    q = torch.randn(B, H, D)
    for given, said in (
        ({"layout": "HND"}, "does not fit 16 key heads"),
        ({"layout": "DNH"}, "layout is"),
        ({"query": q[0]}, "query is"),
        ({"context_lens": lengths[:2]}, "for the batch of 4"),
        ({"block_table": table.float()}, "int32 or int64"),
        ({"key_cache": keys.half(), "value_cache": values.half()}, "needs k_scale"),
        ({"k_scale": torch.ones(3)}, "one per key head"),
    ):  # fmt: skip
        arguments = {
            "query": q,
            "key_cache": keys,
            "value_cache": values,
            "block_table": table,
            "context_lens": lengths,
        }
        with pytest.raises(ValueError, match=said):
            fc.paged_attention(**(arguments | given))


def test_every_target_compiles_it() -> None:
    ahead_of_time.compile_all("test_paged_attention")


def compile_all() -> None:
    """In a process of its own: interpreted kernels cannot be compiled."""
    from triton.backends.compiler import GPUTarget

    from fusion_compiler.lowering.triton_codegen.aot import compile_text, resources

    q = torch.randn(B, H, 1, D).bfloat16()
    for size, block in ((16, 64), (64, 32)):
        graph_module, match = found(indexed, (q, *caches(size, False, torch.bfloat16, [77, 1, 33, 96])))
        [(op, site)] = match.alternatives
        plan = Plan(16, block, 4, 4, 3)
        source = decode.prepared(op, plan, splice.Builder(graph_module, site.place), site)[0]
        for target in TARGETS:
            made = compile_text(
                source.text, source.name, source.tensors, source.sizes, {}, GPUTarget(*target),
                num_warps=4, num_stages=2 if target[0] == "hip" else source.num_stages,
            )  # fmt: skip
            assert resources(made).spills == 0, (target, resources(made))
