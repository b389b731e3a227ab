"""Tiles of a last round that blocks share: numbers in Triton's interpreter, registers."""

from __future__ import annotations

import dataclasses
import re

import ahead_of_time
import pytest
import torch
from matmul_family_cases import (
    BIAS,
    GEGLU_RESIDUAL,
    SCALED,
    SWIGLU,
    Epilogue,
    Operands,
    assert_as_good_as_eager,
    family,
    run,
)

from fusion_compiler.lowering.triton_codegen import aot, tiles
from fusion_compiler.lowering.triton_codegen.plans import Plan, Shares
from fusion_compiler.lowering.triton_codegen.source import facts, write
from fusion_compiler.machine import TABLE

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16
# 8 tiles: two helpers, one of which helps two owners; a round, and one tile left; no round, and not all help
FIVE, SEVEN, TEN = (Plan("shared", 64, 32, 32, 4, 3, group=2, blocks=blocks) for blocks in (5, 7, 10))


def test_who_computes_what() -> None:
    """An owner of helpers with many pieces keeps more of K: each piece takes a while to begin and to hand on."""
    assert FIVE.shares(128, 128, 320) == Shares(rounds=1, left=3, helpers=2, pieces=2, kept=9)
    assert SEVEN.shares(128, 128, 320) == Shares(rounds=1, left=1, helpers=6, pieces=1, kept=5)
    assert TEN.shares(100, 100, 640) == Shares(rounds=0, left=8, helpers=2, pieces=4, kept=19)


@pytest.mark.parametrize("plan", [FIVE, SEVEN, TEN], ids=lambda plan: plan.label)
@pytest.mark.parametrize(
    ("epilogue", "dtype"),
    [(BIAS, HALF), (GEGLU_RESIDUAL, HALF), (SCALED, SINGLE), (SWIGLU, SINGLE)],
    ids=["bias", "geglu residual", "scaled", "swiglu"],
)
def test_numbers(epilogue: Epilogue, dtype: torch.dtype, plan: Plan) -> None:
    for m, k, n in ((128, 160, 128), (101, 328, 104)):
        operands = Operands.random(family(m, k, n, None, epilogue, dtype))
        assert_as_good_as_eager(run(operands, plan), operands, epilogue)


def test_warps_that_hold_several_pieces_of_a_tile() -> None:
    """Four warps hold 128 rows in two pieces; eight in one."""
    for warps, block_n in ((4, 16), (8, 32)):
        plan = Plan("shared", 128, block_n, 32, warps, 3, blocks=3)
        operands = Operands.random(family(128, 96, 64, None, SWIGLU, SINGLE))
        assert_as_good_as_eager(run(operands, plan), operands, SWIGLU)


def compile_all() -> list[dict[str, int]]:
    """Registers, spills and shared memory of a tile and of shared tiles; how many of their loads are 16 bytes wide."""
    from triton.backends.compiler import GPUTarget

    op = family(256, 512, 14336, None, SWIGLU, BRAIN)
    found = []
    for plan in (Plan("tile", 128, 128, 64, 8, 4, group=16), Plan("shared", 128, 128, 64, 8, 4, group=16, blocks=132)):
        kernel = aot.compile_kernel(op, plan, write(op, plan, facts(op, plan)), GPUTarget("cuda", 90, 32))
        wide = len(re.findall(r"ld\.global\.cg\S*\.v4\.b32", kernel.asm["ptx"]))
        found.append({**dataclasses.asdict(aot.resources(kernel)), "wide": wide})
    return found


def test_sums_that_are_left_take_no_way_through_shared_memory() -> None:
    """In the order of the matrix unit's registers, loads are 16 bytes wide and no register spills."""
    tile, shared = ahead_of_time.compile_all("test_shared_tiles")
    assert shared["spills"] == 0 and shared["registers"] <= tile["registers"] + 8
    assert shared["shared"] == tile["shared"]
    assert shared["wide"] == 2 * 128 * 128 // (256 * 4)


# µs on an H200 of gated pairs by (K, N, M): shared tiles of 128×(128+128), then the fastest of the plain ones
MEASURED = {
    (4096, 14336, 512): (185.6, 194.0), (8192, 3584, 256): (54.9, 49.4), (4096, 14336, 384): (151.0, 159.6),
    (2048, 8192, 384): (47.3, 50.9), (4096, 14336, 1024): (364.9, 368.8), (8192, 3584, 1024): (183.8, 199.7),
}  # fmt: skip


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_shared_tiles_are_predicted_as_measured(case: tuple[int, int, int]) -> None:
    k, n, m = case
    op, h200 = family(m, k, n, None, SWIGLU, BRAIN), TABLE["h200"]
    moved = 2 * (2 * n * k + m * k + m * n)
    best: dict[str, float] = {}
    for plan in tiles.plans(op, h200, m):
        seconds = tiles.seconds(op, plan, h200, moved, m) * 1e6
        best[plan.kind] = min(best.get(plan.kind, seconds), seconds)
    shared, plain = MEASURED[case]
    assert best["shared"] == pytest.approx(shared, rel=0.08)
    chosen = shared if best["shared"] < best["tile"] else plain
    assert chosen <= 1.08 * min(shared, plain)
