"""The kernel for packed weights without shared memory: right in Triton's interpreter, and compiled ahead of time."""

from __future__ import annotations

import dataclasses

import ahead_of_time
import pytest
import torch
from quantised_spellings import Split, relative

import fusion_compiler as fc
from fusion_compiler.algebra import Algebra
from fusion_compiler.backend import fusion_compiler
from fusion_compiler.fused import Extra, MatmulFamily, MatmulGroup, Packed, PerGroup
from fusion_compiler.lowering.triton_codegen import packed_direct
from fusion_compiler.lowering.triton_codegen.aot import compile_text, resources
from fusion_compiler.lowering.triton_codegen.packed_direct_source import PackedDirect
from fusion_compiler.lowering.triton_codegen.plans import Plan
from fusion_compiler.lowering.triton_codegen.source import facts
from fusion_compiler.machine import TABLE
from fusion_compiler.splice import load_kernel

# bytes are dear and there is one multiprocessor, so that tiny products are worth a kernel
SLOW = dataclasses.replace(TABLE["h200"], memory_bandwidth=4e8, l2_bytes=1, num_sms=1)
HALF = torch.float16
K = 512


def stored(k: int = K) -> Packed:
    return Packed("halves", 0, k // 2, 16, PerGroup(HALF, 32, 0, k // 32, 1), 8.0)


def family(m: int, n: int, *, weights: int = 1, bias: bool = True, dtype: torch.dtype = HALF) -> MatmulFamily:
    algebra = Algebra()
    sums = [algebra.make("acc", index=i) for i in range(weights)]
    result = algebra.mul(*sums) if weights > 1 else sums[0]
    result = algebra.add(result, algebra.make("extra", index=0)) if bias else result
    extras = (Extra("col", dtype),) if bias else ()
    return MatmulFamily(m, K, n, weights, None, result, extras, dtype, dtype, packed=(stored(),) * weights)


def run(op: MatmulFamily | MatmulGroup, plan: Plan, given: dict[str, torch.Tensor]) -> None:
    """Launches the kernel twice: the second call finds the workspace as the first has left it."""
    source = PackedDirect(op, plan, facts(op, plan), native=False).write()
    arrivals = torch.zeros(64, dtype=torch.int32)
    given = given | {"partial": torch.full((1 << 15,), torch.nan), "arrivals": arrivals}
    tiles = sum(-(-int(part.n) // plan.block_n) for part in op.parts)
    rest = (K, int(op.whole.n), K, plan.block_n, plan.block_k)
    for _ in range(2):
        load_kernel(source.text, source.name)[(tiles * plan.splits,)](*(given[t] for t in source.tensors), *rest)
    assert not arrivals.any()


@pytest.mark.parametrize(
    ("rows", "n", "plan"),
    [
        (5, 64, Plan("direct", 8, 32, 256, 2, splits=2)),
        (4, 64, Plan("direct", 8, 32, 128, 2, slices=2, splits=2)),
        (16, 112, Plan("direct", 16, 56, 128, 2, slices=2)),  # features that are no power of two
        (20, 72, Plan("direct", 32, 32, 256, 4)),  # more features in the last block than there are, and rows
    ],
)
def test_it_is_as_right_as_eager(rows, n, plan):
    model, x, added = Split(n=n, k=K), torch.randn(rows, K, dtype=HALF), torch.randn(n, dtype=HALF)
    out = torch.full((rows, n), torch.nan, dtype=HALF)
    run(family(rows, n), plan, {"x": x, "w0": model.qs, "s0": model.d, "extra0": added, "out": out})
    reference = x.double() @ model.weight().T + added.double()
    assert relative(out, reference) <= 1.5 * relative(model(x) + added, reference)


def test_a_pair_is_multiplied_in_one_walk():
    gate, up, x = Split(n=64, k=K), Split(n=64, k=K, seed=1), torch.randn(16, K, dtype=HALF)
    out = torch.full((16, 64), torch.nan, dtype=HALF)
    tensors = {"x": x, "w0": gate.qs, "s0": gate.d, "w1": up.qs, "s1": up.d, "out": out}
    run(family(16, 64, weights=2, bias=False), Plan("direct", 16, 32, 256, 2), tensors)
    reference = (x.double() @ gate.weight().T) * (x.double() @ up.weight().T)
    assert relative(out, reference) <= 1.5 * relative(gate(x) * up(x), reference)


@pytest.mark.parametrize("splits", [1, 2])
def test_linears_of_one_input_have_a_result_each(splits):
    widths = 64, 40, 24
    models, x = [Split(n=n, k=K, seed=n) for n in widths], torch.randn(7, K, dtype=HALF)
    given = {"x": x, "extra0": torch.randn(40, dtype=HALF)}
    for i, model in enumerate(models):
        given |= {f"w{i}": model.qs, f"s{i}": model.d, f"out{i}": torch.full((7, widths[i]), torch.nan, dtype=HALF)}
    op = MatmulGroup(7, tuple(family(7, n, bias=n == 40) for n in widths))
    run(op, Plan("direct", 8, 16, 128, 2, splits=splits), given)
    for i, model in enumerate(models):
        added = given["extra0"] if i == 1 else torch.zeros(1, dtype=HALF)
        reference = x.double() @ model.weight().T + added.double()
        assert relative(given[f"out{i}"], reference) <= 1.5 * relative(model(x) + added, reference)


# ---- in compiled models -----------------------------------------------------------------------------------
class Projections(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = Split(K, 32), Split(K, 16, seed=1), Split(K, 8, seed=2)
        self.bias = torch.nn.Parameter(torch.randn(32, dtype=HALF))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q(x) + self.bias, self.k(x), self.v(x)

    def exact(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [
            x.double() @ linear.weight().T + (self.bias.double() if linear is self.q else 0.0)
            for linear in (self.q, self.k, self.v)
        ]


@pytest.fixture
def cheap(monkeypatch):
    """The kernel is priced as measured, which says little of products as small as these."""
    monkeypatch.setattr(packed_direct, "seconds", lambda *_: 1e-9)


def compiled(model: torch.nn.Module, x: torch.Tensor, **options: object) -> object:
    torch._dynamo.reset()
    settings = {"machine": SLOW, "remainder": "eager", "strict": True, **options}
    with torch.no_grad():
        return torch.compile(model, backend=fusion_compiler, options=settings)(x)


@pytest.mark.parametrize("rows", [6, 16])
def test_linears_of_one_input_share_a_launch_beyond_the_few_rows_of_integers(rows, cheap):
    model, x = Projections(), torch.randn(rows, K, dtype=HALF)
    out = compiled(model, x)
    [decision] = fc.last_report().fused
    assert decision.pattern == "qkv_projection" and "packed_direct" in decision.kernel
    for ours, eager, exact in zip(out, model(x), model.exact(x), strict=True):
        assert relative(ours, exact) <= 1.5 * relative(eager, exact)


@pytest.mark.parametrize(("first", "stride"), [(8, K + 24), (3, K + 24), (8, K + 9)])
def test_rows_that_lie_apart_and_begin_anywhere(first, stride, cheap):
    """Only the first of these can be read 16 bytes at a time as it is."""
    model, x = Split(K, 16), torch.randn(9, stride, dtype=HALF)[:, first : first + K]
    out = compiled(model, x, disable=["linear_epilogue"])
    assert "packed_direct" in fc.last_report().fused[0].kernel
    reference = x.double() @ model.weight().T
    assert relative(out, reference) <= 1.5 * relative(model(x), reference)


# ---- compiled, without a device -------------------------------------------------------------------------
def compile_all() -> list[tuple[str, int, bool]]:
    """Kernels for an H200 and an A100: their names, spilled bytes, and whether anything in the walk is shared."""
    from triton.backends.compiler import GPUTarget

    found = []
    for m, dtype, weights, plan, arch in (
        (16, HALF, 1, Plan("direct", 16, 64, 512, 4), 90),
        (8, torch.bfloat16, 2, Plan("direct", 8, 32, 512, 4), 90),
        (32, torch.bfloat16, 1, Plan("direct", 32, 32, 256, 4), 80),
    ):
        op = family(m, 128, weights=weights, bias=False, dtype=dtype)
        source = PackedDirect(op, plan, facts(op, plan), native=True).write()
        types = {name: torch.uint8 if name[0] == "w" else HALF if name[0] == "s" else dtype for name in source.tensors}
        rest = {"x_stride": K, "N": 128, "K": K, "BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k}
        target = GPUTarget("cuda", arch, 32)
        made = compile_text(source.text, source.name, types, [], rest, target, num_warps=4, num_stages=1)
        ptx = made.asm["ptx"]
        moved = ptx.index("st.shared") < ptx.rindex("mma.sync")
        found.append((f"{plan.label} {dtype} sm_{arch}", resources(made).spills, moved))
    return found


def test_nothing_is_shared_between_threads_in_the_walk():
    found = ahead_of_time.compile_all("test_packed_direct")
    assert len(found) == 3 and not [kernel for kernel in found if kernel[1] or kernel[2]], found
