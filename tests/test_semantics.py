"""Raising: different spellings of one formula are one value, and different formulas are different values."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F

from fusion_compiler.pattern import trace
from fusion_compiler.semantics import SemanticView
from fusion_compiler.shapes import broadcast_groups


def raised(function, *inputs):
    """The value a function returns, as text in which its parameters are called a, b, c."""
    view = SemanticView(trace(function, inputs))
    text = repr(view.value(view.graph_module.graph.output_node().args[0]))
    for letter, node in zip("abc", view.graph_module.graph.find_nodes(op="placeholder"), strict=False):
        text = text.replace(f"leaf(node={node.name})", letter)
    # eps is whatever the decomposition made of it, a float32 or a float64
    return re.sub(r"eps=([0-9.e-]+)", lambda m: f"eps={float(m.group(1)):.3g}", text)


def rows(m=6, k=8, dtype=torch.float32):
    return torch.randn(m, k, dtype=dtype)


SILU = {
    "library": lambda x: F.silu(x),
    "x * sigmoid(x)": lambda x: x * torch.sigmoid(x),
    "sigmoid(x) * x": lambda x: torch.sigmoid(x) * x,
    "x / (1 + exp(-x))": lambda x: x / (1 + torch.exp(-x)),
    "x * (1 / (exp(-x) + 1))": lambda x: x * (1 / (torch.exp(-x) + 1)),
    "x * reciprocal": lambda x: x * torch.reciprocal(torch.exp(x.neg()) + 1.0),
    "through float32": lambda x: (x.float() * torch.sigmoid(x.float())).to(x.dtype),
}
GELU = {
    "library": lambda x: F.gelu(x),
    "erf": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "x * half * erf": lambda x: x * (0.5 * (torch.erf(x * (1 / math.sqrt(2))) + 1.0)),
}
GELU_TANH = {
    "library": lambda x: F.gelu(x, approximate="tanh"),
    "pow": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3)))),
    "x*x*x": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
    "factored": lambda x: x * 0.5 * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
}


@pytest.mark.parametrize("family", [SILU, GELU, GELU_TANH], ids=["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_activation_spellings_meet(family, dtype):
    x = rows(dtype=dtype)
    forms = {name: raised(f, x) for name, f in family.items()}
    assert len(set(forms.values())) == 1, forms


def _variance(x, power):
    return {"pow": x.pow(2), "mul": x * x, "square": torch.square(x)}[power].mean(-1, keepdim=True)


RMS = {
    "library": lambda x, w: F.rms_norm(x, x.shape[-1:], w, eps=1e-6),
    "llama": lambda x, w: w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype),
    "mul square": lambda x, w: x * torch.rsqrt(_variance(x, "mul") + 1e-6) * w,
    "square": lambda x, w: w * (torch.rsqrt(1e-6 + _variance(x, "square")) * x),
    "1 / sqrt": lambda x, w: x * (1 / torch.sqrt(_variance(x, "pow") + 1e-6)) * w,
    "/ sqrt": lambda x, w: x / torch.sqrt(_variance(x, "pow") + 1e-6) * w,
    "sum / n": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) * w,
    "** -0.5": lambda x, w: x * (_variance(x, "pow") + 1e-6) ** -0.5 * w,
    "weight first": lambda x, w: (x * w) * torch.rsqrt(_variance(x, "pow") + 1e-6),
    "unsqueezed": lambda x, w: x * torch.rsqrt((x * x).mean(-1) + 1e-6).unsqueeze(-1) * w,
}
LAYER = {
    "library": lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, eps=1e-5),
    "hand": lambda x, w, b: (
        (x - x.mean(-1, keepdim=True))
        / torch.sqrt(((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True) + 1e-5)
        * w
        + b
    ),
    "var": lambda x, w, b: (
        b + w * ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5))
    ),
}


@pytest.mark.parametrize("shape", [(6, 8), (1, 8), (2, 3, 8), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("name", RMS)
def test_rms_norm_spellings(name, shape):
    value = raised(RMS[name], torch.randn(shape), torch.randn(8))
    assert value.startswith("rms_norm(a, b, eps=1e-06, offset=0.0"), value


@pytest.mark.parametrize("shape", [(6, 8), (1, 8), (2, 3, 8)], ids=str)
@pytest.mark.parametrize("name", LAYER)
def test_layer_norm_spellings(name, shape):
    value = raised(LAYER[name], torch.randn(shape), torch.randn(8), torch.randn(8))
    assert value.startswith("layer_norm(a, b, c, eps=1e-05, offset=0.0"), value


def test_gemma_weight_is_an_offset():
    value = raised(
        lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w), rows(), torch.randn(8)
    )
    assert value.startswith("rms_norm(a, b, eps=1e-06, offset=1.0")


NOT_RMS = {
    "other axis": lambda x, w: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6) * w,
    "cube": lambda x, w: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6) * w,
    "other tensor": lambda x, w: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w,
    "wrong n": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 7 + 1e-6) * w,
    "sqrt": lambda x, w: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w,
}


@pytest.mark.parametrize("name", NOT_RMS)
def test_what_is_no_rms_norm(name):
    assert "rms_norm" not in raised(NOT_RMS[name], rows(), torch.randn(8))


def test_sample_variance_is_no_layer_norm():
    value = raised(
        lambda x: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=True) + 1e-5), rows()
    )
    assert "layer_norm" not in value


LINEAR = {
    "F.linear": lambda x, w: F.linear(x, w),
    "@ T": lambda x, w: x @ w.T,
    "matmul": lambda x, w: torch.matmul(x, w.transpose(0, 1)),
    "einsum": lambda x, w: torch.einsum("...k,nk->...n", x, w),
}


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8), (2, 1, 3, 8)], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_linear_spellings(name, shape):
    assert raised(LINEAR[name], torch.randn(shape), torch.randn(4, 8)) == "linear(a, b, kn=False)"


def test_a_stored_transpose_is_told_apart():
    assert raised(lambda x, w: x @ w, rows(), torch.randn(8, 4)) == "linear(a, b, kn=True)"


def test_a_broadcast_row_is_not_a_broadcast_column():
    a = raised(lambda x, y: x + y, torch.randn(4, 4), torch.randn(4, 1))
    b = raised(lambda x, y: x + y, torch.randn(4, 4), torch.randn(1, 4))
    assert a != b


def test_integer_and_double_casts_are_seen():
    assert "cast" in raised(lambda x: x.int().float() * 2, rows())
    assert "cast" in raised(lambda x: x.double().float() * 2, rows())


def test_long_residual_streams_stay_small():
    def stream(x):
        for _ in range(40):
            x = x + torch.tanh(x)
        return x

    view = SemanticView(trace(stream, [rows()]))
    assert max(len(v.args) for v in view.values()) <= 3


@pytest.mark.parametrize(
    ("shape", "out", "groups"),
    [
        ((8,), (6, 8), ((6, False), (8, True))),
        ((6, 1), (6, 8), ((6, True), (8, False))),
        ((2, 3, 1), (2, 3, 8), ((6, True), (8, False))),
        ((), (6, 8), ((48, False),)),
        ((1, 8), (1, 8), ((8, True),)),
        ((5,), (6, 8), None),
    ],
)
def test_broadcast_groups(shape, out, groups):
    assert broadcast_groups(shape, out) == groups
