"""Rotation, norm of heads and cache write as one kernel: found in transformers' and others' spellings, run in Triton's
interpreter through the whole line, compiled, judged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ahead_of_time
import pytest
import torch
import torch.nn.functional as F

import fusion_compiler as fc
from fusion_compiler import backend
from fusion_compiler.patterns.rope_cache import rotate_half
from fusion_compiler.torch_private import fake_tensors, inductor

Tensor = torch.Tensor
Step = Callable[..., tuple[Tensor, ...]]
OTHERS = [p.name for p in fc.patterns() if p.name != "rope_cache"]
B, H, HK, L, S, D = 2, 6, 2, 3, 12, 16


def llama(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor, position: Tensor
) -> tuple[Tensor, ...]:
    q, k, v = (t.view(B, L, -1, D).transpose(1, 2) for t in (q, k, v))
    cos, sin = (torch.cat((f(angles), f(angles)), -1)[None, None].to(q.dtype) for f in (torch.cos, torch.sin))
    q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
    at = torch.arange(L, device=q.device) + position
    return q, keys.index_copy_(2, at, k), values.index_copy_(2, at, v)


def normed(step: Step) -> Step:
    """Qwen3: heads of q and k are normalised first."""

    def with_norms(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        angles: Tensor,
        keys: Tensor,
        values: Tensor,
        position: Tensor,
        wq: Tensor,
        wk: Tensor,
    ) -> tuple[Tensor, ...]:
        q = F.rms_norm(q.view(B, L, -1, D), (D,), wq, 1e-6).flatten(2)
        k = F.rms_norm(k.view(B, L, -1, D), (D,), wk, 1e-6).flatten(2)
        return step(q, k, v, angles, keys, values, position)

    return with_norms


def interleaved(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor, position: Tensor
) -> tuple[Tensor, ...]:
    """gpt-fast: pairs, tokens before heads, the cache assigned to at given positions."""
    q, k, v = (t.view(B, L, -1, D) for t in (q, k, v))

    def turn(x: Tensor) -> Tensor:
        a, b = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        c, s = angles.cos()[None, :, None], angles.sin()[None, :, None]
        return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(3).type_as(x)

    q, k, v = (t.transpose(1, 2) for t in (turn(q), turn(k), v))
    at = position[0] + torch.tensor([4, 0, -1], device=q.device)
    keys[:, :, at] = k
    values[:, :, at] = v
    return q, keys.clone(), values.clone()


def partial(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor, position: Tensor
) -> tuple[Tensor, ...]:
    """GPT-NeoX, Phi, GLM: the first elements of each head alone are turned."""
    q, k, v = (t.view(B, L, -1, D).transpose(1, 2) for t in (q, k, v))
    angles = angles[:, : D // 4 - 1]
    cos, sin = (torch.cat((f(angles), f(angles)), -1)[None, None].to(q.dtype) for f in (torch.cos, torch.sin))
    width = cos.shape[-1]
    q, k = (torch.cat((t[..., :width] * cos + rotate_half(t[..., :width]) * sin, t[..., width:]), -1) for t in (q, k))
    at = torch.arange(L, device=q.device) + position
    return q, keys.index_copy_(2, at, k), values.index_copy_(2, at, v)


def apertus(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor, position: Tensor, wq: Tensor,
    wk: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Heads are normalised where they stand turned around, just before the rotation, which halves the product."""
    q, k, v = (t.view(B, L, -1, D).transpose(1, 2) for t in (q, k, v))

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    return yarn(normed(q, wq), normed(k, wk), v, angles, keys, values, position)


def yarn(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor, position: Tensor
) -> tuple[Tensor, ...]:
    """GPT-OSS: cos and sin of half a head have a factor."""
    q, k, v = (t if t.dim() == 4 else t.view(B, L, -1, D).transpose(1, 2) for t in (q, k, v))
    cos, sin = ((f(angles) * 1.25).to(q.dtype)[None, None] for f in (torch.cos, torch.sin))

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    at = torch.arange(L, device=q.device) + position
    return turn(q), keys.index_copy_(2, at, turn(k)), values.index_copy_(2, at, v)


def put(spelling: str, cache: Tensor, rows: Tensor, position: Tensor | int) -> Tensor:
    """`rows` in the cache, as a new tensor, from `position` on."""
    if isinstance(position, int):
        if spelling == "slice":
            return torch.slice_scatter(cache, rows, 2, position, position + L)
        cache[:, :, position : position + L] = rows
        return cache.clone()
    at = (torch.arange(L, device=rows.device) + position)[None, None, :, None].expand_as(rows)
    return cache.scatter(2, at, rows) if spelling == "scatter" else cache.scatter_(2, at, rows).clone()


def putting(spelling: str, position: int | None) -> Step:
    def step(
        q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor, index: Tensor
    ) -> tuple[Tensor, ...]:
        q, k, v = (t.view(B, L, -1, D).transpose(1, 2) for t in (q, k, v))
        cos, sin = (torch.cat((f(angles), f(angles)), -1)[None, None].to(q.dtype) for f in (torch.cos, torch.sin))
        q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
        at = index if position is None else position
        return q, put(spelling, keys, k, at), put(spelling, values, v, at)

    return step


def sequences(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor, index: Tensor
) -> tuple[Tensor, ...]:
    """Every sequence is at a position of its own, which tells its angles too."""
    q, k, v = (t.view(B, L, -1, D).transpose(1, 2) for t in (q, k, v))
    at = index + torch.arange(L, device=q.device) + torch.tensor([[0], [2 - S]], device=q.device)
    angles = angles[0] * at[..., None].to(angles.dtype)
    cos, sin = (torch.cat((f(angles), f(angles)), -1)[:, None].to(q.dtype) for f in (torch.cos, torch.sin))
    q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
    batch = torch.arange(B, device=q.device)[:, None]
    keys[batch, :, at], values[batch, :, at] = k.transpose(1, 2), v.transpose(1, 2)
    return q, keys.clone(), values.clone()


def one_each(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor, index: Tensor
) -> tuple[Tensor, ...]:
    q, k = (t[:, :1].view(B, 1, -1, D).transpose(1, 2) for t in (q, k))
    v = v[:, :1].view(B, 1, -1, D)
    cos, sin = (
        torch.cat((f(angles[:B]), f(angles[:B])), -1)[:, None, None].to(q.dtype) for f in (torch.cos, torch.sin)
    )
    q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
    at, batch = index * torch.tensor([1, 2], device=q.device), torch.arange(B, device=q.device)
    keys[batch, :, at], values[batch, :, at] = k[:, :, 0], v[:, 0]
    return q, keys.clone(), values.clone()


WRITES = {
    "sequences": (sequences, "sequences"), "one token each": (one_each, "sequences"),
    "scatter": (putting("scatter", None), "scalar"), "scatter_": (putting("scatter_", None), "scalar"),
    "slice_scatter": (putting("slice", 4), "none"), "assigned": (putting("assigned", 4), "none"),
    "prefill": (putting("assigned", 0), "none"), "the last": (putting("slice", S - L), "none"),
}  # fmt: skip
CASES: dict[str, tuple[Step, int]] = {
    "llama": (llama, 0), "qwen3": (normed(llama), 2), "interleaved": (interleaved, 0), "partial": (partial, 0),
    "partial, norms": (normed(partial), 2), "yarn": (yarn, 0), "apertus": (apertus, 2),
    **{name: (step, 0) for name, (step, _) in WRITES.items()},
}  # fmt: skip


def inputs_of(case: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    tensors = (
        torch.randn(B, L, H * D), torch.randn(B, L, HK * D), torch.randn(B, L, HK * D), torch.rand(L, D // 2) * 3,
        torch.randn(B, HK, S, D), torch.randn(B, HK, S, D),
    )  # fmt: skip
    weights = tuple(torch.randn(D) for _ in range(CASES[case][1]))
    return *(t.to(dtype) for t in tensors), torch.tensor([5]), *(w.to(dtype) for w in weights)


def run(function: Step, *inputs: Tensor, **options: Any) -> tuple[tuple[Tensor, ...], fc.Report]:
    given = {"strict": True, "remainder": "eager", "machine": "h200", "disable": OTHERS, **options}
    with torch.no_grad():
        out = torch.compile(function, backend=backend.fusion_compiler, options=given, dynamic=False)(*inputs)
    made = fc.last_report()
    assert made is not None
    return out, made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_numbers(case: str, dtype: torch.dtype) -> None:
    function, inputs = CASES[case][0], inputs_of(case, dtype)
    mine = tuple(t.clone() for t in inputs)
    out, made = run(function, *mine)
    assert [d.kernel for d in made.fused] == ["triton rope_cache"], made
    theirs = tuple(t.clone() for t in inputs)
    eager = function(*theirs)
    doubles = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    wanted = function(*doubles)
    for o, e, w in zip((*out, *mine[4:6]), (*eager, *theirs[4:6]), (*wanted, *doubles[4:6]), strict=True):
        assert o.shape == e.shape and o.dtype == e.dtype
        error, own = ((t.double() - w).norm() for t in (o, e))
        assert error <= 1.5 * own + 3e-7 * w.norm(), (float(error), float(own))


@pytest.mark.parametrize("case", WRITES)
def test_what_says_where_rows_are_written(case: str) -> None:
    step, index = WRITES[case]
    _, made = run(step, *inputs_of(case, torch.float32))
    assert [dict(d.details)["index"] for d in made.fused] == [index]


def one_token(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: int
) -> tuple[Tensor, ...]:
    q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
    keys[:, :, at : at + 1], values[:, :, at : at + 1] = k, v
    return q, keys.clone(), values.clone()


def test_a_position_that_python_counts_is_one_kernel_for_all() -> None:
    """The second position makes the number symbolic; the kernel takes it as an argument."""
    heads = torch.randn(B, H, 1, D), torch.randn(B, HK, 1, D), torch.randn(B, HK, 1, D)
    options = {"strict": True, "remainder": "eager", "machine": "h200", "disable": OTHERS}
    torch._dynamo.reset()
    compiled = torch.compile(one_token, backend=backend.fusion_compiler, options=options)
    for at in (3, 5, 9):
        given = *heads, torch.rand(1, D), torch.rand(1, D), torch.randn(B, HK, S, D), torch.randn(B, HK, S, D)
        mine, theirs = ([t.clone() for t in given] for _ in range(2))
        with torch.no_grad():
            out = compiled(*mine, at)
        torch.testing.assert_close(out, one_token(*theirs, at), atol=1e-6, rtol=1e-6)
        made = fc.last_report()
        assert made is not None and [dict(d.details)["index"] for d in made.fused] == ["none" if at == 3 else "size"]


def test_a_position_below_zero_counts_from_the_end() -> None:
    def step(
        q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor, position: Tensor
    ) -> tuple[Tensor, ...]:
        q, k, v = (t.view(B, L, -1, D).transpose(1, 2) for t in (q, k, v))
        cos, sin = (torch.cat((f(angles), f(angles)), -1)[None, None] for f in (torch.cos, torch.sin))
        q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
        at = torch.arange(L) + position - 2
        keys[:, :, at], values[:, :, at] = k, v
        return q, keys.clone(), values.clone()

    inputs = *inputs_of("llama", torch.float32)[:6], torch.tensor([1])
    out, made = run(step, *(t.clone() for t in inputs))
    assert [d.kernel for d in made.fused] == ["triton rope_cache"], made
    torch.testing.assert_close(out, step(*(t.clone() for t in inputs)), atol=1e-6, rtol=1e-6)


def behind(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Hunyuan."""
    q, k = (F.rms_norm(t * cos + rotate_half(t) * sin, (D,)) for t in (q, k))
    return q, k


def complex_numbers(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Llama 4, DeepSeek V2."""
    turns = torch.complex(cos[..., : D // 2].contiguous(), sin[..., : D // 2].contiguous())
    pairs = (torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2)) for t in (q, k))
    return tuple(torch.view_as_real(t * turns).flatten(-2) for t in pairs)


def pairs_to_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """DeepSeek V3."""
    c, s = cos[..., : D // 2], sin[..., : D // 2]
    pairs = ((t[..., ::2], t[..., 1::2]) for t in (q, k))
    return tuple(torch.cat([a * c - b * s, b * c + a * s], dim=-1) for a, b in pairs)


def scaled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return tuple((t * cos + rotate_half(t) * sin).sinh() for t in (q, k))


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        (behind, "normalised behind the rotation"),
        (complex_numbers, "as complex numbers"),
        (pairs_to_halves, "joined otherwise than they were taken apart"),
        (scaled, "sinh_1 stands between them"),
    ],
)
def test_what_stands_between_a_rotation_and_a_cache_is_said(turn: Callable[..., Any], why: str) -> None:
    def step(
        q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Tensor
    ) -> Any:
        q, k = turn(q, k, cos, sin)
        return q, keys.index_copy_(2, at, k), values.index_copy_(2, at, v)

    heads = torch.randn(B, H, L, D), torch.randn(B, HK, L, D), torch.randn(B, HK, L, D)
    caches = torch.randn(B, HK, S, D), torch.randn(B, HK, S, D)
    _, made = run(step, *heads, torch.rand(L, D), torch.rand(L, D), *caches, torch.arange(L))
    assert any(why in m.reason for m in made.near_misses if m.pattern == "rope_cache"), made


def test_the_norm_of_heads_is_part_of_it() -> None:
    _, made = run(normed(llama), *inputs_of("qwen3", torch.float32))
    [decision] = made.fused
    assert dict(decision.details)["norms"] == 2


def test_inductor_writes_the_caches_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """No clone of a cache is left once Inductor has put its functional nodes back in place."""
    from torch._inductor.fx_passes.post_grad import decompose_triton_kernel_wrapper_functional
    from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
    from torch._inductor.fx_utils import FakeTensorUpdater
    from torch._inductor.virtualized import V

    left: list[Any] = []
    run_eagerly = inductor.run_eagerly

    def looked_at(gm: torch.fx.GraphModule) -> Any:
        finished = copy.deepcopy(gm)
        with V.set_fake_mode(fake_tensors.mode_of(finished)):
            owner = finished.graph if torch.__version__ < "2.12" else finished
            reinplace_inplaceable_ops(FakeTensorUpdater(owner), finished.graph)
            decompose_triton_kernel_wrapper_functional(finished.graph)
        left.extend(n for n in finished.graph.nodes if n.op == "call_function")
        return run_eagerly(gm)

    def attend(*inputs: Tensor) -> Tensor:
        q, keys, values = llama(*inputs)
        return torch.softmax(q.unflatten(1, (HK, -1)) @ keys[:, :, None].mT, -1) @ values[:, :, None]

    monkeypatch.setattr(inductor, "run_eagerly", looked_at)
    _, made = run(attend, *inputs_of("llama", torch.float32))
    assert [d.kernel for d in made.fused] == ["triton rope_cache"], made
    assert torch.ops.higher_order.triton_kernel_wrapper_mutation in [n.target for n in left]
    copies = [n for n in left if n.target in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)]
    assert not [n for n in copies if "val" not in n.meta or n.meta["val"].numel() == B * HK * S * D], copies


def test_every_target_compiles_it() -> None:
    ahead_of_time.compile_all("test_rope_cache")


def compile_all() -> None:
    """In a process of its own: interpreted kernels cannot be compiled."""
    from triton.backends.compiler import GPUTarget

    from fusion_compiler.fused import RopeCache, RowNorm
    from fusion_compiler.lowering.triton_codegen import rope_cache
    from fusion_compiler.lowering.triton_codegen.aot import compile_text, resources

    norm, rows = RowNorm("rms", 1e-6, True), (4096, 64, 4096, 1)
    op = RopeCache(4, 32, 8, 1, 1024, 128, 128, ("values", "out", "keys"), torch.bfloat16, q_norm=norm, k_norm=norm)
    reading = rope_cache.Reading(rows, rows, rows, (0, 0, 64, 1), (0, 0, 64, 1), rows, rows, rows, halves=True)
    tensors = dict.fromkeys(rope_cache.argument_names(op), torch.bfloat16) | {"index": torch.int64}
    for turned, *target in ((0, "cuda", 90, 32), (0, "hip", "gfx942", 64), (32, "cuda", 90, 32)):
        text = rope_cache.write(replace(op, rotary=turned), reading)
        made = compile_text(text, rope_cache.NAME, tensors, [], {}, GPUTarget(*target), num_warps=4)
        assert resources(made).spills == 0
