"""Generated kernels for packed weights by themselves: right in Triton's interpreter, and compiled ahead of time."""

from __future__ import annotations

import ahead_of_time
import pytest
import torch
from quantised_spellings import Split, relative

import fusion_compiler as fc
from fusion_compiler.algebra import Algebra
from fusion_compiler.fused import Extra, MatmulFamily, Packed, PerGroup
from fusion_compiler.lowering.triton_codegen import packed_predict
from fusion_compiler.lowering.triton_codegen.aot import _TRITON_TYPE, resources
from fusion_compiler.lowering.triton_codegen.packed_gemv_source import PackedGemv
from fusion_compiler.lowering.triton_codegen.packed_source import PackedSwap
from fusion_compiler.lowering.triton_codegen.packed_split_source import PackedSplit
from fusion_compiler.lowering.triton_codegen.plans import Plan
from fusion_compiler.lowering.triton_codegen.source import facts
from fusion_compiler.machine import TABLE
from fusion_compiler.splice import load_kernel

HALF = torch.float16


@pytest.mark.parametrize(("rows", "shares"), [(5, 2), (16, 4), (16, 1), (40, 2)])
def test_programs_that_share_k_add_up_what_each_has_left(rows, shares):
    model, x = Split(n=128, k=1024), torch.randn(rows, 1024, dtype=HALF)
    packed = Packed("halves", 0, 512, 16, PerGroup(HALF, 32, 0, 32, 1), 8.0)
    bias = Algebra().make("extra", index=0)
    epilogue = Algebra().add(Algebra().make("acc", index=0), bias)
    op = MatmulFamily(rows, 1024, 128, 1, None, epilogue, (Extra("col", HALF),), HALF, HALF, packed=(packed,))
    padded = 16 if rows <= 16 else 64
    plan = Plan("split", padded, 64, 256, 2 if rows <= 16 else 4, 3, splits=shares)
    source = PackedSplit(op, plan, facts(op, plan), native=False).write()
    out, added = torch.full((rows, 128), torch.nan, dtype=HALF), torch.randn(128, dtype=HALF)
    arrivals, partial = torch.zeros(2, dtype=torch.int32), torch.full((2 * shares * padded * 64,), torch.nan)
    work = [partial, arrivals] if shares > 1 else []
    kernel = load_kernel(source.text, source.name)
    for _ in range(2):  # the second call finds the workspace as the first has left it
        kernel[(2 * shares,)](x, model.qs, model.d, added, *work, out, 1024, 128, 1024, 64, 256)
        reference = x.double() @ model.weight().T + added.double()
        assert relative(out, reference) <= 1.5 * relative(model(x) + added, reference)
    assert not arrivals.any()


@pytest.mark.parametrize("activations", ["float", "q8_1"])
def test_shares_of_one_row_are_added_up(activations):
    rounded = activations == "q8_1"
    k, n, (model, x) = 6144, 40, (Split(n=40, k=6144), torch.randn(1, 6144, dtype=HALF))
    packed = Packed("halves", 0, k // 2, 16, PerGroup(HALF, 32, 0, k // 32, 1), 8.0)
    epilogue = Algebra().add(Algebra().make("acc", index=0), Algebra().make("extra", index=0))
    extras = (Extra("full", HALF),)
    op = MatmulFamily(1, k, n, 1, None, epilogue, extras, HALF, HALF, packed=(packed,), q8_activations=rounded)
    plan = packed_predict.gemv_plans(op)[-1]
    assert (plan.block_n, plan.splits) == (4, 3)
    source = PackedGemv(op, plan, 6, k, native=False).write()  # two slots of three shares, for ten tiles
    out, added = torch.full((1, n), torch.nan, dtype=HALF), torch.randn(1, n, dtype=HALF)
    arrivals, partial = torch.zeros(2, dtype=torch.int32), torch.full((3 * n,), torch.nan)
    kernel = load_kernel(source.text, source.name)
    for _ in range(2):
        kernel[(6,)](x, model.qs, model.d, added, partial, arrivals, out)
        reference = x.double() @ model.weight().T + added.double()
        assert relative(out, reference) <= (1e-2 if rounded else 1.5 * relative(model(x) + added, reference))
    assert not arrivals.any()


def test_a_long_row_is_shared():
    report = fc.explain(Split(14336, 4096), torch.randn(1, 14336, dtype=HALF), machine="h200")
    [decision] = report.fused
    assert dict(decision.details)["shares"] == 7 and decision.kernel.endswith("w2p1050/7")
    report = fc.explain(Split(4096, 4096), torch.randn(1, 4096, dtype=HALF), machine="h200")
    assert dict(report.fused[0].details)["shares"] == 1


# ---- compiled, without a device -------------------------------------------------------------------------
def compile_all() -> list[tuple[str, int]]:
    """Kernels as they are launched on an H200 and an A100: their names and spilled bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    split = Packed("halves", 0, 512, 16, PerGroup(HALF, 32, 0, 32, 1), 8.0)
    raw = Packed("halves", 2, 576, 18, PerGroup(HALF, 32, 0, 288, 9), 8.0)
    floats = Packed("bytes", 0, 1024, 0, PerGroup(HALF, 1024, 0, 1, 0), 0.0, torch.float8_e4m3fn)
    words = Packed("sequence", 0, 512, 0, PerGroup(HALF, 128, 0, 8, 1), PerGroup(HALF, 128, 0, 8, 1))
    found = []
    for packed, m, dtype, arch in (
        (split, 64, HALF, 90),
        (split, 8, torch.bfloat16, 90),
        (split, 128, HALF, 90),
        (split, 32, torch.bfloat16, 80),
        (split, 4, torch.bfloat16, 80),
        (raw, 1, HALF, 90),
        (words, 16, torch.bfloat16, 90),
        (floats, 16, torch.bfloat16, 90),
    ):
        op = MatmulFamily(m, 1024, 4096, 1, None, Algebra().make("acc", index=0), (), dtype, dtype, packed=(packed,))
        fitting = [plan for _, plan in packed_predict.tiles(op, TABLE["h200"], m).fitting]
        plan = next((p for p in fitting if p.kind == "split" and p.splits > 1), fitting[0])
        writer = PackedSplit if plan.kind == "split" else PackedSwap
        source, constants = writer(op, plan, facts(op, plan), native=True).write(), {}
        if m == 1:
            [plan] = packed_predict.gemv_plans(op)
            source = PackedGemv(op, plan, 132, 1024, native=True).write()
        else:
            constants = {"x_stride": 1024, "N": 4096, "K": 1024, "BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k}
        kernel = load_kernel(source.text, source.name)
        numbers = {"x": dtype, "out": dtype, "w0": packed.float8 or torch.uint8}
        types = {n: f"*{_TRITON_TYPE[numbers.get(n, HALF)]}" for n in source.tensors}
        signature = types | dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(source.tensors))}
        options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
        target = GPUTarget("cuda", arch, 32)
        made = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
        found.append((f"{plan.label} {dtype} sm_{arch}", resources(made).spills))
    return found


def test_kernels_compile_without_spilling():
    found = ahead_of_time.compile_all("test_packed_kernels")
    assert {"split8", "split32", "split64", "tile128"} <= {kernel.split("_")[0] for kernel, _ in found}, found
    assert len(found) == 8 and not [kernel for kernel in found if kernel[1]]
