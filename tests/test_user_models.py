"""Hand-written models: what stands in them is found however it is spelled, and results agree with eager."""

from __future__ import annotations

import pytest
import torch
from model_runs import STARVED, compiled, error
from user_models import LENGTH, USER_MODELS, WIDTH

import fusion_compiler as fc


@pytest.mark.parametrize("kind", USER_MODELS, ids=lambda kind: kind.__name__)
def test_found_and_right(kind):
    model = kind().eval()
    x = torch.randn(2, LENGTH, WIDTH)
    assert error(model, compiled(model, **STARVED), lambda: {"x": x}) <= 1.5
    decisions = [d for r in fc.reports() for d in r.decisions]
    attentions, patterns = USER_MODELS[kind]
    assert sum(d.pattern == "attention" for d in decisions) >= attentions
    assert {d.pattern for d in decisions} >= patterns


@pytest.mark.parametrize("kind", [k for k in USER_MODELS if k.__name__ in ("NanoGPT", "Llama2C", "T5")])
def test_gradients_agree(kind):
    """Training: gradients of all parameters, with the dropout off so that they can be compared."""
    model = kind()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    x = torch.randn(2, LENGTH, WIDTH)

    def gradients(run):
        model.zero_grad()
        run(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    for got, want in zip(gradients(compiled(model, **STARVED)), gradients(model), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
