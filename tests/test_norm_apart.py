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
from fusion_compiler.lowering.triton_codegen import norm_apart, predict, row_reduction
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


def test_only_a_measurement_takes_what_was_not_measured() -> None:
    def model(x: torch.Tensor, g: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(torch.nn.functional.layer_norm(x, (4096,), g, g), w)

    report = fc.explain(model, *(torch.randn(s).to(BRAIN) for s in ((16, 4096), (4096,), (4096, 4096))), machine="h200")
    [decision] = [d for d in report.decisions if d.pattern == "norm_linear"]
    assert any(o.name == "triton_norm_sliced" for o in decision.candidates)
    assert not decision.kernel.startswith("triton norm")
    assert all(c.error >= predict.UNTRIED for c in norm_apart.candidates(family(16, 64, 64, RMS, PLAIN, BRAIN), H200))


def test_the_norm_lets_the_next_kernel_in_behind_its_own_wait() -> None:
    ptx = ahead_of_time.compile_all("test_norm_apart")
    wait, let, access = (
        re.search(p, ptx).start()  # type: ignore[union-attr]
        for p in (r"griddepcontrol\.wait", r"griddepcontrol\.launch_dependents", r"\n[^\n]*(ld|st)\.global")
    )
    assert wait < let < access


def compile_all() -> str:
    from triton.backends.compiler import GPUTarget

    from fusion_compiler.lowering.triton_codegen.aot import compile_text

    norm = norm_apart.row_norm(family(16, 4096, 4096, LAYER, PLAIN, BRAIN))
    plan, names = row_reduction.plan_of(norm), row_reduction.argument_names(norm)[0]
    text = dependent_launch.with_wait(row_reduction.write(norm, plan), row_reduction.NAME, names, lets=True)
    constants = row_reduction.constexprs(norm, plan)
    compiled = compile_text(
        text, row_reduction.NAME, dict.fromkeys(names, BRAIN), ["M"], constants, GPUTarget("cuda", 90, 32),
        num_warps=plan.num_warps,
    )  # fmt: skip
    found: str = compiled.asm["ptx"]
    return found
