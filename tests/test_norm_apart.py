"""Linears behind a norm that has a kernel of its own: numbers, what is offered where, and who may start when."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import ahead_of_time
import pytest
import torch
from matmul_family_cases import (
    BIAS,
    GEMMA,
    LAYER,
    LAYER_PLAIN,
    PLAIN,
    RMS,
    RMS_PLAIN,
    SWIGLU,
    Epilogue,
    Operands,
    assert_as_good_as_eager,
    family,
)

import fusion_compiler as fc
from fusion_compiler import dependent_launch
from fusion_compiler.fused import MatmulGroup, RowNorm, Site
from fusion_compiler.lowering.triton_codegen import matmul, norm_apart, predict, row_reduction
from fusion_compiler.lowering.triton_codegen.source import facts, write
from fusion_compiler.machine import TABLE
from fusion_compiler.splice import Builder, clean, replace

HALF, BRAIN = torch.float16, torch.bfloat16
H200 = TABLE["h200"]
NORMS = {"rms": RMS, "gemma": GEMMA, "rms plain": RMS_PLAIN, "layer": LAYER, "layer plain": LAYER_PLAIN}


def computed(trace: Any, operands: Operands, epilogue: Epilogue) -> torch.Tensor:
    """By the first candidate, in the place of eager's nodes; x is a part of wider rows."""
    op, (x, *others) = operands.op, operands.flat()

    def model(wide: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        norm, weights = others[: op.head - 1], others[op.head - 1 :][: op.weights]
        given = Operands(op, wide[:, : x.shape[1]], norm, weights, others[op.head - 1 + op.weights :])
        return given.eager(epilogue, op.dtype)

    wide = torch.cat([x, x], 1)
    gm = trace(model, wide, *others)
    first, *rest = gm.graph.find_nodes(op="placeholder")
    output = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    part = next(n for n in first.users if n.meta["val"].shape == x.shape)
    site = Site((part, *rest), output, (output,))
    candidate = norm_apart.candidates(op, H200)[0]
    replace(site, candidate.emit(Builder(gm, output), site))  # type: ignore[arg-type]
    clean(gm)
    found: torch.Tensor = gm(wide, *others)
    return found


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_both_kernels_compute_what_eager_does(trace: object, norm: RowNorm) -> None:
    for m, epilogue in ((3, BIAS), (16, SWIGLU)):
        operands = Operands.random(family(m, 200, 96, norm, epilogue, HALF), mean=1.0)
        assert_as_good_as_eager(computed(trace, operands, epilogue), operands, epilogue)


def test_linears_of_one_norm_read_it_together() -> None:
    part = family(16, 4096, 4096, LAYER, PLAIN, BRAIN)
    group = MatmulGroup(16, (part, dataclasses.replace(part, n=1024)))
    found = norm_apart.candidates(group, H200)
    assert found and all(c.traffic.launches == 2 and c.name.startswith("triton_norm_") for c in found)
    alone = norm_apart.candidates(part, H200)
    assert "sliced" in alone[0].name, "where few columns are, the warps of a block share K"


@pytest.mark.parametrize("machine", ["a100", "v100", "mi300x"])
def test_nothing_is_offered_where_no_kernel_lets_another_in(machine: str) -> None:
    assert not norm_apart.candidates(family(16, 4096, 4096, LAYER, PLAIN, BRAIN), TABLE[machine])


def test_nothing_is_offered_for_many_rows_or_no_norm() -> None:
    assert not norm_apart.candidates(family(65, 4096, 4096, RMS, PLAIN, BRAIN), H200)
    assert not norm_apart.candidates(family(16, 4096, 4096, None, PLAIN, BRAIN), H200)


@pytest.mark.parametrize(("kind", "rows", "apart"), [("layer", 16, True), ("rms", 4, False), ("layer", 1, False)])
def test_a_norm_stands_apart_where_that_was_measured_to_be_faster(kind: str, rows: int, apart: bool) -> None:
    """4096→4096: LayerNorm, 16 rows 12.6 µs apart, 13.1 folded; RMSNorm, 4 rows 11.6 and 10.7."""

    def model(x: torch.Tensor, g: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        norm = torch.nn.functional.layer_norm(x, (4096,), g, g)
        return torch.nn.functional.linear(norm if kind == "layer" else torch.nn.functional.rms_norm(x, (4096,), g), w)

    given = (torch.randn(s).to(BRAIN) for s in ((rows, 4096), (4096,), (4096, 4096)))
    [decision] = [d for d in fc.explain(model, *given, machine="h200").decisions if d.pattern == "norm_linear"]
    assert decision.verdict == "fused" and decision.kernel.startswith("triton norm") is apart


def test_only_a_measurement_takes_what_was_not_measured() -> None:
    errors = {c.name: c.error for c in norm_apart.candidates(family(2, 4096, 4096, LAYER, PLAIN, BRAIN), H200)}
    assert errors["triton_norm_gemv"] == predict.UNTRIED > errors["triton_norm_sliced"]


def test_weights_are_asked_for_before_the_wait_and_x_behind_it() -> None:
    for kernel in ahead_of_time.compile_all("test_norm_apart", True):
        assert kernel["weights"] < kernel["wait"] < kernel["product"], kernel
        assert kernel["x"] == kernel["late"] == 1, "every load of x has the zero in its address"
        assert kernel["spills"] == 0, kernel


def test_the_norm_lets_the_next_kernel_in_behind_its_own_wait() -> None:
    ptx = ahead_of_time.compile_all("test_norm_apart")
    wait, let, access = (
        re.search(p, ptx).start()  # type: ignore[union-attr]
        for p in (r"griddepcontrol\.wait", r"griddepcontrol\.launch_dependents", r"\n[^\n]*(ld|st)\.global")
    )
    assert wait < let < access


def compile_all(linears: bool = False) -> Any:
    """In a process of its own: interpreted kernels cannot be compiled."""
    from triton.backends.compiler import GPUTarget

    from fusion_compiler.lowering.triton_codegen.aot import compile_kernel, compile_text, resources

    target = GPUTarget("cuda", 90, 32)
    if linears:
        found = []
        for m in (16, 64):
            op = family(m, 4096, 4096, None, PLAIN, BRAIN)
            for plan in (p for p in matmul.best_plans(op, H200, m) if p.kind in matmul.WEIGHTS_FIRST):
                source = write(op, plan, dataclasses.replace(facts(op, plan), weights_first=True))
                compiled = compile_kernel(op, plan, source, target)
                ptx = compiled.asm["ptx"]
                first = re.search(r"\n[^\n]*cp\.async\.(c|bulk\.tensor)", ptx)
                product = re.search(r"\n[^\n]*(wgmma\.mma_async|mma\.sync)", ptx)
                assert first and product
                reads = [line for line in source.text.split("\n") if re.search(r"tl\.load\(x\b|x\.load", line)]
                found.append({
                    "weights": first.start(), "wait": ptx.find("griddepcontrol.wait"), "product": product.start(),
                    "x": len(reads), "late": sum("late" in line for line in reads),
                    "spills": resources(compiled).spills,
                })  # fmt: skip
        return found
    norm = norm_apart.row_norm(family(16, 4096, 4096, LAYER, PLAIN, BRAIN))
    plan, names = row_reduction.plan_of(norm), row_reduction.argument_names(norm)[0]
    text = dependent_launch.with_wait(row_reduction.write(norm, plan), row_reduction.NAME, names, lets=True)
    constants = row_reduction.constexprs(norm, plan)
    compiled = compile_text(
        text, row_reduction.NAME, dict.fromkeys(names, BRAIN), ["M"], constants, target, num_warps=plan.num_warps
    )
    return compiled.asm["ptx"]
