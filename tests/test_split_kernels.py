"""Blocks that share K: numbers in Triton's interpreter, the zeros they count in, and who pays for these."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from matmul_family_cases import BIAS, PLAIN, SCALED, Epilogue, Operands, assert_as_good_as_eager, family, run
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional

import fusion_compiler as fc
from fusion_compiler import dependent_launch
from fusion_compiler.fused import Site
from fusion_compiler.lowering.triton_codegen import matmul
from fusion_compiler.lowering.triton_codegen.plans import Plan
from fusion_compiler.splice import ZEROS, Builder, clean, load_kernel, replace

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16
SPLIT = Plan("split", 16, 32, 16, 4, 3, splits=4)
SHARED = Plan("shared", 64, 32, 32, 4, 3, group=2, blocks=5)


@pytest.mark.parametrize("kn", [False, True])
@pytest.mark.parametrize(("epilogue", "dtype"), [(BIAS, HALF), (SCALED, SINGLE)], ids=["bias", "scaled"])
def test_blocks_that_share_k(epilogue: Epilogue, dtype: torch.dtype, kn: bool) -> None:
    for m, k, n in ((2, 192, 96), (16, 130, 90)):
        operands = Operands.random(family(m, k, n, None, epilogue, dtype, weight_is_kn=kn))
        assert_as_good_as_eager(run(operands, SPLIT, runtime_m=m == 2), operands, epilogue)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("plan", "rows"), [(SPLIT, 5), (SHARED, 70)], ids=["split", "shared"])
def test_kernels_that_share_k_count_in_the_same_zeros(
    trace: object, plan: Plan, rows: int, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where kernels can be launched early, a kernel of our own makes them."""
    monkeypatch.setattr(dependent_launch, "supported", lambda device: early)
    monkeypatch.setattr(dependent_launch, "waiting", lambda kernel, *_: kernel)

    def model(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (x @ w.T) @ v.T

    x, w, v = torch.randn(rows, 128), torch.randn(96, 128) / 8, torch.randn(64, 96) / 8
    gm = trace(model, x, w, v)  # type: ignore[operator]
    for product in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
        turned = product.args[1]
        site = Site((product.args[0], turned.args[0]), product, (product,))
        n, k = turned.args[0].meta["val"].shape
        op = family(rows, k, n, None, PLAIN, SINGLE)
        replace(site, matmul.emit(op, plan, Builder(gm, product), site))
    clean(gm)
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)) == (not early)
    assert sum("shared_zeros" in node.meta for node in gm.graph.nodes) == 1
    launches = gm.graph.find_nodes(op="call_function", target=triton_kernel_wrapper_functional)
    assert len(launches) == 2 + early
    torch.testing.assert_close(gm(x, w, v), model(x, w, v), rtol=1e-4, atol=1e-4)


def test_zeros_that_a_graph_needs_once_are_paid_by_all_who_share_them() -> None:
    def layers(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        for w in weights:
            x = x + F.linear(x, w)
        return x

    def seconds(count: int) -> float:
        tensors = (torch.randn(32, 2048), *torch.randn(count, 2048, 2048))
        report = fc.explain(layers, *(t.to(BRAIN) for t in tensors), machine="h200")
        split = [o for d in report.decisions for o in d.candidates if o.name == "triton_split"]
        assert len(split) >= count
        return min(o.work.seconds for o in split)

    assert seconds(1) - seconds(6) == pytest.approx(0.75e-6, rel=0.05)


def test_zeros_of_any_size() -> None:
    held = torch.ones(3000, dtype=torch.int32)
    load_kernel(ZEROS, "zeros")[(3,)](held, SIZE=2500, BLOCK=1024)
    assert not held[:2500].any() and held[2500:].all()
