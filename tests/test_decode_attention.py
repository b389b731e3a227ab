"""Decode attention: found, generated, run in Triton's interpreter, compiled for every target, judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ahead_of_time
import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import fusion_compiler as fc
from fusion_compiler import backend, layout, splice
from fusion_compiler.attention import find_attention
from fusion_compiler.candidates import Unavailable
from fusion_compiler.legality import Legality
from fusion_compiler.lowering.triton_codegen import TritonCodegen
from fusion_compiler.lowering.triton_codegen.decode import attention as decode
from fusion_compiler.lowering.triton_codegen.decode import predict
from fusion_compiler.machine import TABLE

Tensor = torch.Tensor
H200 = TABLE["h200"]


def attend(q: Tensor, k: Tensor, v: Tensor, change: Callable[[Tensor], Tensor] = lambda s: s) -> Tensor:
    """Heads of k and v repeated; `change` makes masked scores of the scaled ones."""
    times = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(times, dim=1) for t in (k, v)) if times > 1 else (k, v)
    scores = change(torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5)
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.matmul(torch.softmax(scores, -1, dtype=wide).to(q.dtype), v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


def relative(s: Tensor, position: Tensor | int) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys."""
    i, j = (torch.arange(n, device=s.device) for n in s.shape[-2:])
    return position + i[:, None], j[None, :]


def static_cache(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    def change(s: Tensor) -> Tensor:
        i, j = relative(s, position)
        return s + torch.where(j <= i, s.new_zeros(()), torch.finfo(s.dtype).min)

    return attend(q, k, v, change)


def sliding(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    def change(s: Tensor) -> Tensor:
        i, j = relative(s, position)
        return s.masked_fill(~((j <= i) & (j > i - 40)), -math.inf)

    return attend(q, k, v, change)


def chunked(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    def change(s: Tensor) -> Tensor:
        i, j = relative(s, position)
        return s.masked_fill(~((j <= i) & (j // 32 == i // 32)), -math.inf)

    return attend(q, k, v, change)


def lengths(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    def change(s: Tensor) -> Tensor:
        return s.masked_fill(torch.arange(s.shape[-1]) >= lengths[:, None, None, None], -math.inf)

    return attend(q, k, v, change)


def newest_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The queries are those of the last keys."""

    def change(s: Tensor) -> Tensor:
        i, j = relative(s, s.shape[-1] - s.shape[-2])
        return s.masked_fill(j > i, -math.inf)

    return attend(q, k, v, change)


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, lambda s: 5.0 * torch.tanh(s / 5.0))


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return attend(q, k, v, lambda s: s + bias)


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return attend(q, k, v, lambda s: s + slopes[:, None, None] * torch.arange(s.shape[-1]))


def left_padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    least = torch.finfo(q.dtype).min
    return attend(q, k, v, lambda s: s + torch.where(keep[:, None, None, :], s.new_zeros(()), least))


def scaled_by_tensor(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / scale, -1) @ v


def heads(b: int, h: int, hk: int, lq: int, lk: int, d: int, dv: int | None = None) -> tuple[Tensor, ...]:
    return torch.randn(b, h, lq, d), torch.randn(b, hk, lk, d), torch.randn(b, hk, lk, dv or d)


def at(position: int) -> Tensor:
    return torch.tensor([position])


def padding(*left: int) -> Tensor:
    return torch.arange(90) >= torch.tensor(left)[:, None]


# function, its arguments in float32 (integers and booleans stay), splits
CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]], int]] = {
    "plain": (plain, lambda: heads(2, 4, 4, 1, 100, 32), 1),
    "plain, split": (plain, lambda: heads(2, 4, 4, 1, 300, 32), 3),
    "group of 4, split": (plain, lambda: heads(1, 8, 2, 1, 333, 64), 4),
    "group of 3, width 80": (plain, lambda: heads(1, 6, 2, 1, 77, 80), 1),
    "group of 71": (plain, lambda: heads(1, 71, 1, 1, 130, 32), 3),
    "width 256": (plain, lambda: heads(1, 2, 1, 1, 65, 256), 2),
    "width 40, split": (plain, lambda: heads(1, 2, 1, 1, 200, 40), 3),
    "wider values": (plain, lambda: heads(1, 2, 2, 1, 150, 64, 96), 2),
    "left padding": (left_padded, lambda: (*heads(2, 4, 2, 1, 90, 32), padding(0, 37)), 2),
    "left padding, a row of nothing": (left_padded, lambda: (*heads(2, 4, 2, 1, 90, 32), padding(90, 37)), 2),
    "lengths, nothing of one": (lengths, lambda: (*heads(3, 4, 2, 1, 200, 32), torch.tensor([200, 0, 77])), 2),
    "four queries": (plain, lambda: heads(2, 4, 2, 4, 140, 32), 2),
    "static cache": (static_cache, lambda: (*heads(1, 8, 2, 1, 300, 32), at(133)), 4),
    "static cache, one position": (static_cache, lambda: (*heads(1, 8, 2, 1, 300, 32), at(0)), 4),
    "static cache, full": (static_cache, lambda: (*heads(1, 8, 2, 1, 300, 32), at(299)), 4),
    "static cache, five queries": (static_cache, lambda: (*heads(1, 4, 2, 5, 300, 32), at(128)), 4),
    "sliding window": (sliding, lambda: (*heads(1, 4, 2, 1, 300, 32), at(200)), 2),
    "sliding window, three queries": (sliding, lambda: (*heads(2, 4, 2, 3, 300, 32), at(200)), 3),
    "chunked": (chunked, lambda: (*heads(1, 4, 2, 1, 200, 32), at(100)), 2),
    "chunked, five queries over a border": (chunked, lambda: (*heads(1, 4, 2, 5, 200, 32), at(94)), 2),
    "lengths": (lengths, lambda: (*heads(3, 4, 2, 1, 200, 32), torch.tensor([200, 1, 77])), 2),
    "newest queries": (newest_queries, lambda: heads(2, 4, 2, 3, 90, 32), 2),
    "softcap": (softcapped, lambda: heads(1, 4, 2, 1, 120, 32), 2),
    "bias": (biased, lambda: (*heads(2, 4, 2, 2, 120, 32), torch.randn(4, 2, 120)), 2),
    "ALiBi": (alibi, lambda: (*heads(2, 4, 4, 1, 120, 32), torch.rand(4)), 2),
    "one head": (static_cache, lambda: (*heads(2, 1, 1, 1, 90, 32), torch.tensor([70])), 1),
    "one head, splits": (static_cache, lambda: (*heads(1, 1, 1, 1, 90, 32), torch.tensor([70])), 3),
    "scale on the device": (scaled_by_tensor, lambda: (*heads(2, 4, 4, 1, 90, 32), torch.tensor([4.0])), 1),
}  # fmt: skip


def inputs_of(case: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(len(case))
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in CASES[case][1]())


def found(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dynamic: bool = False) -> tuple[Any, Any]:
    mode = "symbolic" if dynamic else "fake"
    with torch.no_grad():
        graph_module = make_fx(function, tracing_mode=mode, decomposition_table=select_decomp_table())(*inputs)
    graph_module.graph.eliminate_dead_code()
    matches, near = find_attention(graph_module)
    assert len(matches) == 1, near
    [match] = matches
    assert Legality(graph_module.graph).check(match.site) is None
    return graph_module, match


def generated(graph_module: Any, match: Any, **changes: Any) -> Any:
    """The graph with the attention replaced by the generated kernel, with what is to differ from the best plan."""
    plan = predict.best_plan(match.op, H200)
    assert plan is not None and decode._refusal(match.op, H200) is None
    plan = replace(plan, **{"block": 32, **changes})
    builder = splice.Builder(graph_module, match.site.place)
    new = decode.emit(match.op, plan, builder, match.site)
    splice.replace(match.site, layout.fit(builder, match.site, new))
    splice.clean(graph_module)
    return graph_module


def refusals(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dynamic: bool = False) -> list[str]:
    offered = TritonCodegen().candidates(found(function, inputs, dynamic)[1].op, H200)
    return [offered.reason] if isinstance(offered, Unavailable) else []


def assert_as_good_as_eager(out: Tensor, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    eager = function(*inputs)
    wanted = function(*(t.double() if t.is_floating_point() else t for t in inputs))
    assert out.shape == eager.shape and out.dtype == eager.dtype
    hidden = eager.isnan()  # rows that see no key
    assert torch.equal(out.isnan(), hidden)
    error, own = ((t.double() - wanted)[~hidden] for t in (out, eager))
    assert error.norm() <= 1.5 * own.norm() + 2e-7 * wanted[~hidden].norm(), (float(error.norm()), float(own.norm()))
    if out.dim() == 4:  # the worst row too
        worst, own_worst = ((t.double() - wanted).norm(dim=-1).nan_to_num().max() for t in (out, eager))
        assert worst <= 2.5 * own_worst + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_numbers(case: str, dtype: torch.dtype) -> None:
    function, _, splits = CASES[case]
    inputs = inputs_of(case, dtype)
    if CASES[case][0] is left_padded and dtype == torch.float16:
        [refusal] = refusals(function, inputs)
        assert "averages all values in eager's float16" in refusal
        return
    graph_module, match = found(function, inputs)
    own = dtype == torch.float16  # keys for each warp, as codes ask for
    out = generated(graph_module, match, splits=splits, own_keys=own)(*inputs)
    assert_as_good_as_eager(out, function, inputs)


def compiled(function: Callable[..., Any], *inputs: Tensor) -> tuple[Any, fc.Report]:
    """The whole line, kernels in the interpreter. In float32 no vendor's kernel competes."""
    options = {"strict": True, "remainder": "eager", "machine": "h200"}
    with torch.no_grad():
        out = torch.compile(function, backend=backend.fusion_compiler, options=options)(*inputs)
    made = fc.last_report()
    assert made is not None
    return out, made


def decode_step(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Two layers over static caches that are written in place."""
    out = []
    for layer in range(2):
        keys[layer].index_copy_(2, position, k)
        values[layer].index_copy_(2, position, v)
        out.append(static_cache(q, keys[layer], values[layer], position))
    position.add_(1)
    return out[0], out[1]


def test_caches_written_in_place() -> None:
    torch.manual_seed(1)
    q, k, v = heads(2, 8, 2, 1, 1, 32)
    caches = torch.randn(2, 2, 2, 2, 400, 32)
    positions, states = [at(130), at(130)], [caches, caches.clone()]
    for step in range(2):
        outs = []
        for function, position, state in zip((compiled, lambda f, *a: (f(*a), None)), positions, states, strict=True):
            outs.append(function(decode_step, q + step, state[0], state[1], k, v, position)[0])
        assert torch.equal(*states) and torch.equal(*positions)
        assert all((a - b).abs().max() <= 2e-6 for a, b in zip(*outs, strict=True))
    report = fc.last_report()
    assert report is not None and [d.kernel[:13] for d in report.fused] == ["triton decode"] * 2, report


def test_symbolic_batch_and_length() -> None:
    inputs = heads(3, 4, 2, 2, 150, 32)
    for t, dim in ((inputs[0], 0), (inputs[1], 0), (inputs[2], 0), (inputs[1], 2), (inputs[2], 2)):
        torch._dynamo.mark_dynamic(t, dim)
    out, report = compiled(newest_queries, *inputs)
    assert [d.kernel[:13] for d in report.fused] == ["triton decode"], report
    assert_as_good_as_eager(out, newest_queries, inputs)


TARGETS = [("cuda", 90, 32), ("hip", "gfx942", 64)]


def test_every_target_compiles_it() -> None:
    ahead_of_time.compile_all("test_decode_attention", "static cache, five queries")


def compile_all(case: str) -> None:
    """In a process of its own: interpreted kernels cannot be compiled."""
    from triton.backends.compiler import GPUTarget

    from fusion_compiler.lowering.triton_codegen.aot import compile_text, resources

    inputs = inputs_of(case, torch.bfloat16)
    graph_module, match = found(CASES[case][0], inputs)
    plan = predict.best_plan(match.op, H200)
    assert plan is not None
    plan = replace(plan, splits=4)
    builder = splice.Builder(graph_module, match.site.place)
    source = decode.prepared(match.op, plan, builder, match.site)[0]
    for target in TARGETS:
        made = compile_text(
            source.text, source.name, source.tensors, source.sizes, {}, GPUTarget(*target),
            num_warps=plan.num_warps, num_stages=2 if target[0] == "hip" else source.num_stages,
        )  # fmt: skip
        assert resources(made).spills == 0, (target, resources(made))
