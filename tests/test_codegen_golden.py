"""Generated sources, word for word: `pytest --update-golden` writes them anew, and the diff is the review."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from matmul_family_cases import BIAS, GEGLU_RESIDUAL, LAYER, PLAIN, RMS, SCALED, SWIGLU, family

from fusion_compiler.fused import MatmulFamily
from fusion_compiler.lowering.triton_codegen.plans import Plan
from fusion_compiler.lowering.triton_codegen.source import facts, write

BRAIN = torch.bfloat16
GEMV = Plan("gemv", 1, 16, 256, 8, lanes=8)
CASES: dict[str, tuple[MatmulFamily, Plan]] = {
    "rms_swiglu_gemv": (family(1, 4096, 14336, RMS, SWIGLU, BRAIN), GEMV),
    "rms_swiglu_swap": (family(16, 4096, 14336, RMS, SWIGLU, BRAIN), Plan("swap", 16, 128, 128, 8, 3)),
    "rms_swiglu_swap_gram": (family(5, 2048, 8192, RMS, SWIGLU, BRAIN), Plan("swap", 8, 32, 256, 2, 4, gram=True)),
    "layer_geglu_residual_gemv": (
        family(2, 4096, 4096, LAYER, GEGLU_RESIDUAL, BRAIN), Plan("gemv", 2, 8, 512, 4, 3, lanes=8)
    ),
    "layer_geglu_residual_swap": (
        family(16, 4096, 4096, LAYER, GEGLU_RESIDUAL, BRAIN), Plan("swap", 16, 64, 256, 4, 4)
    ),
    "bias_swap_uneven": (family(3, 1000, 1001, None, BIAS, torch.float16), Plan("swap", 8, 32, 128, 2, 3)),
    "rms_scaled_swap_half": (family(16, 2048, 2048, RMS, SCALED, torch.float16), Plan("swap", 16, 16, 256, 1, 4)),
    "rms_gemv_wide_in_by_out": (family(1, 16384, 262144, RMS, PLAIN, BRAIN, weight_is_kn=True), GEMV),
    "rms_swiglu_gemv_packed": (family(1, 4096, 14336, RMS, SWIGLU, BRAIN, features=(0, 14336)), GEMV),
}  # fmt: skip


@pytest.mark.parametrize("runtime_m", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, runtime_m: bool, request: pytest.FixtureRequest) -> None:
    op, plan = CASES[name]
    known = facts(op, plan)
    text = write(op, plan, dataclasses.replace(known, m=None) if runtime_m else known).text
    path = Path(__file__).parent / "golden" / f"{name}{'_dynamic' if runtime_m else ''}.py.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert path.is_file(), f"{path.name} is missing: run pytest --update-golden"
    assert text == path.read_text(), f"{path.name} differs: look at the change, then run pytest --update-golden"
