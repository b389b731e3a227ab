"""What only a GPU can show of caches: codes read by the decode kernel, rotation and write as one kernel."""

from __future__ import annotations

import pytest
import test_quantised_attention as quantised
import test_rope_cache as turned
import torch
from test_gpu import agree, pytestmark, through

import fusion_compiler as fc

__all__ = ["pytestmark"]
HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", quantised.CASES)
def test_codes(case: str, dtype: torch.dtype) -> None:
    function = quantised.CASES[case][0]
    inputs = tuple(t.cuda() for t in quantised.inputs_of(case, dtype))
    with torch.no_grad():
        got = through(function)(*inputs)
        agree(got, function(*inputs), function(*quantised.exact(case, inputs)), case)
    [decision] = [d for d in fc.last_report().fused if d.pattern == "attention"]
    assert "torch." in dict(decision.details)["codes"], decision.details


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("case", turned.CASES)
def test_rope_cache(case: str, dtype: torch.dtype) -> None:
    function = turned.CASES[case][0]
    inputs = tuple(t.cuda() for t in turned.inputs_of(case, dtype))

    def outcome(fn: turned.Step, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The results, and the caches as they were left."""
        own = tuple(t.clone() for t in given)
        with torch.no_grad():
            return *fn(*own), *own[4:6]

    wide = (t.double() if t.is_floating_point() else t for t in inputs)
    agree(
        outcome(through(function, disable=turned.OTHERS), *inputs), outcome(function, *inputs), outcome(function, *wide)
    )
    assert [d.kernel for d in fc.last_report().fused] == ["triton rope_cache"]
