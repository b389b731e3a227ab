"""Attention over keys and values stored as codes: eager's spellings are found, and the kernel reads the codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ahead_of_time
import pytest
import torch
from test_decode_attention import H200, assert_as_good_as_eager, compiled, found, static_cache

from fusion_compiler import layout, splice
from fusion_compiler.candidates import Unavailable
from fusion_compiler.fused import Codes, StoredAttention
from fusion_compiler.legality import Legality
from fusion_compiler.lowering.triton_codegen import TritonCodegen
from fusion_compiler.lowering.triton_codegen.decode import attention as decode
from fusion_compiler.lowering.triton_codegen.decode import predict

Tensor = torch.Tensor
B, H, HK, S, D = 2, 4, 2, 150, 64


def int8_per_token(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, at: Tensor) -> Tensor:
    return static_cache(q, k.to(q.dtype) * ks, v.to(q.dtype) * vs, at)


def uint8_with_zeros(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, at: Tensor, kz: Tensor, vz: Tensor
) -> Tensor:
    return static_cache(q, (k.to(q.dtype) - kz) * ks, vs * (v.to(q.dtype) - vz), at)


def fp8_per_tensor(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, at: Tensor) -> Tensor:
    k, v = (t.to(torch.float32) * s for t, s in ((k, ks), (v, vs)))
    return static_cache(q, k.to(q.dtype), v.to(q.dtype), at)


def nibbles(t: Tensor) -> Tensor:
    return torch.stack((t & 0xF, t >> 4), dim=-1).flatten(-2)


def int4_shifted(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, at: Tensor) -> Tensor:
    return static_cache(q, (nibbles(k).to(q.dtype) - 8) * ks, (nibbles(v).to(q.dtype) - 8) * vs, at)


def int4_with_zeros(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, at: Tensor, kz: Tensor, vz: Tensor
) -> Tensor:
    return static_cache(q, (nibbles(k) - kz) * ks, (nibbles(v) - vz) * vs, at)


def int4_halves(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, at: Tensor) -> Tensor:
    k, v = (torch.cat((t & 0xF, (t >> 4) & 0xF), dim=-1).to(q.dtype) for t in (k, v))
    return static_cache(q, (k - 7.5) * ks, (v - 7.5) * vs, at)


def int4_signed(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, at: Tensor) -> Tensor:
    k, v = ((nibbles(t).to(torch.int8) - 8).to(q.dtype) for t in (k, v))
    return static_cache(q, k * ks, v * vs, at)


def keys_alone(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, at: Tensor) -> Tensor:
    return static_cache(q, k.to(q.dtype) * ks, v, at)


TOKEN, HEAD = (B, HK, S, 1), (HK, 1, 1)


def codes(dtype: torch.dtype, width: int = D) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(B, HK, S, width).to(dtype)
    low = -127 if dtype == torch.int8 else 0
    return torch.randint(low, 127 if dtype == torch.int8 else 256, (B, HK, S, width), dtype=dtype)


def scales(shape: tuple[int, ...], top: float) -> Tensor:
    return (torch.rand(shape) + 0.5) / top


# function, codes' dtype and width, shape of scales, largest code, zero points (and their shift) or None
CASES: dict[str, tuple[Callable[..., Tensor], torch.dtype, int, tuple[int, ...], float, float | None]] = {
    "int8 per token": (int8_per_token, torch.int8, D, TOKEN, 60.0, None),
    "int8 per head": (int8_per_token, torch.int8, D, HEAD, 60.0, None),
    "uint8 with zeros": (uint8_with_zeros, torch.uint8, D, TOKEN, 60.0, 128.0),
    "fp8 per tensor": (fp8_per_tensor, torch.float8_e4m3fn, D, (), 1.0, None),
    "fp8 per head": (fp8_per_tensor, torch.float8_e5m2, D, HEAD, 1.0, None),
    "int4": (int4_shifted, torch.uint8, D // 2, TOKEN, 5.0, None),
    "int4 as int8": (int4_signed, torch.uint8, D // 2, TOKEN, 5.0, None),
    "int4 with zeros": (int4_with_zeros, torch.uint8, D // 2, TOKEN, 5.0, 7.0),
    "int4 in halves": (int4_halves, torch.uint8, D // 2, TOKEN, 5.0, None),
    "keys alone": (keys_alone, torch.int8, D, TOKEN, 60.0, None),
}


def inputs_of(case: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(len(case))
    function, stored, width, shape, top, zero = CASES[case]
    given: list[Tensor] = [torch.randn(B, H, 1, D).to(dtype), codes(stored, width), codes(stored, width)]
    given += [scales(shape, top).to(dtype), scales(shape, top).to(dtype), torch.tensor([101])]
    if zero is not None:
        given += [(torch.rand(TOKEN) * 4 + zero).round().to(dtype) for _ in range(2)]
    if function is keys_alone:
        given[2] = torch.randn(B, HK, S, D).to(dtype)
        del given[4]
    return tuple(given)


def quantised(case: str, dtype: torch.dtype) -> tuple[Any, Any, StoredAttention, Any]:
    graph_module, match = found(CASES[case][0], inputs_of(case, dtype))
    [(op, site)] = match.alternatives
    assert isinstance(op, StoredAttention)
    assert Legality(graph_module.graph).check(site, codes=True) is None
    return graph_module, match, op, site


def exact(case: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Codes as they are, everything else in float64."""
    floats = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.double() if t.dtype in floats else t for t in inputs)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_numbers(case: str, splits: int) -> None:
    dtype = torch.float16 if splits == 3 else torch.float32
    function, inputs = CASES[case][0], inputs_of(case, dtype)
    graph_module, match, op, site = quantised(case, dtype)
    plan = predict.best_plan(op, H200)
    assert plan is not None
    builder = splice.Builder(graph_module, site.place)
    new = decode.emit(op, replace(plan, block=32, splits=splits), builder, site)
    splice.replace(site, layout.fit(builder, site, new))
    splice.clean(graph_module)
    casts = [n for n in graph_module.graph.nodes if "convert_element_type" in str(n.target)]
    assert not [n for n in casts if n.meta["val"].shape[-2:] == (S, D)], "codes are read as they are"
    assert_as_good_as_eager(graph_module(*inputs), function, inputs)


@pytest.mark.parametrize(("batch", "heads"), [(1, HK), (B, 1), (1, 1)])
@pytest.mark.parametrize("case", ["int8 per token", "int4 with zeros", "fp8 per head"])
def test_axes_of_one_element(case: str, batch: int, heads: int) -> None:
    """A single sequence, or a single key head, which views leave out."""
    function, *inputs = CASES[case][0], *inputs_of(case, torch.float16)
    inputs = [t[:batch, : heads if i else H] if t.dim() == 4 else t for i, t in enumerate(inputs)]
    inputs = [t[:heads].contiguous() if t.dim() == 3 else t.contiguous() for t in inputs]
    graph_module, match = found(function, tuple(inputs))
    [(op, site)] = match.alternatives
    assert isinstance(op, StoredAttention) and op.k is not None
    plan = predict.best_plan(op, H200)
    assert plan is not None
    builder = splice.Builder(graph_module, site.place)
    splice.replace(site, layout.fit(builder, site, decode.emit(op, replace(plan, block=32, splits=3), builder, site)))
    splice.clean(graph_module)
    assert_as_good_as_eager(graph_module(*inputs), function, tuple(inputs))


def test_codes_are_told() -> None:
    _, _, op, _ = quantised("int4 with zeros", torch.float16)
    assert op.k == op.v == Codes(torch.uint8, "pairs", 0.0, True)
    _, _, op, _ = quantised("int4 in halves", torch.float16)
    assert op.k == Codes(torch.uint8, "halves", 7.5, False)
    _, _, op, _ = quantised("keys alone", torch.float16)
    assert (op.k, op.v) == (Codes(torch.int8), None)


def test_a_scale_for_each_column_is_no_quantisation_by_rows() -> None:
    def by_column(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, at: Tensor) -> Tensor:
        return static_cache(q, k.to(q.dtype) * ks, v, at)

    q, k, v, _, at = inputs_of("keys alone", torch.float16)
    _, match = found(by_column, (q, k, v, torch.rand(D).half(), at))
    assert not match.alternatives


def test_what_wraps_around_or_is_cut_off_is_no_code() -> None:
    def wraps(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, at: Tensor) -> Tensor:
        return static_cache(q, (k - 100).to(q.dtype) * ks, v, at)

    def cut_off(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, at: Tensor) -> Tensor:
        return static_cache(q, k.to(torch.float8_e4m3fn).to(torch.int32).to(q.dtype) * ks, v, at)

    q, k, v, ks, at = inputs_of("keys alone", torch.float16)
    assert not found(wraps, (q, k, v, ks, at))[1].alternatives
    assert not found(cut_off, (q, k.half(), v, ks, at))[1].alternatives


def test_verdict_and_bytes() -> None:
    _, match, op, _ = quantised("int8 per token", torch.float16)
    read = []
    for asked in (match.op, op):
        offered = TritonCodegen().candidates(asked, H200)
        assert not isinstance(offered, Unavailable)
        read.append(next(c for c in offered if c.name == "triton_decode").traffic.bytes_read)
    assert read[1] < 0.6 * read[0]
    many = replace(op, attention=replace(op.attention, q_len=512))
    why = decode.candidates(many, H200)
    assert isinstance(why, Unavailable) and "dequantised or gathered once" in why.reason
    refused = decode.candidates(quantised("fp8 per head", torch.float16)[2], replace(H200, arch="sm_80"))
    assert isinstance(refused, Unavailable) and "no instructions that widen" in refused.reason


@pytest.mark.usefixtures("meeting_for_nothing")
def test_the_whole_line_takes_the_codes() -> None:
    inputs = inputs_of("int4 with zeros", torch.float16)
    out, report = compiled(CASES["int4 with zeros"][0], *inputs)
    [decision] = report.fused
    assert dict(decision.details)["codes"] == "pairs torch.uint8, pairs torch.uint8", report
    assert_as_good_as_eager(out, CASES["int4 with zeros"][0], inputs)


def test_every_target_compiles_it() -> None:
    ahead_of_time.compile_all("test_quantised_attention")


def compile_all() -> None:
    """In a process of its own: interpreted kernels cannot be compiled."""
    from triton.backends.compiler import GPUTarget

    from fusion_compiler.lowering.triton_codegen.aot import compile_text, resources

    half = {"int4 with zeros": torch.float16}
    for case in ("int8 per token", "uint8 with zeros", "fp8 per head", "int4", "int4 with zeros", "keys alone"):
        graph_module, _, op, site = quantised(case, half.get(case, torch.bfloat16))
        plan = predict.best_plan(op, H200)
        assert plan is not None
        plan = replace(plan, splits=4)
        builder = splice.Builder(graph_module, site.place)
        source = decode.prepared(op, plan, builder, site, native=True)[0]
        made = compile_text(
            source.text, source.name, source.tensors, source.sizes, {}, GPUTarget("cuda", 90, 32),
            num_warps=plan.num_warps, num_stages=source.num_stages,
        )  # fmt: skip
        used = resources(made)
        # triton 3.6's assembler keeps two words of one of them on the stack, with most registers to spare
        assert used.spills <= 8 and used.registers <= 128, (case, used)
