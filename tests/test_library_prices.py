"""The price of the library's products of few rows beside what was measured, and the choices that follow from it."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_graphs import calls, traced

import fusion_compiler as fc
from fusion_compiler.cost.baseline import inductor_plan
from fusion_compiler.cost.roofline import library_matmul_seconds
from fusion_compiler.machine import machine

H200 = machine("h200")
BF16 = torch.bfloat16
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "few_rows_h200.json"
# (K, N, M): µs under Inductor, µs of the fastest kernel that the compiler has (its zeros included)
RESIDUALS = {
    (4096, 4096, 1): (13.7, 9.8), (4096, 4096, 16): (14.2, 11.3), (4096, 4096, 32): (14.8, 12.4),
    (4096, 4096, 64): (13.0, 11.4), (8192, 2048, 1): (14.3, 9.4), (8192, 2048, 16): (14.4, 10.7),
    (8192, 2048, 32): (15.1, 12.7), (8192, 2048, 64): (15.65, 14.1), (14336, 4096, 1): (32.8, 28.1),
    (14336, 4096, 16): (33.8, 30.3), (14336, 4096, 32): (35.2, 32.65), (14336, 4096, 64): (37.5, 32.65),
    (2048, 2048, 1): (7.3, 4.0), (2048, 2048, 16): (7.4, 4.6),
}  # fmt: skip


def ratios() -> dict[tuple[int, int, int], float]:
    """Predicted over measured."""
    found = {}
    for row in json.loads(RESULTS.read_text())["library"]:
        for m, us in row["mm"].items():
            k, n = row["k"], row["n"]
            found[k, n, int(m)] = float(library_matmul_seconds(int(m), n, k, BF16, H200)) * 1e6 / us
    return found


def test_library_times_of_up_to_128_rows() -> None:
    """135 products, K from 1024 to 14336."""
    found = ratios()
    errors = [abs(math.log(ratio)) for ratio in found.values()]
    assert len(found) == 135 and max(errors) < 0.19
    assert math.sqrt(statistics.fmean(e * e for e in errors)) < 0.075
    assert abs(statistics.fmean(map(math.log, found.values()))) < 0.03


@pytest.mark.parametrize(("k", "n", "m"), list(RESIDUALS))
def test_residuals_under_inductor(k: int, n: int, m: int) -> None:
    residual = traced(lambda x, w, r: x @ w.T + r, (m, k), (n, k), (m, n), dtype=BF16)
    measured, _ = RESIDUALS[k, n, m]
    assert inductor_plan(calls(residual), H200).seconds * 1e6 == pytest.approx(measured, rel=0.16)


@pytest.mark.parametrize(("k", "n", "m"), list(RESIDUALS))
def test_residuals_are_fused_where_a_kernel_was_faster(k: int, n: int, m: int) -> None:
    x, w, r = (torch.empty(*shape, dtype=BF16, device="meta") for shape in ((m, k), (n, k), (m, n)))
    with torch.no_grad():
        report = fc.explain(lambda x, w, r: F.linear(x, w) + r, x, w, r, machine="h200")
    (decision,) = (d for d in report.decisions if d.pattern == "linear_epilogue")
    inductor, ours = RESIDUALS[k, n, m]
    assert inductor / ours > 1.05 and decision.verdict == "fused", decision.reason
