"""Prompts against keys and values stored as codes: the flash kernel makes numbers of them on their way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ahead_of_time
import pytest
import torch
from test_decode_attention import H200, compiled
from test_flash import traced
from test_quantised_attention import nibbles
from torch._subclasses.fake_tensor import FakeTensorMode

import fusion_compiler as fc
from fusion_compiler import layout, splice
from fusion_compiler.attention.recognise import find_attention
from fusion_compiler.candidates import Unavailable
from fusion_compiler.fused import Pages, StoredAttention
from fusion_compiler.lowering.triton_codegen import flash
from fusion_compiler.lowering.triton_codegen.aot import compile_text, resources
from fusion_compiler.lowering.triton_codegen.flash import predict
from fusion_compiler.lowering.triton_codegen.flash.emit import emit
from fusion_compiler.lowering.triton_codegen.flash.plan import Plan
from fusion_compiler.lowering.triton_codegen.flash.source import NAME

__all__ = ["predict"]
Tensor = torch.Tensor
B, H, HK, L, S, D = 2, 4, 2, 40, 72, 64
SMALL = Plan(32, 16, 4, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, *, cap: float = 0.0) -> Tensor:
    """Grouped heads, causal from the end of the keys."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    s = q @ k.mT / math.sqrt(q.shape[-1])
    s = cap * torch.tanh(s / cap) if cap else s
    rows, keys = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    return (s.masked_fill(keys > rows + (k.shape[2] - q.shape[2]), -math.inf)).softmax(-1) @ v


def int8(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor) -> Tensor:
    return attend(q, k.to(q.dtype) * ks, v.to(q.dtype) * vs)


def with_zeros(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, kz: Tensor, vz: Tensor) -> Tensor:
    return attend(q, (k.to(q.dtype) - kz) * ks, (v.to(q.dtype) - vz) * vs)


def int4(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, kz: Tensor, vz: Tensor) -> Tensor:
    return attend(q, (nibbles(k).to(q.dtype) - kz) * ks, (nibbles(v).to(q.dtype) - vz) * vs)


def halves(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor) -> Tensor:
    k, v = (torch.cat((t & 15, t >> 4), dim=-1).to(q.dtype) for t in (k, v))
    return attend(q, (k - 7.5) * ks, (v - 7.5) * vs)


def capped(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor) -> Tensor:
    return attend(q, k.to(q.dtype) * ks, v.to(q.dtype) * vs, cap=5.0)


def values_alone(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor) -> Tensor:
    return attend(q, k, v.to(q.dtype) * vs)


def keys_alone(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor) -> Tensor:
    return attend(q, k.to(q.dtype) * ks, v)


TOKEN, HEAD, TENSOR = (B, HK, S, 1), (HK, 1, 1), ()
FLOAT = torch.float16
# function; what keys and values are stored as; shape of scales; largest code; middle of zeros or None
CASES: dict[str, tuple[Callable[..., Tensor], torch.dtype, torch.dtype, tuple[int, ...], float, float | None]] = {
    "int8 per token": (int8, torch.int8, torch.int8, TOKEN, 60.0, None),
    "int8 per head": (int8, torch.int8, torch.int8, HEAD, 60.0, None),
    "uint8 with zeros": (with_zeros, torch.uint8, torch.uint8, TOKEN, 60.0, 128.0),
    "fp8 per tensor": (int8, torch.float8_e4m3fn, torch.float8_e4m3fn, TENSOR, 1.0, None),
    "fp8 per head": (int8, torch.float8_e5m2, torch.float8_e5m2, HEAD, 1.0, None),
    "int4 with zeros": (int4, torch.uint8, torch.uint8, TOKEN, 5.0, 7.0),
    "int4 in halves": (halves, torch.uint8, torch.uint8, HEAD, 5.0, None),
    "a cap": (capped, torch.int8, torch.int8, TOKEN, 60.0, None),
    "keys alone": (keys_alone, torch.int8, FLOAT, TOKEN, 60.0, None),
    "values alone": (values_alone, FLOAT, torch.float8_e4m3fn, TOKEN, 1.0, None),
}


def codes(dtype: torch.dtype, width: int) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(B, HK, S, width).to(dtype)
    low, high = (-127, 128) if dtype == torch.int8 else (0, 256)
    return torch.randint(low, high, (B, HK, S, width), dtype=dtype)


def inputs_of(case: str, dtype: torch.dtype = FLOAT, width: int = D) -> tuple[Tensor, ...]:
    torch.manual_seed(len(case))
    function, k, v, shape, top, zero = CASES[case]
    stored = width // 2 if function in (int4, halves) else width
    given = [torch.randn(B, H, L, width).to(dtype)]
    given += [codes(kind, stored).to(dtype if kind == FLOAT else kind) for kind in (k, v)]
    given += [((torch.rand(shape) + 0.5) / top).to(dtype) for _ in range(2)]
    if zero is not None:
        given += [(torch.rand(TOKEN) * 4 + zero).round().to(dtype) for _ in range(2)]
    return tuple(given)


def stored(case: str, dtype: torch.dtype = FLOAT, width: int = D) -> tuple[Any, StoredAttention, Any]:
    graph_module = traced(CASES[case][0], *inputs_of(case, dtype, width))
    [match], _ = find_attention(graph_module)
    [(op, site)] = match.alternatives
    assert isinstance(op, StoredAttention)
    return graph_module, op, site


@pytest.mark.parametrize(
    ("case", "width"),
    [
        *((case, D) for case in CASES),
        ("int8 per token", 48),
        ("int4 with zeros", 80),
        ("int4 in halves", 48),
        ("int4 in halves", 80),
    ],
)
def test_numbers(case: str, width: int) -> None:
    function, inputs = CASES[case][0], inputs_of(case, width=width)
    graph_module, op, site = stored(case, width=width)
    builder = splice.Builder(graph_module, site.place)
    splice.replace(site, layout.fit(builder, site, emit(op, SMALL, builder, site)))
    splice.clean(graph_module)
    casts = [n for n in graph_module.graph.nodes if "convert_element_type" in str(n.target)]
    assert not [n for n in casts if n.meta["val"].shape[-2:] == (S, width)], "codes are read as they are"
    exact = function(*(t.double() if t.dtype == FLOAT else t for t in inputs))
    error, own = ((t.double() - exact).norm() for t in (graph_module(*inputs), function(*inputs)))
    assert error <= 1.5 * own, (float(error), float(own))


def decision(queries: int, kv_heads: int, keys: int = 4096) -> Any:
    """The verdict on attention of 32 heads of 128 in a batch of 4, int8 with scales for each token."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(4, 32, queries, 128, dtype=torch.bfloat16)
        k, v = (torch.empty(4, kv_heads, keys, 128, dtype=torch.int8) for _ in range(2))
        ks, vs = (torch.empty(4, kv_heads, keys, 1, dtype=torch.bfloat16) for _ in range(2))
    [found] = [d for d in fc.explain(int8, q, k, v, ks, vs, machine="h200").decisions if d.pattern == "attention"]
    return found


def test_many_queries_are_dequantised_for_in_front_and_the_report_says_what_the_kernel_would_take() -> None:
    """Measured: full attention of 2048 queries takes 1.4 to 1.7 times as long where codes are read as they are."""
    found = decision(2048, 32, 2048)
    assert "cudnn" in found.kernel
    assert "dequantised or gathered in front" in found.reason and "which would read it as it is" in found.reason


def test_few_queries_and_many_key_heads_read_the_codes() -> None:
    found = decision(128, 32)
    assert found.kernel.startswith("triton flash")
    assert dict(found.details)["codes"] == "torch.int8, torch.int8"
    assert found.after.bytes < 0.3 * found.before.bytes


def test_what_the_kernel_does_not_read_is_said() -> None:
    _, op, _ = stored("int8 per token", torch.float32)
    why = flash.candidates(op, H200)
    assert isinstance(why, Unavailable) and "float16 and bfloat16" in why.reason
    why = flash.candidates(replace(op, pages=Pages(16)), H200)
    assert isinstance(why, Unavailable) and "pages" in why.reason


def test_the_whole_line_reads_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    free = replace(predict.constants(), code=0.0, scale=0.0)
    monkeypatch.setattr(predict, "constants", lambda: free)
    inputs = [torch.randn(B, H, 128, D).half(), *(t.repeat(1, 1, 3, 1) for t in inputs_of("int8 per token")[1:])]
    out, report = compiled(int8, *inputs)
    [found] = report.fused
    assert dict(found.details)["codes"] == "torch.int8, torch.int8", report
    exact = int8(*(t.double() if t.dtype == FLOAT else t for t in inputs))
    error, own = ((t.double() - exact).norm() for t in (out, int8(*inputs)))
    assert error <= 1.5 * own


def test_every_target_compiles_it() -> None:
    ahead_of_time.compile_all("test_quantised_prefill")


def compile_all() -> None:
    """In a process of its own: interpreted kernels cannot be compiled."""
    from triton.backends.compiler import GPUTarget

    for case in ("int8 per token", "fp8 per head", "int4 with zeros", "int4 in halves"):
        graph_module, op, site = stored(case, torch.bfloat16, 128)
        plan = predict.chosen(op, H200)
        assert plan is not None
        builder = splice.Builder(graph_module, site.place)
        emit(op, plan, builder, site, native=True)
        texts = [text for text in builder.kernels if NAME in text]
        names = texts[0].split(f"def {NAME}(")[1].split("):")[0].split(", ")
        held = dict(zip("kv", (op.k, op.v), strict=True))
        tensors = {n: held[n].dtype if n in held else torch.bfloat16 for n in names if ":" not in n}
        blocks = {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n}
        made = compile_text(
            texts[0], NAME, tensors, [], blocks, GPUTarget("cuda", 90, 32), num_warps=plan.num_warps,
            num_stages=plan.num_stages,
        )  # fmt: skip
        # triton 3.7's assembler keeps a few words of zero points on the stack
        assert resources(made).spills <= 32, (case, resources(made))
