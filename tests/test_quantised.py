"""Linears with packed weights: found in every spelling, right in Triton's interpreter, and judged for an H200."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from quantised_spellings import SPELLINGS, K, OfGgml, Split

import fusion_compiler as fc
from fusion_compiler.backend import fusion_compiler
from fusion_compiler.machine import TABLE
from fusion_compiler.quantised import recognise, storage_of

HALF = torch.float16
# bytes are dear and there is one multiprocessor, so that tiny products are worth a kernel
SLOW = dataclasses.replace(TABLE["h200"], memory_bandwidth=4e8, l2_bytes=1, num_sms=1)


def compiled(model: torch.nn.Module, x: torch.Tensor, **options: object) -> tuple[torch.Tensor, fc.Report]:
    """The result on a CPU of the kernels made for an H200, and the report."""
    torch._dynamo.reset()
    settings = {"machine": SLOW, "remainder": "eager", "strict": True, "disable": "linear_epilogue", **options}
    with torch.no_grad():
        out = torch.compile(model, backend=fusion_compiler, options=settings)(x)
    return out, fc.last_report()


def relative(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_every_spelling_is_replaced_and_as_right_as_eager(name, rows):
    model = SPELLINGS[name]()
    x = torch.randn(rows, K, dtype=HALF)
    out, report = compiled(model, x)
    [decision] = [d for d in report.decisions if d.pattern == "quantised_linear"]
    assert decision.verdict == "fused", decision.reason
    reference = x.double() @ model.weight().T
    if hasattr(model, "linear"):
        reference = reference + model.linear.bias.double()
    assert relative(out, reference) <= 1.5 * relative(model(x), reference)


class GatedMlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = Split(), Split()
        self.up.qs.copy_(self.up.qs.flip(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.gate(x)) * self.up(x)


def test_a_gated_pair_is_one_kernel():
    model, x = GatedMlp(), torch.randn(3, K, dtype=HALF)
    out, report = compiled(model, x)
    [decision] = report.fused
    assert decision.pattern == "gated_mlp" and decision.kernel.startswith("triton packed")
    reference = F.silu(x.double() @ model.gate.weight().T) * (x.double() @ model.up.weight().T)
    assert relative(out, reference) <= 1.5 * relative(model(x), reference)


def test_weights_computed_alike_are_looked_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr(recognise, "storage_of", lambda *a, **k: asked.append(a) or storage_of(*a, **k))
    model, x = GatedMlp(), torch.randn(3, K, dtype=HALF)
    _, report = compiled(model, x)
    assert report.fused and len(asked) == 1
    asked.clear()
    model.up = OfGgml()
    compiled(model, x)
    assert len(asked) == 2
