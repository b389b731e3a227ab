"""Rotation and write into a cache of codes as one kernel: the very codes that eager writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ahead_of_time
import pytest
import torch
from test_rope_cache import OTHERS, rotate_half, run

__all__ = ["OTHERS"]
Tensor = torch.Tensor
FP8 = torch.float8_e4m3fn
B, H, HK, L, S, D = 2, 4, 2, 3, 12, 16
Store = Callable[[Tensor, Any], Tensor]


def turned(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return t * cos + rotate_half(t) * sin


def clamped(t: Tensor, scale: Any) -> Tensor:
    return (t / scale).clamp(-448, 448).to(FP8)


def bare(t: Tensor, scale: Any) -> Tensor:
    return (t / scale).to(FP8)


def wide(t: Tensor, scale: Any) -> Tensor:
    return (t.float() * (1.0 / scale)).to(FP8)


def number(t: Tensor, scale: Any) -> Tensor:
    return (t * 4.0).to(FP8)


def int8(t: Tensor, scale: Any) -> Tensor:
    return torch.round(t / scale).clamp(-128, 127).to(torch.int8)


def uint8(t: Tensor, scale: Any) -> Tensor:
    return (t.float() / scale).round().clamp_min(0).clamp_max(255).to(torch.uint8)


def zero(t: Tensor, scale: Any) -> Tensor:
    """With a zero point."""
    return ((t / scale).round() + 128).clamp(0, 255).to(torch.uint8)


def cut(t: Tensor, scale: Any) -> Tensor:
    """Towards zero, as a cast does."""
    return torch.clamp(t / scale, -127, 127).to(torch.int8)


STORES: dict[str, tuple[Store, torch.dtype, float]] = {
    "clamped": (clamped, FP8, 1 / 256), "bare": (bare, FP8, 1 / 128), "wide": (wide, FP8, 0.013),
    "number": (number, FP8, 1.0), "int8": (int8, torch.int8, 1 / 64), "uint8": (uint8, torch.uint8, 0.011),
    "zero": (zero, torch.uint8, 1 / 64), "cut": (cut, torch.int8, 1 / 64),
}  # fmt: skip


def put(cache: Tensor, rows: Tensor, at: Tensor) -> None:
    cache[:, :, at] = rows


def sliced(cache: Tensor, rows: Tensor, at: Tensor) -> None:
    cache[:, :, 4 : 4 + L] = rows


def scattered(cache: Tensor, rows: Tensor, at: Tensor) -> None:
    cache.scatter_(2, at[None, None, :, None].expand_as(rows), rows)


def step(store: Store, write: Callable[..., None] = put) -> Callable[..., Any]:
    def function(
        q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor,
        ks: Tensor, vs: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        at = torch.arange(L, device=q.device) + position
        write(keys, store(k, ks), at)
        write(values, store(v, vs), at)
        return q, keys.clone(), values.clone()

    return function


def tokens_first(t: Tensor, scale: Tensor) -> Tensor:
    """Scaled where tokens stand before heads."""
    return clamped(t.transpose(1, 2), scale.reshape(-1, 1)).transpose(1, 2)


def upcast(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor,
    ks: Tensor, vs: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Turned in float32, as pairs."""

    def turn(x: Tensor) -> Tensor:
        a, b = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        c, s = cos.float(), sin.float()
        return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(3).type_as(x)

    q, k = turn(q), turn(k)
    at = torch.arange(L, device=q.device) + position
    keys[:, :, at], values[:, :, at] = clamped(k, ks), clamped(v, vs)
    return q, keys.clone(), values.clone()


def inputs_of(codes: torch.dtype, top: float, scale: str = "head", dtype: torch.dtype = torch.float16) -> list[Tensor]:
    torch.manual_seed(5)
    heads = [torch.randn(B, n, L, D).to(dtype) for n in (H, HK, HK)]
    angles = torch.rand(L, D // 2).repeat(1, 2) * 3
    caches = [torch.zeros(B, HK, S, D).to(codes) for _ in range(2)]
    shape = {"head": (HK, 1, 1), "tensor": (), "one": (1,), "batch": (B, HK, 1, 1)}[scale]
    wide = torch.float32 if scale == "one" else dtype
    scales = [(torch.ones(shape) * top * (1.0 + (torch.rand(shape) if shape else 0.0))).to(wide) for _ in "kv"]
    return [*heads, angles.cos().to(dtype), angles.sin().to(dtype), *caches, torch.tensor([5]), *scales]


def same(function: Callable[..., Any], inputs: list[Tensor]) -> Any:
    out, made = run(function, *(t.clone() for t in inputs))
    assert [d.kernel for d in made.fused] == ["triton rope_cache"], made
    eager = function(*(t.clone() for t in inputs))
    for ours, theirs in zip(out[1:], eager[1:], strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    return made


@pytest.mark.parametrize("case", STORES)
def test_codes_are_those_of_eager(case: str) -> None:
    store, codes, top = STORES[case]
    made = same(step(store), inputs_of(codes, top))
    assert dict(made.fused[0].details)["codes"] == str(codes)


@pytest.mark.parametrize("scale", ["tensor", "one", "batch"])
def test_scales_of_a_tensor_and_of_sequences(scale: str) -> None:
    same(step(clamped), inputs_of(FP8, 1 / 256, scale))


@pytest.mark.parametrize("write", [sliced, scattered])
def test_writes(write: Callable[..., None]) -> None:
    same(step(int8, write), inputs_of(torch.int8, 1 / 64))


def test_a_batch_of_one_whose_axis_an_assignment_drops() -> None:
    inputs = inputs_of(FP8, 1 / 256)
    same(step(clamped), [t[:1].contiguous() if t.dim() == 4 else t for t in inputs])


def test_rows_that_stand_otherwise() -> None:
    same(step(tokens_first), inputs_of(FP8, 1 / 256))


def test_rows_that_are_turned_in_float32() -> None:
    inputs = inputs_of(FP8, 1 / 256)
    inputs[3:5] = [t[:, : D // 2].contiguous() for t in inputs[3:5]]
    same(upcast, inputs)


def test_what_is_too_large_is_what_torch_makes_of_it() -> None:
    inputs = inputs_of(FP8, 1 / 2048)
    same(step(bare), inputs)
    inputs[1][0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    same(step(clamped), inputs)


def refusal(function: Callable[..., Any], codes: torch.dtype) -> str:
    _, made = run(function, *inputs_of(codes, 1 / 64))
    assert not made.fused
    return " ".join(m.reason for m in made.near_misses if m.pattern == "rope_cache")


def test_what_no_kernel_writes() -> None:
    def overflows(t: Tensor, scale: Any) -> Tensor:
        return (t / scale).round().to(torch.int8)

    def by_column(t: Tensor, scale: Any) -> Tensor:
        return (t * torch.arange(1, D + 1, dtype=t.dtype)).to(FP8)

    assert "stands between them" in refusal(step(overflows), torch.int8)
    assert "stands between them" in refusal(step(by_column), FP8)


def test_keys_alone_as_codes_are_refused() -> None:
    def function(*given: Any) -> tuple[Tensor, ...]:
        q, k, v, cos, sin, keys, values, position, ks, _ = given
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        at = torch.arange(L, device=q.device) + position
        keys[:, :, at], values[:, :, at] = int8(k, ks), v
        return q, keys.clone(), values.clone()

    inputs = inputs_of(torch.int8, 1 / 64)
    inputs[6] = torch.zeros(B, HK, S, D, dtype=torch.float16)
    _, made = run(function, *inputs)
    assert not made.fused and "no values are written" in " ".join(m.reason for m in made.near_misses)


def test_every_target_compiles_it() -> None:
    ahead_of_time.compile_all("test_cache_codes")


def compile_all() -> None:
    """In a process of its own: interpreted kernels cannot be compiled."""
    from triton.backends.compiler import GPUTarget

    from fusion_compiler.fused import CacheCodes, CacheStep, RopeCache
    from fusion_compiler.lowering.triton_codegen import rope_cache
    from fusion_compiler.lowering.triton_codegen.aot import compile_text, resources

    rows, half = (4096, 64, 4096, 1), torch.bfloat16
    clamps = CacheStep("clamp_min", half, -128.0), CacheStep("clamp_max", half, 127.0)
    scaled = CacheStep("div", half), CacheStep("round", half), *clamps
    for dtype, *target in ((FP8, "cuda", 90, 32), (torch.int8, "cuda", 90, 32), (torch.int8, "hip", "gfx942", 64)):
        steps = scaled if dtype == torch.int8 else (scaled[0], *clamps)
        codes = CacheCodes(half, half, (*steps, CacheStep("cast", dtype)), (*steps, CacheStep("cast", dtype)))
        op = RopeCache(4, 32, 8, 1, 1024, 128, 128, ("values", "out", "keys"), half, codes=codes)
        scale = (0, 1, 0, 0)
        reading = rope_cache.Reading(
            rows, rows, rows, (0, 0, 64, 1), (0, 0, 64, 1), rows, rows, rows, halves=True, key_scale=scale,
            value_scale=scale,
        )  # fmt: skip
        tensors = dict.fromkeys(rope_cache.argument_names(op), half) | {"index": torch.int64}
        tensors |= {"keys": dtype, "values": dtype}
        made = compile_text(
            rope_cache.write(op, reading), rope_cache.NAME, tensors, [], {}, GPUTarget(*target), num_warps=4
        )
        assert resources(made).spills == 0
        if target[0] == "cuda":
            # q is turned in one step with the sum, k in products that are rounded by themselves
            assert "fma.rn.f32" in made.asm["ptx"] and "fma.rn.bf16" not in made.asm["ptx"]
